"""Arrays as a source of inputs and labels, and the form that every source is brought to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from causal_compress.errors import DataError
from causal_compress.inputs.images import ImageArray, ImageItems, image_array

Labels = NDArray[np.int64]
Store: TypeAlias = "ImageArray | ImageItems | pd.DataFrame"


@dataclass(frozen=True, eq=False)
class Source:
    """What a source holds: a pool to split, perhaps a test part of its own; tables with their categorical columns."""

    pool: Store
    labels: Labels
    test: Store | None
    test_labels: Labels | None
    classes: tuple[str, ...]
    categorical: tuple[str, ...] = ()


def from_arrays(arrays: dict[str, NDArray[Any]], name: str) -> Source:
    """Make a source of x_train, y_train, x_test, y_test (or of x, y) and, optionally, the names in `classes`.

    Raises:
        DataError: arrays that are missing, not numeric, not finite, or that don't fit each other.
    """
    with_test = {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys()
    alone = next((pair for pair in (("x", "y"), ("x_train", "y_train")) if set(pair) <= arrays.keys()), None)
    half = {"x_test", "y_test"} & arrays.keys()
    if not with_test and (alone is None or half):
        raise DataError(
            f"{name} lacks arrays",
            found=", ".join(sorted(arrays)) or "none",
            wanted="x_train, y_train, x_test, y_test; or x, y, which are then split",
            remedy="rename the arrays or add those that are missing.",
        )
    x_key, y_key = ("x_train", "y_train") if with_test or alone is None else alone
    pool, labels = _stored(arrays[x_key], f"{name}: {x_key}"), labels_of(arrays[y_key], f"{name}: {y_key}")
    _check_lengths(arrays[x_key], labels, f"{name}: {x_key} and {y_key}")
    test, test_labels = None, None
    if with_test:
        test, test_labels = _stored(arrays["x_test"], f"{name}: x_test"), labels_of(arrays["y_test"], f"{name}: y_test")
        _check_lengths(arrays["x_test"], test_labels, f"{name}: x_test and y_test")
        if arrays["x_test"].shape[1:] != arrays[x_key].shape[1:]:
            raise DataError(
                f"{name}: x_train and x_test differ in shape",
                found=f"{arrays[x_key].shape[1:]} and {arrays['x_test'].shape[1:]}",
                remedy="bring both to the same shape.",
            )
        if (isinstance(pool, ImageArray) and isinstance(test, ImageArray)) and pool.values.dtype != test.values.dtype:
            raise DataError(
                f"{name}: x_train and x_test differ in scale",
                found=f"{arrays[x_key].dtype} and {arrays['x_test'].dtype}",
                remedy="store both as uint8, or both as floats of the same scale.",
            )
    classes = class_names(arrays.get("classes"), labels, test_labels, name)
    return Source(pool, labels, test, test_labels, classes)


def _stored(values: NDArray[Any], name: str) -> Store:
    if values.dtype.kind not in "uifb":
        raise DataError(f"{name} is not numeric", found=f"dtype {values.dtype}", remedy="convert it to numbers.")
    if values.ndim in (3, 4) and 0 not in values.shape[1:]:
        return image_array(values, name)
    if values.ndim != 2 or values.shape[1] == 0:
        raise DataError(
            f"{name} has no usable shape",
            found=str(values.shape),
            wanted="N x H x W or N x H x W x C (images), N x F (tables)",
            remedy="reshape the array.",
        )
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds NaN or infinity", remedy="remove or mend those rows, or use a csv: source.")
    return pd.DataFrame(values, columns=[f"feature_{index}" for index in range(values.shape[1])])


def labels_of(values: NDArray[Any], name: str) -> Labels:
    """One whole number per input, N or N x 1.

    Raises:
        DataError: anything else.
    """
    flat = values.reshape(-1) if values.ndim == 2 and values.shape[1] == 1 else values
    if flat.ndim != 1 or flat.dtype.kind not in "uifb" or not bool((flat == np.floor(flat)).all()):
        raise DataError(
            f"{name} are not integer labels",
            found=f"dtype {values.dtype}, shape {values.shape}",
            wanted="one whole number per input, 0..C-1",
            remedy="convert one-hot labels with y.argmax(1), names with numpy.unique(y, return_inverse=True)[1].",
        )
    return flat.astype(np.int64)


def _check_lengths(values: NDArray[Any], labels: Labels, name: str) -> None:
    if len(values) != len(labels):
        raise DataError(
            f"{name} differ in length", found=f"{len(values)} and {len(labels)}", remedy="give every input one label."
        )


def class_names(names: NDArray[Any] | None, labels: Labels, test_labels: Labels | None, name: str) -> tuple[str, ...]:
    """One name per class: the given ones, of which some may have no input; else the labels' numbers.

    Raises:
        DataError: no list of names, fewer names than classes; without names, labels with gaps.
    """
    present = np.unique(labels if test_labels is None else np.concatenate([labels, test_labels]))
    if names is None:
        _check_dense(present, name)
        return tuple(str(index) for index in range(len(present)))
    if names.ndim != 1:
        raise DataError(
            f"{name}: classes is no list of names",
            found=f"an array of shape {names.shape}",
            wanted="one name per class",
            remedy="write it as numpy.array(['first', 'second', ...]), in the order of the network's outputs.",
        )
    if len(present) and (present[0] < 0 or present[-1] >= len(names)):
        raise DataError(
            f"{name}: classes does not name every label",
            found=f"{len(names)} names, labels {present[0]}..{present[-1]}",
            wanted=f"labels 0..{len(names) - 1}" if present[0] < 0 else f"at least {present[-1] + 1} names",
            remedy="name all classes in the array `classes`, in the order of the network's outputs; labels start at 0.",
        )
    return tuple(str(value) for value in names)


def _check_dense(present: Labels, name: str) -> None:
    if len(present) and not np.array_equal(present, np.arange(len(present))):
        raise DataError(
            f"{name}: labels are not 0..C-1",
            found=f"{len(present)} different labels, {present[0]}..{present[-1]}",
            wanted=f"0..{len(present) - 1}, or an array `classes` with the name of every class",
            remedy="if the network has more classes, name all of them in the array `classes`, in the order of its "
            "outputs; else renumber the labels: numpy.unique(y, return_inverse=True)[1], as the network has them.",
        )
