"""Images in folders and in torchvision's data sets."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from causal_compress.errors import DataError, UsageError
from causal_compress.inputs.arrays import Labels, Source, class_names, dense_classes, labels_of
from causal_compress.inputs.images import ImageArray, ImageItems, image_array
from causal_compress.recipe import DataSection

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_HEAD_BYTES = 1 << 16


def image_folder(root: Path, section: DataSection) -> Source:
    """One sub-folder per class, at the top or inside train/ and test/ (or val/); decoded when read.

    Raises:
        DataError: no folder, no classes, a class without images.
    """
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist", remedy="check --data (data.source).")
    train = root / "train"
    if not train.is_dir():
        files, labels, classes = _listed(root, None)
        return Source(_files(files, root, section), labels, None, None, classes)
    held_out = next((root / name for name in ("test", "val", "valid", "validation") if (root / name).is_dir()), None)
    files, labels, classes = _listed(train, None)
    if held_out is None:
        return Source(_files(files, root, section), labels, None, None, classes)
    test_files, test_labels, _ = _listed(held_out, classes)
    pool = _files(files, root, section)
    test = _files(test_files, root, section, shape=pool.shape)
    return Source(pool, labels, test, test_labels, classes)


def _listed(folder: Path, classes: tuple[str, ...] | None) -> tuple[list[Path], Labels, tuple[str, ...]]:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(
            f"{folder} has no class folders",
            wanted="one sub-folder per class, with images in it",
            remedy="check --data.",
        )
    if classes is not None and (strangers := sorted(set(found) - set(classes))):
        raise DataError(
            f"{folder} has classes that train/ lacks",
            found=", ".join(strangers[:8]),
            remedy="remove these folders, or name them as in train/.",
        )
    files: list[Path] = []
    labels: list[int] = []
    for name in found:
        inside = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
        if not inside:
            raise DataError(f"the class folder {folder / name} has no images", remedy="remove it, or put images there.")
        files += inside
        labels += [(classes or tuple(found)).index(name)] * len(inside)
    return files, np.asarray(labels, dtype=np.int64), classes or tuple(found)


def _files(
    files: list[Path], root: Path, section: DataSection, shape: tuple[int, int, int] | None = None
) -> ImageItems:
    from PIL import Image

    def identity(index: int) -> bytes:
        with files[index].open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return f"{files[index].relative_to(root).as_posix()}:{files[index].stat().st_size}:".encode() + head

    return _items(lambda i: Image.open(files[i]), identity, lambda i: str(files[i]), len(files), section, shape)


def _items(
    open_image: Callable[[int], Image.Image],
    identity: Callable[[int], bytes],
    name: Callable[[int], str],
    count: int,
    section: DataSection,
    shape: tuple[int, int, int] | None,
) -> ImageItems:
    channels = 1 if section.channels == 1 else 3
    size = section.image_size
    if size is not None:
        shape = (size, size, channels)
    elif shape is None:
        try:
            with open_image(0) as first:
                width, height = first.size
        except (OSError, SyntaxError) as error:
            raise DataError(f"the image {name(0)} can't be decoded", found=str(error), remedy="replace it.") from error
        shape = (height, width, channels)
    return ImageItems(open_image, identity, name, count, shape, resize=size is not None)


def torchvision_dataset(text: str, section: DataSection) -> Source:
    """A class of torchvision.datasets that lies on disk already, as NAME:ROOT.

    Raises:
        UsageError: no such class.
        DataError: it isn't there, or can't be read.
    """
    from torchvision import datasets

    name, _, root = text.partition(":")
    kind = getattr(datasets, name, None)
    parameters = inspect.signature(kind).parameters if isinstance(kind, type) else {}
    known = [known for known in datasets.__all__ if known[0].isupper()]
    if kind is None or "root" not in parameters or not root:
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"data.source names no torchvision data set: {text!r}",
            wanted="torchvision:NAME:ROOT, such as torchvision:CIFAR10:data",
            remedy=f"did you mean '{close[0]}'?" if close and close[0] != name else "add the folder that holds it.",
        )
    train, test = (_torchvision_part(kind, root, parameters, part) for part in ("train", "test"))
    pool_labels, test_labels = (_dataset_labels(part, name) for part in (train, test))
    classes = dense_classes(pool_labels, test_labels, text)
    pool = _dataset_store(train, name, section, None)
    shape = pool.shape if isinstance(pool, ImageItems) else None
    return Source(
        pool,
        pool_labels,
        _dataset_store(test, name, section, shape),
        test_labels,
        class_names(getattr(train, "classes", None), classes),
    )


def _torchvision_part(kind: Any, root: str, parameters: Mapping[str, Any], part: Literal["train", "test"]) -> Any:
    arguments: dict[str, Any] = {"root": root} | ({"download": False} if "download" in parameters else {})
    if "train" in parameters:
        choices: list[dict[str, Any]] = [{"train": part == "train"}]
    else:
        choices = [{"split": part}] if part == "train" else [{"split": "test"}, {"split": "val"}]
    faults = []
    for choice in choices:
        try:
            return kind(**arguments, **choice)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            faults.append(str(error).splitlines()[0])
        except ImportError as error:
            raise DataError(
                f"torchvision's {kind.__name__} needs another package", found=str(error), remedy="install it."
            ) from error
    raise DataError(
        f"torchvision's {kind.__name__} has no usable {part} part in {root}",
        found="; ".join(faults),
        remedy=f'nothing is downloaded here; once: python -c "import torchvision; torchvision.datasets.{kind.__name__}'
        f'({root!r}, download=True)", or point to the right folder.',
    )


def _dataset_labels(dataset: Any, name: str) -> Labels:
    found = (getattr(dataset, key, None) for key in ("targets", "labels", "_labels"))
    values = next((value for value in found if value is not None and len(value) == len(dataset)), None)
    if values is None:
        values = [dataset[index][1] for index in range(len(dataset))]
    return labels_of(_array(values), f"the labels of torchvision's {name}")


def _dataset_store(
    dataset: Any, name: str, section: DataSection, shape: tuple[int, int, int] | None
) -> ImageArray | ImageItems:
    data = getattr(dataset, "data", None)
    if isinstance(data, np.ndarray | torch.Tensor) and len(data) == len(dataset):
        values = _array(data)
        if values.ndim == 4 and values.shape[1] in (1, 3) and values.shape[-1] not in (1, 3):
            values = values.transpose(0, 2, 3, 1)
        return image_array(values, f"torchvision's {name}")
    return _items(
        lambda i: dataset[i][0],
        lambda i: f"{name}:{i}".encode(),
        lambda i: f"{name}[{i}]",
        len(dataset),
        section,
        shape,
    )


def _array(values: Any) -> NDArray[Any]:
    return values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
