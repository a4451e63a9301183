"""Train / calibration / validation / test: disjoint, seeded, stratified; images and tables alike."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.errors import DataError
from causal_compress.inputs.arrays import Labels, Source
from causal_compress.inputs.images import ImageArray, ImageItems, ImageRows, Preparation
from causal_compress.inputs.sources import open_source
from causal_compress.inputs.tables import Encoding, TableRows, encode, fit_encoding
from causal_compress.recipe import AugmentSection, DataSection

log = logging.getLogger(__name__)

_MEAN_BATCH = 256
_MIN_POOL = 4
_MIN_TRAIN = 2
_LATER = ("rotation", "zoom")

Positions = NDArray[np.int64]
Rows = ImageRows | TableRows


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of a source, in a fixed order; they become inputs only when a batch is made.

    Train, calibration and validation stand in an order whose every beginning is stratified, so that `limit` takes
    a fair sample; a source's own test part keeps its order.
    """

    labels: Tensor
    rows: Rows
    positions: Positions

    def __len__(self) -> int:
        return len(self.positions)

    def batches(
        self, batch_size: int, *, limit: int | None = None, shuffle_seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the split once.

        Args:
            batch_size: Inputs per batch; the last batch may be smaller.
            limit: At most so many inputs.
            shuffle_seed: Order and augmentation; None keeps the stored order.
            augment: Apply the recipe's augmentation.

        Yields:
            Inputs, float32, normalised (N x C x H x W, or N x F), and labels, int64.
        """
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        order = order[:limit]
        generator = torch.Generator().manual_seed(shuffle_seed or 0) if augment else None
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield self.rows.inputs(self.positions[chosen], generator), self.labels[torch.from_numpy(chosen)]

    def take(self, indices: Sequence[int] | Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:
        """The inputs and labels at `indices` of this split, normalised, not augmented."""
        chosen = _as_positions(indices)
        return self.rows.inputs(self.positions[chosen], None), self.labels[torch.from_numpy(chosen)]

    def show(self, indices: Sequence[int] | Tensor | NDArray[Any]) -> NDArray[Any]:
        """The inputs at `indices` for people: images uint8 N x H x W x C; tables float64 raw rows.

        Limits:
            Categories stand as their index in `Features.categories`, -1 for one that training never saw.
        """
        return self.rows.show(self.positions[_as_positions(indices)])


@dataclass(frozen=True, eq=False)
class Features:
    """What an intervention masks.

    `columns` holds the encoded positions of each table column, `categories` the names behind a categorical column's
    positions (empty for numeric ones). `zero` and `mean` are broadcastable to one input, in normalised space: raw zero
    (black; for categories: none) and the mean over the calibration split.
    """

    kind: Literal["image", "table"]
    names: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...]
    zero: Tensor
    mean: Tensor
    categories: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Data:
    """Four disjoint splits of one source; `fingerprint` is the sha256 over contents, split and preprocessing.

    `encoding_sha256` tells how a table's rows became numbers; images have none.
    """

    train: Split
    calibration: Split
    validation: Split
    test: Split
    features: Features
    kind: Literal["image", "table"]
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    example_input: Tensor
    fingerprint: str
    encoding_sha256: str | None = None

    @property
    def copied_channels(self) -> int:
        """How many equal channels every input has, by the way it is prepared (grey made colour); 1: they may differ."""
        return self.train.rows.preparation.copied_channels if isinstance(self.train.rows, ImageRows) else 1


@dataclass(frozen=True, eq=False)
class _Parts:
    """Positions of the splits; those of `test` count in the source's own test part where it has one."""

    train: Positions
    calibration: Positions
    validation: Positions
    test: Positions


def load_data(section: DataSection, *, seed: int) -> Data:
    """Read, split and prepare the data that the recipe names.

    Args:
        section: Source, sizes, normalisation and augmentation.
        seed: Which inputs go to which split; a source's own test part stays as it is.

    Returns:
        Disjoint splits. Calibration and validation together never take more than half of what isn't test.

    Raises:
        UsageError: no source, or one of an unknown kind.
        DataError: data that can't be read or used.

    Limits:
        The fingerprint of image files covers their names, sizes and first 64 KiB each, not every byte; a data set of
        torchvision that neither holds its images nor lists their files is decoded for it.
    """
    source = open_source(section)
    if len(source.classes) < 2:
        raise DataError(
            f"{section.source} has fewer than 2 classes",
            found=f"only the class '{source.classes[0]}'" if source.classes else "no labels",
            remedy="a classifier needs at least two classes; check the labels.",
        )
    parts = _split(source, section, seed)
    kind: Literal["image", "table"] = "table" if isinstance(source.pool, pd.DataFrame) else "image"
    pool, test, encoding = _rows(source, section, parts)
    _warn_of_copies(pool, test, parts)
    shown_labels = source.labels if source.test_labels is None else source.test_labels
    train, calibration = (
        Split(torch.from_numpy(source.labels[where]), pool, where) for where in (parts.train, parts.calibration)
    )
    held = (shown_labels, test) if section.validation_from == "test" else (source.labels, pool)
    validation = Split(torch.from_numpy(held[0][parts.validation]), held[1], parts.validation)
    example, _ = train.take([0, 1])
    log.info("data: %d train, %d calibration, %d validation, %d test", *map(len, vars(parts).values()))
    return Data(
        train=train,
        calibration=calibration,
        validation=validation,
        test=Split(torch.from_numpy(shown_labels[parts.test]), test, parts.test),
        features=_features(pool, encoding, calibration),
        kind=kind,
        classes=source.classes,
        input_shape=tuple(example.shape[1:]),
        example_input=example,
        fingerprint=_fingerprint(source, section, parts, pool, test),
        encoding_sha256=None if encoding is None else encoding.sha256,
    )


def _as_positions(indices: Sequence[int] | Tensor | NDArray[Any]) -> Positions:
    values = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _stratified_order(labels: Labels, rng: np.random.Generator) -> Positions:
    """An order of which every stretch holds the classes in about their overall shares.

    The member of rank r in a class of size s stands at (r + 1/2) / s; a class of one stands last, in the train split.
    """
    shuffled = rng.permutation(len(labels))
    drawn = labels[shuffled]
    sizes = np.bincount(drawn, minlength=1)
    by_class = np.argsort(drawn, kind="stable")
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - starts[drawn[by_class]]
    quantile = np.where(sizes[drawn] == 1, 1.0, (rank + 0.5) / sizes[drawn])
    ordered: Positions = shuffled[np.argsort(quantile, kind="stable")].astype(np.int64)
    return ordered


def _split(source: Source, section: DataSection, seed: int) -> _Parts:
    rng = np.random.default_rng(seed)
    pool = _stratified_order(source.labels, rng)
    if source.test_labels is None:
        count = max(1, round(len(pool) * section.test_share))
        test, pool = pool[:count], pool[count:]
        test = test[: section.max_test]
    else:
        test = np.arange(len(source.test_labels))
        if section.max_test is not None and section.max_test < len(test):
            test = _stratified_order(source.test_labels, rng)[: section.max_test]
    from_test = None
    if section.validation_from == "test":
        from_test, test = _validation_of_test(source, section, rng)
    if len(test) == 0 or len(pool) < _MIN_POOL:
        raise DataError(
            f"{section.source} is too small to be split",
            found=f"{len(pool)} inputs to learn from, {len(test)} to test on",
            wanted=f"at least {_MIN_POOL} and 1",
            remedy="give more data, or lower data.test_share.",
        )
    wanted = 0 if from_test is not None else section.validation
    calibration, validation = _held_out_sizes(section.calibration, wanted, len(pool))
    ends = np.cumsum([calibration, validation])
    chosen = [np.ascontiguousarray(part) for part in np.split(pool, ends)]
    if section.max_train is not None and section.max_train < _MIN_TRAIN:
        raise DataError(
            "data.max_train leaves too few inputs to learn from",
            found=str(section.max_train),
            wanted=f"at least {_MIN_TRAIN}",
            remedy="raise data.max_train, or remove it.",
        )
    return _Parts(chosen[2][: section.max_train], chosen[0], chosen[1] if from_test is None else from_test, test)


def _validation_of_test(source: Source, section: DataSection, rng: np.random.Generator) -> tuple[Positions, Positions]:
    """Rows of the source's own test split that serve as validation, at most half of it, and those that stay test."""
    if source.test_labels is None or len(source.test_labels) < 2:
        raise DataError(
            "data.validation_from: test needs a source with a test split of its own",
            found=f"{section.source} has {'none' if source.test_labels is None else 'one of a single input'}",
            remedy="leave validation_from at train: validation is then held out of the same rows as everything else",
        )
    order = _stratified_order(source.test_labels, rng)
    count = min(section.validation, len(order) // 2)
    rest = order[count:][: section.max_test]
    return order[:count], rest if section.max_test is not None else np.sort(rest)


def _held_out_sizes(calibration: int, validation: int, pool: int) -> tuple[int, int]:
    half = pool // 2
    if calibration + validation <= half:
        return calibration, validation
    smaller = min(max(1, half * calibration // (calibration + validation)), half - 1)
    log.info(
        "%d inputs: calibration %d -> %d, validation %d -> %d", pool, calibration, smaller, validation, half - smaller
    )
    return smaller, half - smaller


def _rows(source: Source, section: DataSection, parts: _Parts) -> tuple[Rows, Rows, Encoding | None]:
    if isinstance(source.pool, pd.DataFrame):
        normalize = section.normalize
        fitted_on = source.pool.iloc[parts.train]
        encoding = fit_encoding(fitted_on, source.categorical, normalize.mean, normalize.std)
        pool = encode(source.pool, encoding)
        return pool, encode(source.test, encoding) if isinstance(source.test, pd.DataFrame) else pool, encoding
    preparation = _preparation(source.pool, section)
    images = ImageRows(source.pool, preparation)
    if isinstance(source.test, ImageArray | ImageItems):
        return images, ImageRows(source.test, preparation), None
    return images, images, None


def _warn_of_copies(pool: Rows, test: Rows, parts: _Parts) -> None:
    if not isinstance(pool, TableRows) or not isinstance(test, TableRows):
        return
    known = {row.tobytes() for row in pool.encoded[parts.train]}
    if copies := sum(row.tobytes() in known for row in test.encoded[parts.test]):
        log.warning(
            "%d of %d test rows are equal to training rows; if they are copies, remove them: they test memory only",
            copies,
            len(parts.test),
        )


def _preparation(store: ImageArray | ImageItems, section: DataSection) -> Preparation:
    channels = store.shape[2]
    wanted = section.channels or channels
    if wanted != channels and channels != 1:
        raise DataError(
            f"{section.source} has another number of channels than data.channels",
            found=str(channels),
            wanted=str(wanted),
            remedy=f"set data.channels: {channels}; only grey images can be repeated to more channels.",
        )
    mean, std = section.normalize.mean, section.normalize.std
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != wanted:
            raise DataError(
                f"data.normalize.{key} does not fit the images",
                found=f"{len(values)} numbers",
                wanted=f"{wanted}, one per channel",
                remedy=f"correct data.normalize.{key}, or set data.channels: {len(values)} for grey images.",
            )
    return Preparation(
        size=section.image_size,
        repeat=wanted // channels,
        mean=tuple(mean) if mean is not None else None,
        std=tuple(std) if std is not None else None,
        crop_padding=section.augment.crop_padding,
        horizontal_flip=section.augment.horizontal_flip,
        rotation=section.augment.rotation,
        zoom=section.augment.zoom,
    )


def _features(rows: Rows, encoding: Encoding | None, calibration: Split) -> Features:
    total = sum(x.double().sum(0) for x, _ in calibration.batches(_MEAN_BATCH))
    mean = (torch.as_tensor(total) / len(calibration)).float()
    if isinstance(rows, ImageRows):
        zero = rows.preparation.normalized(torch.zeros(mean.shape[0], 1, 1))
        return Features("image", (), (), zero, mean)
    assert encoding is not None
    categories = ((),) * len(encoding.numeric) + encoding.categories
    return Features("table", encoding.names, encoding.columns, torch.from_numpy(encoding.zero()), mean, categories)


def augmentation(section: AugmentSection) -> dict[str, Any]:
    """The section as stages depend on it; a key that came later counts only where it is used: older folders go on."""
    return section.model_dump(exclude=_unused(section))


def _unused(section: AugmentSection) -> set[str]:
    return {key for key in _LATER if getattr(section, key) == AugmentSection.model_fields[key].default}


def _fingerprint(source: Source, section: DataSection, parts: _Parts, pool: Rows, test: Rows) -> str:
    digest = hashlib.sha256()
    pool.digest(digest.update)
    if test is not pool:
        test.digest(digest.update)
    for labels in (source.labels, source.test_labels):
        digest.update(b"none" if labels is None else labels.tobytes())
    for positions in vars(parts).values():
        digest.update(f"{len(positions)}:".encode())
        digest.update(positions.astype(np.int64).tobytes())
    digest.update("\0".join(source.classes).encode())
    # the contents count, not where they lie
    unsaid: dict[str, Any] = {"source": True, "test_source": True, "augment": _unused(section.augment)}
    unsaid |= {"validation_from": True} if section.validation_from == "train" else {}
    digest.update(section.model_dump_json(exclude=unsaid).encode())
    return digest.hexdigest()
