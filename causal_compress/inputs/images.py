"""Images: kept as they were stored until a batch is made of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from causal_compress.errors import DataError
from causal_compress.provenance import cores

log = logging.getLogger(__name__)

# What Pillow raises on broken, cut and far too large files; its bomb error is a plain Exception.
IMAGE_FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_BLOCK = 1024
_DECODERS = 4  # at least
Positions = NDArray[np.int64]


@contextmanager
def opened_image(open_image: Callable[[], Image.Image], name: str) -> Iterator[Image.Image]:
    """Open one image whose pixels fit into 8 bits; Pillow's faults inside the block name the image, too.

    Args:
        open_image: Gives the image, as Pillow opens it.
        name: What to call it in error messages.

    Raises:
        DataError: a file that can't be read or decoded; 16-bit or float pixels, which Pillow would clip to 0..255.
    """
    try:
        with open_image() as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{name} is a 16-bit or float image, which 8 bits can't hold",
                    found=f"pixels of Pillow's mode {image.mode}",
                    wanted="8 bits per channel",
                    remedy="scale the images to 0..255 and store 8 bits, or keep their floats in an array: npz:FILE.",
                )
            yield image
    except IMAGE_FAULTS as error:
        raise DataError(
            f"the image {name} can't be decoded",
            found=str(error),
            remedy="replace or remove the file; store an image that is too large smaller.",
        ) from error


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Images in memory, N x H x W x C: uint8, or float32 that is taken as it stands."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        _, height, width, channels = self.values.shape
        return height, width, channels

    def read(self, positions: Positions) -> NDArray[Any]:
        """The images at `positions`, N x H x W x C."""
        return self.values[positions]

    def digest(self, update: Callable[[Any], None]) -> None:
        """Feed every byte to a hash."""
        for start in range(0, len(self.values), _BLOCK):
            update(np.ascontiguousarray(self.values[start : start + _BLOCK]).data)


@dataclass(frozen=True, eq=False)
class ImageItems:
    """Images that are decoded when they are read; `shape` is what they are brought to (short side, centre crop)."""

    open: Callable[[int], Image.Image]
    identity: Callable[[int], bytes]
    name: Callable[[int], str]
    count: int
    shape: tuple[int, int, int]
    resize: bool

    def read(self, positions: Positions) -> NDArray[np.uint8]:
        """Decode the images at `positions`, N x H x W x C."""
        with ThreadPoolExecutor(max(_DECODERS, cores())) as pool:  # Pillow decodes without the interpreter's lock
            return np.stack(list(pool.map(self._decode, positions.tolist())))

    def digest(self, update: Callable[[Any], None]) -> None:
        """Feed each item's identity to a hash."""
        for index in range(self.count):
            update(self.identity(index))

    def _decode(self, index: int) -> NDArray[np.uint8]:
        height, width, channels = self.shape
        with opened_image(lambda: self.open(index), self.name(index)) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
        if self.resize:
            image = _fit(image, height)
        if image.size != (width, height):
            raise DataError(
                f"the image {self.name(index)} has another size than the first one",
                found=f"{image.size[0]} x {image.size[1]}",
                wanted=f"{width} x {height}",
                remedy="set data.image_size: images are then resized (short side) and cropped (centre).",
            )
        return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def _fit(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), 2, reducing_gap=None).crop((left, top, left + size, top + size))  # 2: bilinear


@dataclass(frozen=True)
class Preparation:
    """How stored images become inputs: size, grey to colour, augmentation in pixels, normalisation."""

    size: int | None
    repeat: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop_padding: int
    horizontal_flip: bool
    rotation: float = 0.0
    zoom: float = 1.0

    @property
    def copied_channels(self) -> int:
        """How many equal channels come out of a grey image; 1 where normalisation makes them differ, or of colours."""
        alike = all(values is None or len(set(values)) == 1 for values in (self.mean, self.std))
        return self.repeat if alike else 1

    def prepared(self, images: NDArray[Any], generator: torch.Generator | None) -> Tensor:
        """N x H x W x C as stored -> N x C x H x W float32, normalised; augmented if a generator is given."""
        x = self._augmented(images, generator)
        if self.copied_channels > 1:  # once for all copies
            return self.normalized(x, channels=1).repeat(1, self.repeat, 1, 1)
        return self.normalized(self._repeated(x))

    def scaled(self, images: NDArray[Any]) -> Tensor:
        """N x H x W x C as stored -> N x C x H x W float32 in [0, 1]."""
        return self._repeated(self._augmented(images, None))

    def _repeated(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.repeat, 1, 1) if self.repeat > 1 else x.contiguous()

    def _augmented(self, images: NDArray[Any], generator: torch.Generator | None) -> Tensor:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            x = _resize(_unit(x), self.size)
        if generator is not None and (self.rotation or self.zoom > 1):
            x = _random_warp(_unit(x), self.rotation, self.zoom, generator)
        if generator is not None and self.crop_padding:
            x = _random_crop(x, self.crop_padding, generator)
        if generator is not None and self.horizontal_flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
        return _unit(x)

    def normalized(self, x: Tensor, channels: int | None = None) -> Tensor:
        """Subtract the mean and divide by the standard deviation of each channel, or of the first ones alone."""
        if self.mean is not None:
            x = x - torch.tensor(self.mean[:channels]).view(-1, 1, 1)
        if self.std is not None:
            x = x / torch.tensor(self.std[:channels]).view(-1, 1, 1)
        return x


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Stored images together with their preparation."""

    store: ImageArray | ImageItems
    preparation: Preparation

    def inputs(self, positions: Positions, generator: torch.Generator | None) -> Tensor:
        """N x C x H x W float32, normalised; augmented if a generator is given."""
        return self.preparation.prepared(self.store.read(positions), generator)

    def show(self, positions: Positions) -> NDArray[Any]:
        """N x H x W x C uint8 at the size the network sees; values outside [0, 1] are first scaled into it."""
        x = self.preparation.scaled(self.store.read(positions)).permute(0, 2, 3, 1).numpy()
        low, high = min(float(x.min(initial=0.0)), 0.0), max(float(x.max(initial=1.0)), 1.0)
        shown: NDArray[np.uint8] = np.rint((x - low) / (high - low) * 255).astype(np.uint8)
        return shown

    def digest(self, update: Callable[[Any], None]) -> None:
        """Feed contents to a hash."""
        self.store.digest(update)


def _unit(x: Tensor) -> Tensor:
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def _resize(x: Tensor, size: int) -> Tensor:
    scale = size / min(x.shape[-2:])
    height, width = (max(size, round(side * scale)) for side in x.shape[-2:])
    x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    top, left = (height - size) // 2, (width - size) // 2
    return x[..., top : top + size, left : left + size]


def _random_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Zero-pad, then cut a window of the old size out of each image; all windows are views, one gather picks them."""
    n, _, height, width = x.shape
    windows = F.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, top, left]


def _random_warp(x: Tensor, rotation: float, zoom: float, generator: torch.Generator) -> Tensor:
    """Turn each image about its centre by up to so many degrees and zoom it by up to a factor; zeros beyond its edges.

    Angles are uniform, zooms uniform in their logarithm.
    """
    n, _, height, width = x.shape
    turn, power = 2 * torch.rand(2, n, generator=generator) - 1
    angle, size = (turn * math.radians(rotation)).view(n, 1, 1), (zoom**power).view(n, 1, 1)
    cos, sin = angle.cos() / size, angle.sin() / size
    across, down = _centres(width).view(1, 1, width), _centres(height).view(1, height, 1)
    sources = torch.empty(n, height, width, 2)  # in halves of a side, from the centre
    torch.add(cos * across, -sin * height / width * down, out=sources[..., 0])
    torch.add(sin * width / height * across, cos * down, out=sources[..., 1])
    return F.grid_sample(x, sources, align_corners=False)


def _centres(count: int) -> Tensor:
    """Of so many pixels side by side, between -1 and 1."""
    return (2 * torch.arange(count) + 1) / count - 1


def image_array(values: NDArray[Any], name: str) -> ImageArray:
    """Bring an array of images into the stored form.

    Args:
        values: N x H x W or N x H x W x C. Whole numbers in 0..255 become uint8; other floats are taken as inputs
            that somebody has scaled already.
        name: What to call the array in error messages.

    Raises:
        DataError: channels that aren't last, NaN or infinity, whole numbers outside 0..255.
    """
    if values.ndim == 3:
        values = values[..., None]
    height, width, channels = values.shape[1:]
    if channels > 4 and channels >= min(height, width):
        swapped = "; this looks like N x C x H x W" if height <= 4 else ""
        raise DataError(
            f"{name} has no plausible channel count",
            found=f"shape {values.shape}{swapped}",
            wanted="N x H x W or N x H x W x C",
            remedy="put the channels last: x.transpose(0, 2, 3, 1).",
        )
    if np.issubdtype(values.dtype, np.integer) and values.size and 0 < values.max() <= 1:
        log.warning(
            "%s has no larger whole number than 1, and 255 counts as white: if 1 is white, store booleans or floats",
            name,
        )
    if values.dtype == np.uint8:
        return ImageArray(values)
    for start in range(0, len(values), _BLOCK):
        if not np.isfinite(values[start : start + _BLOCK]).all():
            raise DataError(f"{name} holds NaN or infinity", remedy="remove or mend those images.")
    return ImageArray(_as_stored(values, name))


def _as_stored(values: NDArray[Any], name: str) -> NDArray[Any]:
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    is_integer = np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_
    whole = is_integer or (high > 1 and bool((values == np.rint(values)).all()))
    if whole and low >= 0 and high <= 255 and values.dtype != np.bool_:
        return values.astype(np.uint8)
    if is_integer and values.dtype != np.bool_:
        raise DataError(
            f"{name} holds whole numbers outside 0..255",
            found=f"{low:g}..{high:g}",
            remedy="scale the images to uint8, or to floats in [0, 1].",
        )
    return values.astype(np.float32)
