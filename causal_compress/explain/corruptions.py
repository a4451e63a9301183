"""Inputs as the world may damage them: generated here, on the raw scale before normalisation, the same for one seed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.inputs.data import Data, Features, Split
from causal_compress.inputs.images import ImageRows
from causal_compress.results import Skip

Pixels = NDArray[np.float32]
Rows = NDArray[np.int64]
Batches = Callable[[Split, int], Iterator[tuple[Tensor, Tensor]]]

NOISE = (0.04, 0.08, 0.12)
BLUR = (0.4, 0.7, 1.0)
CONTRAST = (0.75, 0.5, 0.3)
JPEG = (80, 58, 40)
COLUMN_NOISE = (0.1, 0.25, 0.5)
COLUMN_DROPOUT = (0.05, 0.15, 0.3)
_BLUR_SIDE = 32
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Corruption:
    """One kind of damage at one severity, 1 to 3; `batches` makes the damaged inputs of a split, batch by batch."""

    name: str
    severity: int
    setting: str
    batches: Batches


def corruptions(data: Data, split: Split, seed: int) -> list[Corruption] | Skip:
    """Every corruption that suits the data.

    Args:
        data: Images or a table; the spread of columns is that of its calibration split.
        split: What will be corrupted.
        seed: Of noise and dropout; one seed gives the same damage whatever the batch size.

    Returns:
        Images: Gaussian noise, Gaussian blur, contrast, JPEG. Tables: noise on numeric columns, dropout of columns. A
        refusal where pixels do not lie in [0, 1], for then nobody knows what raw means.

    Source: kinds as in Hendrycks & Dietterich 2019, arXiv:1903.12261; three of their settings for 32 x 32 images, the
        blur growing with the image.
    """
    if isinstance(split.rows, ImageRows):
        pixels = _pixels(split, split.positions[: min(64, len(split))])
        if pixels.min() < -_ROUNDING or pixels.max() > 1 + _ROUNDING:
            found = f"pixels from {pixels.min():.3g} to {pixels.max():.3g} before normalisation, not in [0, 1]"
            return Skip(what="corruptions", reason=f"{found}: what a raw image looks like is not known")
        return list(_of_images(max(pixels.shape[1:3]), seed))
    return list(_of_tables(data, seed))


def _of_images(side: int, seed: int) -> Iterator[Corruption]:
    scale = max(side, _BLUR_SIDE) / _BLUR_SIDE
    for severity in (1, 2, 3):
        sigma, radius = NOISE[severity - 1], BLUR[severity - 1] * scale
        factor, jpeg_quality = CONTRAST[severity - 1], JPEG[severity - 1]
        kinds: list[tuple[str, str, Callable[[Pixels, np.random.Generator], Pixels]]] = [
            ("noise", f"sigma {sigma:g} of the pixel range", lambda x, rng, s=sigma: _noisy(x, s, rng)),  # type: ignore[misc]
            ("blur", f"sigma {radius:.3g} pixels", lambda x, _, r=radius: _blurred(x, r)),  # type: ignore[misc]
            ("contrast", f"factor {factor:g} around each image's mean", lambda x, _, f=factor: _flattened(x, f)),  # type: ignore[misc]
            ("jpeg", f"quality {jpeg_quality}", lambda x, _, q=jpeg_quality: _recompressed(x, q)),  # type: ignore[misc]
        ]
        for name, setting, damage in kinds:
            yield Corruption(name, severity, setting, _image_batches(damage, [seed, severity]))


def _image_batches(damage: Callable[[Pixels, np.random.Generator], Pixels], seed: list[int]) -> Batches:
    def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(split.rows, ImageRows)
        preparation = split.rows.preparation
        generator = np.random.default_rng(seed)
        for start in range(0, len(split), size):
            clean = np.clip(_pixels(split, split.positions[start : start + size]), 0, 1)
            damaged = damage(clean, generator)
            x = torch.from_numpy(np.ascontiguousarray(damaged.transpose(0, 3, 1, 2)))
            yield preparation.normalized(x.repeat(1, preparation.repeat, 1, 1)), split.labels[start : start + size]

    return batches


def _pixels(split: Split, positions: Rows) -> Pixels:
    """N x H x W x C in [0, 1] at the size that the network sees; a grey image has one channel here."""
    assert isinstance(split.rows, ImageRows)
    single = replace(split.rows.preparation, repeat=1)
    pixels: Pixels = single.scaled(split.rows.store.read(positions)).permute(0, 2, 3, 1).numpy()
    return pixels


def _noisy(x: Pixels, sigma: float, generator: np.random.Generator) -> Pixels:
    noise = generator.standard_normal(x.shape, dtype=np.float32)
    noisy: Pixels = np.clip(x + np.float32(sigma) * noise, 0, 1)
    return noisy


def _blurred(x: Pixels, sigma: float) -> Pixels:
    from scipy.ndimage import gaussian_filter

    blurred: Pixels = gaussian_filter(x, sigma=(0, sigma, sigma, 0), mode="nearest")
    return blurred


def _flattened(x: Pixels, factor: float) -> Pixels:
    mean = x.mean(axis=(1, 2), keepdims=True)
    flattened: Pixels = np.clip((x - mean) * np.float32(factor) + mean, 0, 1)
    return flattened


def _recompressed(x: Pixels, jpeg_quality: int) -> Pixels:
    """Through JPEG and back; channels beyond grey and colour are left as they are."""
    from PIL import Image

    coloured = 3 if x.shape[3] >= 3 else 1
    stored = np.rint(x[..., :coloured] * 255).astype(np.uint8)

    def through(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if coloured == 1 else image).save(file, "JPEG", quality=jpeg_quality)
        with Image.open(io.BytesIO(file.getvalue())) as opened:
            return np.asarray(opened).reshape(image.shape)

    with ThreadPoolExecutor(max_workers=2) as pool:  # Pillow works without holding the interpreter's lock
        decoded = np.stack(list(pool.map(through, stored))).astype(np.float32) / np.float32(255)
    return np.concatenate([decoded, x[..., coloured:]], axis=3)


def _of_tables(data: Data, seed: int) -> Iterator[Corruption]:
    features = data.features
    numeric = numeric_columns(features)
    spread = _spread(data.calibration)
    replaced = _replaced(features, numeric)
    for severity in (1, 2, 3):
        sigma, share = COLUMN_NOISE[severity - 1], COLUMN_DROPOUT[severity - 1]
        if numeric:
            positions = [position for column in numeric for position in features.columns[column]]
            scale = torch.zeros_like(spread).index_copy(0, torch.tensor(positions), spread[positions]) * sigma
            setting = f"sigma {sigma:g} of each numeric column's standard deviation"
            yield Corruption("column noise", severity, setting, _table_batches(_noise_of(scale), [seed, severity]))
        setting = f"each column lost with probability {share:g} (numbers: the mean, categories: unknown)"
        lose = _dropout_of(features, replaced, share)
        yield Corruption("column dropout", severity, setting, _table_batches(lose, [seed, severity]))


def _table_batches(damage: Callable[[Tensor, np.random.Generator], Tensor], seed: list[int]) -> Batches:
    def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = np.random.default_rng(seed)
        for x, y in split.batches(size):
            yield damage(x, generator), y

    return batches


def _noise_of(scale: Tensor) -> Callable[[Tensor, np.random.Generator], Tensor]:
    return lambda x, rng: x + scale * torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32))


def _dropout_of(features: Features, replaced: Tensor, share: float) -> Callable[[Tensor, np.random.Generator], Tensor]:
    column_of = torch.zeros(len(replaced), dtype=torch.int64)
    for number, positions in enumerate(features.columns):
        column_of[list(positions)] = number

    def lose(x: Tensor, generator: np.random.Generator) -> Tensor:
        lost = torch.from_numpy(generator.random((len(x), len(features.columns))) < share)
        return torch.where(lost[:, column_of], replaced, x)

    return lose


def numeric_columns(features: Features) -> list[int]:
    """Numbers of a table's columns that are not categories."""
    return [
        number for number in range(len(features.names)) if not features.categories or not features.categories[number]
    ]


def _replaced(features: Features, numeric: list[int]) -> Tensor:
    """What a lost column becomes: the calibration mean, or no category at all."""
    replaced = features.zero.clone()
    for column in numeric:
        positions = list(features.columns[column])
        replaced[positions] = features.mean[positions]
    return replaced


def _spread(split: Split) -> Tensor:
    """Standard deviation of each encoded position, over one pass."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for x, _ in split.batches(1024):
        count += len(x)
        total, squares = total + x.double().sum(0), squares + x.double().square().sum(0)
    return (squares / count - (total / count).square()).clamp_min(0).sqrt().float()
