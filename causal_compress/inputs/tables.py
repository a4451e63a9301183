"""Tables: files -> frames, columns by name, labels by class, and an encoding fitted on the training rows only."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.errors import DataError, MissingPackageError
from causal_compress.files import sha256_of_json

_MISSING = "<missing>"
_MAX_CATEGORIES = 1000
# What marks a missing text. None, NA, N/A and null, which pandas takes for missing, are names: no damage, Namibia.
# Numbers are read to the last bit, so that a table has one fingerprint; pandas does so by itself since 3.1, and warns
# where it is told to.
_EXACT = {"float_precision": "round_trip"} if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1) else {}
_NO_TEXT = ["", " ", "?", "nan", "NaN", "-nan", "-NaN", "<NA>", "#NA", "#N/A", "#N/A N/A"]
_NO_TEXT += [f"{sign}1.#{kind}" for sign in ("", "-") for kind in ("IND", "QNAN")]


@dataclass(frozen=True, eq=False)
class TableRows:
    """Encoded rows (float32) beside the raw ones (float64; categories as their index in the encoding, -1: unknown)."""

    encoded: NDArray[np.float32]
    raw: NDArray[np.float64]

    def inputs(self, positions: NDArray[np.int64], generator: torch.Generator | None) -> Tensor:
        """N x F float32; tables are not augmented."""
        del generator
        return torch.from_numpy(self.encoded[positions])

    def show(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """N x columns float64; missing numbers are NaN."""
        return self.raw[positions]

    def digest(self, update: Callable[[Any], None]) -> None:
        """Feed every byte to a hash."""
        update(np.ascontiguousarray(self.raw).data)


@dataclass(frozen=True)
class Encoding:
    """What was fitted: numeric columns first, then each categorical column's one-hot group.

    `fill`, `mean` and `std` belong to the numeric columns; `categories` to the categorical ones.
    """

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    fill: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    categories: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in encoded order."""
        return self.numeric + self.categorical

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """Encoded positions of each column."""
        widths = [1] * len(self.numeric) + [len(values) for values in self.categories]
        ends = np.cumsum(widths)
        return tuple(tuple(range(int(end) - width, int(end))) for end, width in zip(ends, widths, strict=True))

    @property
    def sha256(self) -> str:
        """Fingerprint: rows that are encoded by two of the same one are encoded alike."""
        # Nine digits: sums may be rounded otherwise on another machine.
        fitted = [[f"{value:.9g}" for value in values] for values in (self.fill, self.mean, self.std)]
        return sha256_of_json([self.numeric, self.categorical, fitted, self.categories])

    def zero(self) -> NDArray[np.float32]:
        """The encoded row whose numbers are 0 and that is in no category."""
        blank = np.zeros(sum(len(values) for values in self.categories))
        return np.concatenate([-self.mean / self.std, blank]).astype(np.float32)


def read_table(path: Path, kind: Literal["csv", "parquet"], *, header: bool, texts: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table; without a header its columns are called column_0, column_1, ...; durations become seconds.

    Args:
        path: The file.
        kind: What it is.
        header: Whether the first line of a csv file names the columns.
        texts: Columns of a csv file that are text even where every cell looks like a number.

    Raises:
        DataError: missing, empty or unreadable file; rows longer than the header.
        MissingPackageError: a parquet file without pyarrow.
    """
    if not path.is_file():
        raise DataError(
            f"the table {path} does not exist",
            remedy="check data.source; the path is relative to the folder in which the command runs.",
        )
    try:
        if kind == "parquet":
            frame = pd.read_parquet(path)
        else:
            if header:
                _check_width(path)
            known = {name if header else int(name.removeprefix("column_")): str for name in texts}
            frame = _read_csv(path, header=header, na_values=["?"], low_memory=False, dtype=known)
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path} needs the package pyarrow",
            found="not installed",
            remedy="pip install 'causal-compress[parquet]'",
        ) from error
    except (OSError, ValueError) as error:  # pandas' parser, empty-data, unicode and arrow errors are ValueErrors
        raise DataError(
            f"the table {path} can't be read as {kind}",
            found=str(error).strip()[:200],
            remedy=f"check that it is a {kind} file in UTF-8.",
        ) from error
    if frame.empty:
        raise DataError(f"the table {path} has no rows", remedy="check that the file is complete.")
    named = header or kind == "parquet"
    return _with_numbers(frame.set_axis([str(name) if named else f"column_{name}" for name in frame.columns], axis=1))


def _with_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Decimals, which databases write for money, as floats, and durations as seconds: both are numbers."""
    numbers = {}
    for name, column in frame.items():
        if column.dtype.kind == "m":
            numbers[str(name)] = column.dt.total_seconds()
        elif column.dtype == object and pd.api.types.infer_dtype(column, skipna=True) == "decimal":
            numbers[str(name)] = column.astype(np.float64)
    return frame.assign(**numbers) if numbers else frame


def _read_csv(path: Path, *, header: bool, **options: Any) -> pd.DataFrame:
    """Blanks after a comma, as in UCI's files, belong to no cell: ` ?` is a missing value and ` "a, b"` one text."""
    return pd.read_csv(path, header=0 if header else None, skipinitialspace=True, **_EXACT, **options)


def _check_width(path: Path) -> None:
    """Refuse first rows with more fields than names: pandas would take the surplus for row names and shift the rest."""
    try:
        _read_csv(path, header=False, nrows=2, dtype=str)
    except pd.errors.ParserError as error:
        if "Expected" not in str(error):
            raise
        raise DataError(
            f"the table {path} has rows with more fields than the header",
            found=str(error).strip()[:200],
            wanted="one name per field",
            remedy="remove the comma at the end of the rows, or name every column.",
        ) from error


def text_columns(frame: pd.DataFrame) -> tuple[str, ...]:
    """Columns whose cells are text, all of them."""
    return tuple(name for name in frame.columns if pd.api.types.infer_dtype(frame[name], skipna=True) == "string")


def with_names(frame: pd.DataFrame, path: Path, columns: Sequence[str], *, header: bool) -> pd.DataFrame:
    """A csv file's frame in which None, NA, N/A and null are texts in these columns, not missing values."""
    where = [number for number, name in enumerate(frame.columns) if name in columns and frame[name].isna().any()]
    if not where:
        return frame
    cells = _read_csv(path, header=header, usecols=where, dtype=str, keep_default_na=False, na_values=_NO_TEXT)
    frame = frame.copy()
    for place, number in enumerate(where):
        name = frame.columns[number]
        kept = frame[name].astype(object)
        frame[name] = kept.where(kept.notna(), cells.iloc[:, place].to_numpy(dtype=object))
    return frame


def find_column(frame: pd.DataFrame, reference: str | int, option: str, *, header: bool) -> str:
    """The frame's name of the column that the recipe means.

    Raises:
        DataError: no such column.
    """
    name = str(reference) if header else f"column_{str(reference).removeprefix('column_')}"
    if name in frame.columns:
        return name
    known = [str(column) for column in frame.columns]
    close = difflib.get_close_matches(name, known, n=1)
    wanted = f"one of {', '.join(known[:30])}" if header else f"a number from 0 to {len(known) - 1}"
    numbers = (
        " Columns are known by number only with data.header: false." if header and isinstance(reference, int) else ""
    )
    raise DataError(
        f"{option}: the table has no column {reference!r}",
        wanted=wanted + (", ..." if header and len(known) > 30 else ""),
        remedy=f"did you mean '{close[0]}'?" if close and header else f"name a column that is there.{numbers}",
    )


def class_names(target: pd.Series, groups: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Class names in the order of their labels: the groups' order, or sorted (numbers by value)."""
    if groups is not None:
        return tuple(groups)
    known = target.dropna().drop_duplicates()
    if not pd.api.types.is_numeric_dtype(known):
        known = known.map(text_of)
    return tuple(text_of(value) for value in sorted(known))


def class_labels(
    target: pd.Series, classes: Sequence[str], groups: Mapping[str, Any] | None, name: str
) -> NDArray[np.int64]:
    """Map a label column to 0..C-1.

    Raises:
        DataError: missing labels, or labels of no class.
    """
    if missing := int(target.isna().sum()):
        hint = " In a column of numbers NA, None and null are no labels; give such a class another name."
        raise DataError(
            f"{name}: {missing} rows have no label",
            wanted="a label in every row",
            remedy="remove those rows." + (hint if pd.api.types.is_numeric_dtype(target) else ""),
        )
    texts = target.map(text_of)
    table = {value: index for index, value in enumerate(classes)}
    others = None
    if groups is not None:
        table = {
            text_of(value): index for index, values in enumerate(groups.values()) if values != "*" for value in values
        }
        others = next((index for index, values in enumerate(groups.values()) if values == "*"), None)
    labels = texts.map(table)
    if others is not None:
        labels = labels.fillna(others)
    if labels.isna().any():
        strangers = sorted(texts[labels.isna()].unique())
        raise DataError(
            f"{name}: labels that belong to no class",
            found=", ".join(strangers[:12]) + (f" and {len(strangers) - 12} more" if len(strangers) > 12 else ""),
            wanted=f"one of {', '.join(table)}"[:300],
            remedy='put them into data.target_groups; "*" takes all others.',
        )
    numbers: NDArray[np.int64] = labels.to_numpy(dtype=np.int64)
    return numbers


def text_of(value: Any) -> str:
    """A cell as text; 1.0 and 1 are the same (missing values turn whole numbers into floats)."""
    return str(int(value)) if isinstance(value, float | np.floating) and float(value).is_integer() else str(value)


def guess_categorical(frame: pd.DataFrame) -> list[str]:
    """Columns that are not numbers."""
    return [str(name) for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]


def fit_encoding(
    frame: pd.DataFrame, categorical: Sequence[str], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Encoding:
    """Fit medians, means, standard deviations and categories.

    Args:
        frame: The training rows, and no others.
        categorical: Columns to one-hot encode; a missing value is a category of its own.
        mean: One number per numeric column instead of the fitted means.
        std: One number per numeric column instead of the fitted standard deviations.

    Returns:
        All that `encode` needs.

    Raises:
        DataError: text in a numeric column, infinity, far too many categories, normalize of the wrong length.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numeric = [str(name) for name in frame.columns if name not in set(categorical)]
    fill = fitted_mean = np.zeros(0)
    fitted_std = np.ones(0)
    if numeric:
        values = _numbers(frame, numeric)
        imputer = SimpleImputer(strategy="median", keep_empty_features=True).fit(values)
        with np.errstate(over="ignore", invalid="ignore"):  # `encode` refuses what comes of it
            scaler = StandardScaler().fit(imputer.transform(values))
        fill, fitted_mean, fitted_std = imputer.statistics_, scaler.mean_, scaler.scale_
        fill = np.nan_to_num(fill)  # a column without any value in the training rows
    categories: tuple[tuple[str, ...], ...] = ()
    if categorical:
        encoder = OneHotEncoder(handle_unknown="ignore").fit(_texts(frame, categorical))
        categories = tuple(tuple(str(value) for value in found) for found in encoder.categories_)
    _check_categories(categorical, categories)
    return Encoding(
        tuple(numeric),
        tuple(categorical),
        fill,
        fitted_mean if mean is None else _per_column(mean, numeric, "mean"),
        fitted_std if std is None else _per_column(std, numeric, "std"),
        categories,
    )


def encode(frame: pd.DataFrame, encoding: Encoding) -> TableRows:
    """Encode rows: numbers standardised (missing: the median), categories one-hot (unknown: all zero).

    Raises:
        DataError: text or infinity in a numeric column, or numbers too large to be standardised.
    """
    values = _numbers(frame, encoding.numeric)
    raw, parts = [values], [_standardised(values, encoding)]
    texts = _texts(frame, encoding.categorical)
    for column, known in enumerate(encoding.categories):
        codes = pd.Index(known).get_indexer(texts[:, column])
        raw.append(codes[:, None].astype(np.float64))
        parts.append((codes[:, None] == np.arange(len(known))).astype(np.float32))
    return TableRows(np.concatenate(parts, axis=1, dtype=np.float32), np.concatenate(raw, axis=1))


def _standardised(values: NDArray[np.float64], encoding: Encoding) -> NDArray[np.float64]:
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: NDArray[np.float64] = (np.where(np.isnan(values), encoding.fill, values) - encoding.mean) / encoding.std
    fitting = np.isfinite(encoding.mean) & np.isfinite(encoding.std)
    fitting &= (np.abs(scaled) <= np.finfo(np.float32).max).all(axis=0)
    if not fitting.all():
        column = int(np.argmin(fitting))
        raise DataError(
            f"the column '{encoding.numeric[column]}' holds numbers too large to be standardised",
            found=f"up to {np.nanmax(np.abs(values[:, column])):g}",
            wanted="numbers whose squares a float can hold, and at most 3e38 once standardised",
            remedy="take the logarithm or another unit, mend such cells, or list the column under data.drop.",
        )
    return scaled


def _numbers(frame: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
    values = np.empty((len(frame), len(names)))
    for column, name in enumerate(names):
        try:
            values[:, column] = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"the column '{name}' is not numeric",
                found=str(error)[:120],
                remedy="list it under data.categorical or data.drop; check data.header.",
            ) from error
    infinite = [name for column, name in enumerate(names) if np.isinf(values[:, column]).any()]
    if infinite:
        raise DataError(
            "the table holds infinity",
            found=f"in the columns {', '.join(infinite[:12])}",
            remedy="leave such cells empty, or drop the columns.",
        )
    return values


def _texts(frame: pd.DataFrame, names: Sequence[str]) -> NDArray[Any]:
    columns = [frame[name].astype(object).map(text_of, na_action="ignore").fillna(_MISSING) for name in names]
    return (
        np.stack([column.to_numpy(dtype=object) for column in columns], axis=1)
        if columns
        else np.empty((len(frame), 0))
    )


def _per_column(values: Sequence[float], numeric: Sequence[str], key: str) -> NDArray[np.float64]:
    if len(values) != len(numeric):
        raise DataError(
            f"data.normalize.{key} does not fit the table",
            found=f"{len(values)} numbers",
            wanted=f"{len(numeric)}, one per numeric column",
            remedy=f"set data.normalize.{key}: null to have it fitted on the training rows.",
        )
    return np.asarray(values, dtype=np.float64)


def _check_categories(names: Sequence[str], categories: Sequence[Sequence[str]]) -> None:
    for name, known in zip(names, categories, strict=True):
        if len(known) > _MAX_CATEGORIES:
            raise DataError(
                f"the column '{name}' has too many categories",
                found=f"{len(known)}, such as {', '.join(known[:3])}",
                wanted=f"at most {_MAX_CATEGORIES}",
                remedy="list an identifier under data.drop; in a column of numbers mend the cells that are text.",
            )
