"""Rows of several runs in one results file: which replace which, and what several seeds say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]


def together(before: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """Rows of earlier runs and new ones; a new row takes the place of that of its size and seed.

    Args:
        before: What the results file holds.
        rows: What was measured now.
    """
    known = {_name(row): row for row in [*before, *rows]}
    return [known[name] for name in sorted(known)]


def _name(row: Row) -> tuple[float, int]:
    return row["target_removed_pct"], row["seed"]


def over_seeds(rows: Iterable[Row], settings: Sequence[str]) -> list[Row]:
    """Mean accuracy and mean drop wherever two seeds or more share a size and all settings.

    The interval (Student's t, 95 %) is about the mean over seeds: each has a teacher and a student of its own. Seeds
    share their test images; chance of those stands in the intervals of single rows.

    Args:
        rows: Of any sizes, settings and seeds.
        settings: Keys in which rows of one mean are alike, beside their size.
    """
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row.get(key) for key in ("target_removed_pct", *settings)), []).append(row)
    return [_mean(same, settings) for same in kinds.values() if len(same) > 1]


def _mean(rows: Sequence[Row], settings: Sequence[str]) -> Row:
    drops = np.array([row["drop_pp"] for row in rows])
    half = stats.t.ppf(0.975, len(drops) - 1) * drops.std(ddof=1) / math.sqrt(len(drops))
    return {
        "target_removed_pct": rows[0]["target_removed_pct"],
        **{key: rows[0].get(key) for key in settings},
        "seeds": len(rows),
        "most_params": max(row["params"] for row in rows),
        "accuracy_pct": float(np.mean([row["accuracy_pct"] for row in rows])),
        "drop_pp": float(drops.mean()),
        "drop_over_seeds_ci_pp": [float(drops.mean() - half), float(drops.mean() + half)],
        "largest_drop_pp": float(drops.max()),
    }
