"""Images in folders and in torchvision's data sets."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from causal_compress.errors import DataError, UsageError
from causal_compress.inputs.arrays import Labels, Source, class_names, labels_of
from causal_compress.inputs.images import IMAGE_FAULTS, ImageArray, ImageItems, image_array, opened_image
from causal_compress.recipe import DataSection

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_HEAD_BYTES = 1 << 16
_FILE_LISTS = ("samples", "_samples", "imgs", "images", "_images", "_image_files", "image_files")
_HELD_OUT = ("test", "val", "valid", "validation")


def image_folder(root: Path, section: DataSection) -> Source:
    """One sub-folder per class, at the top or inside train/ and test/ (or val/), in any case; decoded when read.

    Raises:
        DataError: no folder, no classes, a class without images, or classes both beside train/ and in it.
    """
    if not root.is_dir():
        raise DataError(f"the folder {root} does not exist", remedy="check --data (data.source).")
    train, held_out = _parts(root)
    if train is None:
        files, labels, classes = _listed(root, None)
        return Source(_files(files, root, section), labels, None, None, classes)
    files, labels, classes = _listed(train, None)
    if held_out is None:
        return Source(_files(files, root, section), labels, None, None, classes)
    test_files, test_labels, _ = _listed(held_out, classes)
    pool = _files(files, root, section)
    test = _files(test_files, root, section, shape=pool.shape)
    return Source(pool, labels, test, test_labels, classes)


def _parts(root: Path) -> tuple[Path | None, Path | None]:
    """The folders of training and held-out images; none where the folders in `root` are the classes."""
    names = _folders(root)
    by_name = {name.lower(): root / name for name in names}  # in sorted order: `train` wins over `Train`
    train = by_name.get("train")
    if train is None:
        return None, None
    held_out = next((by_name[name] for name in _HELD_OUT if name in by_name), None)
    others = [name for name in names if name.lower() not in ("train", *_HELD_OUT)]
    if others and not _folders(train):
        return None, None  # images, no classes: `train` is itself a class, beside the others
    beside = [name for name in others if held_out is None and _images(root / name)]
    if beside:
        raise DataError(
            f"{train} can be the training part or a class",
            found=f"class folders in it, and images beside it in {', '.join(beside[:8])}",
            wanted="train/ and test/ with one sub-folder per class each, or one sub-folder per class and no other",
            remedy=f"move the folders beside it away; or, if '{train.name}' is a class, give that folder another name.",
        )
    return train, held_out


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """All images in the folder; what is hidden there is no image but a copy or a note of some program."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _listed(folder: Path, classes: tuple[str, ...] | None) -> tuple[list[Path], Labels, tuple[str, ...]]:
    found = _folders(folder)
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
        inside = _images(folder / name)
        if not inside:
            raise DataError(f"the class folder {folder / name} has no images", remedy="remove it, or put images there.")
        files += inside
        labels += [(classes or tuple(found)).index(name)] * len(inside)
    return files, np.asarray(labels, dtype=np.int64), classes or tuple(found)


def _files(
    files: list[Path], root: Path, section: DataSection, shape: tuple[int, int, int] | None = None
) -> ImageItems:
    identity = partial(_beginning, files, root)
    return _items(lambda i: Image.open(files[i]), identity, lambda i: str(files[i]), len(files), section, shape)


def _beginning(files: Sequence[Path], root: Path, index: int) -> bytes:
    """What tells a file from others: where it lies under the root, its size, its first bytes."""
    path = files[index]
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return f"{Path(os.path.relpath(path, root)).as_posix()}:{path.stat().st_size}:".encode() + head
    except OSError as error:
        raise DataError(f"the image {path} can't be read", found=str(error), remedy="mend or remove it.") from error


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
        with opened_image(lambda: open_image(0), name(0)) as first:
            width, height = first.size
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
    pool = _dataset_store(train, name, section, None)
    shape = pool.shape if isinstance(pool, ImageItems) else None
    return Source(
        pool,
        pool_labels,
        _dataset_store(test, name, section, shape),
        test_labels,
        _dataset_classes(getattr(train, "classes", None), pool_labels, test_labels, text),
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
        values = [_label(dataset, index, name) for index in range(len(dataset))]
    return labels_of(_array(values), f"the labels of torchvision's {name}")


def _label(dataset: Any, index: int, name: str) -> Any:
    try:
        return dataset[index][1]
    except IMAGE_FAULTS as error:
        raise DataError(
            f"the image {name}[{index}] can't be decoded", found=str(error), remedy="replace or remove the file."
        ) from error


def _dataset_classes(names: Any, labels: Labels, test_labels: Labels, name: str) -> tuple[str, ...]:
    most = max(int(part.max(initial=-1)) for part in (labels, test_labels))
    enough = isinstance(names, list | tuple) and len(names) > most
    return class_names(np.asarray([str(value) for value in names]) if enough else None, labels, test_labels, name)


def _dataset_store(
    dataset: Any, name: str, section: DataSection, shape: tuple[int, int, int] | None
) -> ImageArray | ImageItems:
    data = getattr(dataset, "data", None)
    if isinstance(data, np.ndarray | torch.Tensor) and len(data) == len(dataset):
        values = _array(data)
        if values.ndim == 4 and values.shape[1] in (1, 3) and values.shape[-1] not in (1, 3):
            values = values.transpose(0, 2, 3, 1)
        return image_array(values, f"torchvision's {name}")
    files = _dataset_files(dataset)
    return _items(
        lambda i: dataset[i][0],
        partial(_pixels, dataset, name) if files is None else partial(_beginning, files, Path(dataset.root)),
        lambda i: f"{name}[{i}]",
        len(dataset),
        section,
        shape,
    )


def _dataset_files(dataset: Any) -> list[Path] | None:
    """The file of each image, where a data set keeps such a list; None where it has none that is known."""
    for key in _FILE_LISTS:
        listed = getattr(dataset, key, None)
        if isinstance(listed, list | tuple) and listed and len(listed) == len(dataset):
            paths = [each[0] if isinstance(each, tuple) else each for each in listed]
            if all(isinstance(path, str | Path) for path in paths) and Path(paths[0]).is_file():
                return [Path(path) for path in paths]
    return None


def _pixels(dataset: Any, name: str, index: int) -> bytes:
    with opened_image(lambda: dataset[index][0], f"{name}[{index}]") as image:
        return hashlib.sha256(f"{image.mode}:{image.size}:".encode() + image.tobytes()).digest()


def _array(values: Any) -> NDArray[Any]:
    return values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
