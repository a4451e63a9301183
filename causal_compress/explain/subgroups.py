"""Groups of inputs that the user names: does compression harm one more than another?"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from causal_compress.errors import DataError
from causal_compress.explain.paired import Pair, by_group, paired_interval
from causal_compress.inputs.callables import call, load_callable
from causal_compress.inputs.data import Data, Split
from causal_compress.results import GroupGaps, Skip

Rows = NDArray[np.int64]

FEWEST = 20
"""A gap over groups of fewer inputs is chance."""
MOST_GROUPS = 100
_MOST_VALUES = 10
_MISSING = "missing"


def gaps(
    pair: Pair, names: Sequence[str], column: str, resamples: int, seed: int
) -> tuple[GroupGaps | None, list[Skip]]:
    """Accuracy in each group before and after, and whether the gap between the best and the worst grew.

    Args:
        pair: Both classifiers' answers.
        names: The group of each input.
        column: What the groups are, for people.
        resamples: Of the bootstrap.
        seed: Of the resamples.

    Returns:
        Gaps over the groups that are large enough, and the others with a reason.

    Limits: the largest difference among many groups is large by chance alone, in teacher and student alike; read its
        growth, not its size.
    """
    found, codes = np.unique(np.asarray(names, dtype=str), return_inverse=True)
    counts = np.bincount(codes)
    if len(found) > MOST_GROUPS:
        reason = f"{len(found)} different values; at most {MOST_GROUPS} groups can be compared"
        return None, [Skip(what=f"gaps over {column}", reason=reason)]
    small = [
        Skip(what=f"group {found[i]} of {column}", reason=f"only {counts[i]} inputs, fewer than {FEWEST}")
        for i in np.flatnonzero(counts < FEWEST)
    ]
    large = np.flatnonzero(counts >= FEWEST)
    if len(large) < 2:
        reason = f"{len(large)} groups of at least {FEWEST} inputs; a gap needs two"
        return None, [*small, Skip(what=f"gaps over {column}", reason=reason)]
    was, still = pair.teacher.right(pair.labels), pair.student.right(pair.labels)

    def growth(rows: Rows) -> float:
        return _gap(still, codes, large, rows) - _gap(was, codes, large, rows)

    everyone = np.arange(len(codes))
    rows = by_group(pair, [(str(found[i]), np.flatnonzero(codes == i)) for i in large])
    return GroupGaps(
        column=column,
        rows=rows,
        fewest=FEWEST,
        teacher_gap_pp=_gap(was, codes, large, everyone),
        student_gap_pp=_gap(still, codes, large, everyone),
        growth_pp=paired_interval(growth, len(codes), resamples, seed),
    ), small


def _gap(right: NDArray[np.bool_], codes: Rows, groups: Rows, rows: Rows) -> float:
    """Best group's accuracy minus the worst's [pp]; a group that a resample misses does not count."""
    size = int(codes.max()) + 1
    counts = np.bincount(codes[rows], minlength=size)[groups]
    correct = np.bincount(codes[rows], weights=right[rows], minlength=size)[groups]
    return 100.0 * float(np.ptp(correct[counts > 0] / counts[counts > 0]))


def group_names(data: Data, split: Split, groups: str, batch_size: int) -> list[str]:
    """The group of each input of a split.

    Args:
        data: Column names and classes.
        split: The inputs.
        groups: A table's column; `class`; or FILE.py:CALLABLE, which is called batch by batch with `rows` (as
            `Split.show` gives them), `labels` and `positions` (in the source, or in its own test part), and gives one
            name for each row.
        batch_size: Rows handed to the callable at a time.

    Raises:
        DataError: no such column, or a callable that gives another number of groups than rows.
        UsageError: the callable can't be loaded or fails.
    """
    if groups in data.features.names:
        return _of_column(data, split, data.features.names.index(groups))
    if groups == "class":
        return [data.classes[label] for label in split.labels.tolist()]
    if ":" in groups:
        return _of_callable(split, groups, batch_size)
    known = [*data.features.names, "class"]
    close = difflib.get_close_matches(groups, known, n=1)
    raise DataError(
        f"audit.groups: no column '{groups}' is among the inputs",
        wanted=f"one of {', '.join(known[:30])}{', ...' if len(known) > 30 else ''}, or FILE.py:CALLABLE",
        remedy=f"did you mean '{close[0]}'?"
        if close
        else "name a column of the inputs; for any other (a dropped "
        "column, an attribute of images) give FILE.py:CALLABLE, which names the group of each row",
    )


def _of_column(data: Data, split: Split, column: int) -> list[str]:
    values = np.asarray(split.show(np.arange(len(split))), dtype=np.float64)[:, column]
    categories = data.features.categories[column] if data.features.categories else ()
    if categories:
        return [categories[int(value)] if value >= 0 else "unknown" for value in values]
    known = values[~np.isnan(values)]
    found = np.unique(known)
    if len(found) <= _MOST_VALUES:
        told = dict(zip(found.tolist(), _apart(found), strict=True))
        return [told.get(value, _MISSING) for value in values.tolist()]
    edges = np.unique(np.quantile(known, (0, 0.25, 0.5, 0.75, 1)))
    labels = [f"{low} to {high}" for low, high in pairwise(_apart(edges))]
    where = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(labels) - 1)
    return [_MISSING if np.isnan(value) else labels[i] for value, i in zip(values, where, strict=True)]


def _apart(values: NDArray[np.float64]) -> list[str]:
    """Different numbers in so many digits, at least six, that each is told well within the distance of any two; whole
    ones, which may be codes or dates, in full.
    """
    if (values == values.round()).all() and (abs(values) < 1e15).all():
        return [f"{value:.0f}" for value in values]
    near = float(np.diff(values).min()) / 10 if len(values) > 1 else 0.0
    for digits in range(6, 17):
        told = [f"{value:.{digits}g}" for value in values.tolist()]
        if all(abs(float(text) - value) <= near for text, value in zip(told, values.tolist(), strict=True)):
            return told
    return [repr(value) for value in values.tolist()]


def _of_callable(split: Split, text: str, batch_size: int) -> list[str]:
    function = load_callable(text, option="audit.groups")
    names: list[str] = []
    for start in range(0, len(split), batch_size):
        rows = np.arange(start, min(start + batch_size, len(split)))
        given = {"rows": split.show(rows), "labels": split.labels.numpy()[rows], "positions": split.positions[rows]}
        told = [str(name) for name in call(function, given, text=text, option="audit.groups")]
        if len(told) != len(rows):
            raise DataError(
                f"audit.groups: {text} must give one group for each row",
                found=f"{len(told)} groups for {len(rows)} rows",
                remedy="return a list or array as long as `rows`",
            )
        names.extend(told)
    return names
