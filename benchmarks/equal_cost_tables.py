"""Tables of students at equal cost: paired distances from ours, means over seeds, rows of several runs together.

A row's "hits" say of every test input whether it was answered rightly. In results they stand as text, so that rows of
several sittings can still be paired; the oldest rows have none, and keep the distances that they were written with.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causal_compress.understand.statistics import paired_drop


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are written: with their paired distance [pp] from ours of the same seed, where both have hits."""
    best = {(row["seed"], *_contest(row)): row["hits"] for row in rows if row["method"] == "ours"}
    return [_written(row, best.get((row["seed"], *_contest(row)))) for row in rows]


def _written(row: dict[str, Any], best: NDArray[np.bool_] | None) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("hits", "answers")}
    hits = row["hits"]
    if hits is None:
        return {"behind_ours_pp": None, "behind_ours_ci_pp": None, **kept}
    drop, interval = None, None
    if best is not None and row["method"] != "ours":
        drop, interval = paired_drop(int((best & ~hits).sum()), int((hits & ~best).sum()), len(hits))
    text = base64.b64encode(np.packbits(hits).tobytes()).decode()
    return {**kept, "behind_ours_pp": drop, "behind_ours_ci_pp": interval, "answers": text}


def _read(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a results file, with the hits that its text holds."""
    if "answers" not in row:
        return {**row, "hits": None}
    bits = np.frombuffer(base64.b64decode(row["answers"]), dtype=np.uint8)
    return {**row, "hits": np.unpackbits(bits, count=row["n"]).astype(bool)}


def _contest(row: dict[str, Any]) -> tuple[str, str, int]:
    """Students are compared with those of the same teacher, kind of cost and recovery."""
    return row["arch"], row["equal"], row["recovery_epochs"]


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method over all its seeds: mean accuracy, and its mean distance from ours, paired by seed and test image.

    Seeds share their test images, so an image counts once: with the mean over seeds of what was right on it. Intervals
    (normal, 95 %) say what chance of test images does; what chance of seeds does stands in the single rows.
    """
    kinds: dict[tuple[str, str, str, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["hits"] is not None:
            kinds.setdefault((row["method"], *_contest(row)), {})[row["seed"]] = row
    done = []
    for (method, *_), same in kinds.items():
        first, seeds = next(iter(same.values())), list(same)
        means = {
            key: round(float(np.mean([row[key] for row in same.values()])), 4) for key in ("accuracy_pct", "macs_kept")
        }
        best = kinds.get(("ours", *_contest(first)), {})
        distance = None
        if method != "ours" and set(seeds) <= set(best):
            rows_of = np.mean([best[seed]["hits"].astype(float) - same[seed]["hits"] for seed in seeds], axis=0)
            mean, half = float(100 * rows_of.mean()), float(196 * rows_of.std(ddof=1) / len(rows_of) ** 0.5)
            distance = [mean, mean - half, mean + half]
        done.append(
            {
                **{key: first[key] for key in ("arch", "equal", "method", "recovery_epochs")},
                **means,
                "seeds": len(seeds),
                "behind_ours_pp": distance and distance[0],
                "behind_ours_ci_pp": distance and distance[1:],
            }
        )
    return done


def together(before: Mapping[str, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """New rows and those of earlier runs beside them; a mean gives way to one of as many seeds."""
    known = {_name(row): _read(_with_place(row)) for row in map(_known_kind, before.get("rows", []))}
    known |= {_name(row): row for row in rows}
    means = {_name(row): row for row in map(_known_kind, before.get("over_seeds", []))}
    for row in pooled(list(known.values())):
        if row["seeds"] >= means.get(_name(row), {"seeds": 0})["seeds"]:
            means[_name(row)] = row
    written = compared(sorted(known.values(), key=_name))
    return {"rows": written, "over_seeds": sorted(means.values(), key=_name)}


def _known_kind(row: dict[str, Any]) -> dict[str, Any]:
    """A row from before latency could be what is equal."""
    return row if "equal" in row else {"arch": row["arch"], "equal": "macs", **row}


def _with_place(row: dict[str, Any]) -> dict[str, Any]:
    """A row from before students could recover elsewhere than they were made."""
    return {"recovered_on": row.get("cpu") if row["recovery_epochs"] else None, **row}


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of; ours first among its like."""
    method = row["method"]
    return row["arch"], row["equal"] != "macs", row["recovery_epochs"], row.get("seed"), method != "ours", method
