"""Where data comes from: each kind of source brought to the same form, before any split."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from causal_compress.errors import DataError, UsageError
from causal_compress.inputs import tables
from causal_compress.inputs.arrays import Labels, Source, from_arrays, labels_of
from causal_compress.inputs.callables import call, load_callable
from causal_compress.inputs.image_sources import image_folder, torchvision_dataset
from causal_compress.inputs.images import ImageArray
from causal_compress.recipe import DataSection

_SCHEMES = ("npz", "imagefolder", "torchvision", "csv", "parquet", "sklearn")


def open_source(section: DataSection) -> Source:
    """Read the source that the recipe names.

    Args:
        section: The data section; splits, preprocessing and sizes are not this function's work.

    Returns:
        Stored inputs and labels 0..C-1.

    Raises:
        UsageError: no source, or one of an unknown kind.
        DataError: anything in the data that can't be used.
    """
    text = section.source
    if text is None:
        raise UsageError(
            "no data was given",
            wanted=", ".join(f"{name}:..." for name in _SCHEMES),
            remedy="add --data, or data.source in the recipe.",
        )
    scheme, _, rest = text.partition(":")
    if section.test_source is not None and scheme not in ("csv", "parquet"):
        raise UsageError(
            "data.test_source is for csv: and parquet: sources only",
            found=f"data.source: {text}",
            remedy="remove data.test_source.",
        )
    match scheme:
        case "npz":
            return from_arrays(_read_npz(Path(rest)), rest)
        case "imagefolder":
            return image_folder(Path(rest), section)
        case "torchvision":
            return torchvision_dataset(rest, section)
        case "csv" | "parquet":
            return _table_files(rest, scheme, section)
        case "sklearn":
            return _sklearn(rest)
        case _:
            return _own_callable(text)


def _own_callable(text: str) -> Source:
    place = text.rpartition(":")[0]
    if not place.endswith(".py") and "." not in place:
        close = difflib.get_close_matches(text.partition(":")[0], _SCHEMES, n=1)
        suffix = Path(text).suffix.removeprefix(".")
        guess = f"{close[0]}:..." if close and ":" in text else f"{suffix}:{text}" if suffix in _SCHEMES else ""
        raise UsageError(
            f"data.source is of no known kind: {text!r}",
            wanted=", ".join(f"{name}:..." for name in _SCHEMES) + " or FILE.py:CALLABLE",
            remedy=f"did you mean {guess}?" if guess else "put the kind before the path, such as npz:data.npz.",
        )
    made = call(load_callable(text, option="data.source"), {}, text=text, option="data.source")
    if isinstance(made, tuple | list) and len(made) == 4:
        made = dict(zip(("x_train", "y_train", "x_test", "y_test"), made, strict=True))
    if not isinstance(made, Mapping):
        raise DataError(
            f"{text} returned no data",
            found=type(made).__name__,
            wanted="a dict with x_train, y_train, x_test, y_test (or x, y), or these four as a tuple",
            remedy="return such a dict from the callable.",
        )
    return from_arrays({str(key): _as_array(value) for key, value in made.items()}, text)


def _as_array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise DataError(
            f"the file {path} does not exist",
            remedy="check --data (data.source); the path is relative to the folder in which the command runs.",
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # a lone .npy array has no .files (AttributeError) and is no context manager (TypeError)
        pickled = "allow_pickle" in str(error)
        raise DataError(
            f"{path} can't be read as .npz",
            found="pickled objects, which are never loaded" if pickled else str(error)[:160] or type(error).__name__,
            remedy="write it from plain arrays: numpy.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...).",
        ) from error


def _sklearn(name: str) -> Source:
    from sklearn import datasets

    loaders = {
        "digits": datasets.load_digits,
        "wine": datasets.load_wine,
        "breast_cancer": datasets.load_breast_cancer,
        "iris": datasets.load_iris,
    }
    if name not in loaders:
        close = difflib.get_close_matches(name, loaders, n=1)
        raise UsageError(
            f"scikit-learn ships no data set '{name}' for classification",
            wanted=f"one of {', '.join(loaders)}",
            remedy=f"did you mean '{close[0]}'?" if close else "choose one of these; nothing is downloaded.",
        )
    found = loaders[name]()
    labels = labels_of(found.target, name)
    classes = tuple(str(value) for value in found.target_names)
    if name == "digits":  # scans with grey levels 0..16
        return Source(ImageArray((found.images[..., None] / 16).astype(np.float32)), labels, None, None, classes)
    frame = pd.DataFrame(found.data, columns=[str(column) for column in found.feature_names])
    return Source(frame, labels, None, None, classes)


def _table_files(text: str, kind: Literal["csv", "parquet"], section: DataSection) -> Source:
    frame = tables.read_table(Path(text), kind, header=section.header)
    header = section.header or kind == "parquet"
    if section.target is None:
        raise DataError(
            "data.target is not set",
            found=f"columns {', '.join(map(str, frame.columns[:30]))}",
            remedy="name the label column: --set data.target=NAME (or its number with data.header: false).",
        )
    target = tables.find_column(frame, section.target, "data.target", header=header)
    dropped = {tables.find_column(frame, name, "data.drop", header=header) for name in section.drop}
    columns = [str(name) for name in frame.columns if name not in {target, *dropped}]
    if not columns:
        raise DataError("the table has no input columns", remedy="remove some names from data.drop.")
    categorical = _categorical(frame[columns], section, header)
    texts = () if kind == "parquet" else tables.text_columns(frame)
    names = () if kind == "parquet" else (*categorical, *_named_target(frame, target))
    frame = tables.with_names(frame, Path(text), names, header=section.header)
    groups = section.target_groups
    classes = tables.class_names(frame[target], groups)
    labels = tables.class_labels(frame[target], classes, groups, text)
    _check_groups(labels, classes, frame[target], text)
    test, test_labels = None, None
    if section.test_source is not None:
        path = section.test_source.removeprefix(f"{kind}:")
        test = tables.read_table(Path(path), kind, header=section.header, texts=texts)
        test = _same_columns(tables.with_names(test, Path(path), names, header=section.header), frame, path)
        test = _numbers_as_in_training(test, frame, (*categorical, target))
        test_labels = tables.class_labels(test[target], classes, groups, path)
        test = test[columns]
    return Source(frame[columns], labels, test, test_labels, classes, categorical)


def _numbers_as_in_training(test: pd.DataFrame, train: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A word in a test column leaves all of its cells text; where training has numbers, 01 and 1.0 stay 1."""
    changed = {}
    for name in columns:
        known = train[name].dtype
        if pd.api.types.is_numeric_dtype(known) and not pd.api.types.is_bool_dtype(known):
            cells = test[name].astype(object)
            where = pd.to_numeric(cells, errors="coerce").notna()
            # converted anew without the words: whole numbers beyond 2^53 then stay exact
            cells[where] = pd.to_numeric(cells[where]).astype(object)
            changed[name] = cells
    return test.assign(**changed)


def _named_target(frame: pd.DataFrame, target: str) -> tuple[str, ...]:
    """The label column if its labels are words; among numbers NA stays a missing label."""
    numbers = pd.api.types.is_numeric_dtype(frame[target]) and bool(frame[target].notna().any())
    return () if numbers else (target,)


def _categorical(inputs: pd.DataFrame, section: DataSection, header: bool) -> tuple[str, ...]:
    if section.categorical is None:
        return tuple(tables.guess_categorical(inputs))
    named = [tables.find_column(inputs, name, "data.categorical", header=header) for name in section.categorical]
    return tuple(dict.fromkeys(named))


def _check_groups(labels: Labels, classes: tuple[str, ...], target: pd.Series, name: str) -> None:
    empty = [classes[index] for index in sorted(set(range(len(classes))) - set(np.unique(labels).tolist()))]
    if empty:
        there = sorted({tables.text_of(value) for value in target.drop_duplicates()})
        raise DataError(
            f"{name}: no row belongs to the class '{empty[0]}'",
            found=f"labels {', '.join(there[:20])}" + (", ..." if len(there) > 20 else ""),
            remedy="correct the labels listed in data.target_groups.",
        )


def _same_columns(test: pd.DataFrame, train: pd.DataFrame, name: str) -> pd.DataFrame:
    missing = [str(column) for column in train.columns if column not in test.columns]
    if missing or (len(test.columns) != len(train.columns)):
        raise DataError(
            f"the test table {name} has other columns than the training table",
            found=f"{len(test.columns)} columns" + (f", without {', '.join(missing[:8])}" if missing else ""),
            wanted=f"the same {len(train.columns)}",
            remedy="check data.test_source and data.header.",
        )
    return test
