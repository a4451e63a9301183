"""Minimal explanations: few features that suffice for a decision, and few without which it falls; always verified.

A set is *sufficient* when the network decides the same with all other features at the baseline, and *necessary* when it
decides otherwise with the set at the baseline. Both are found in the same way: the shortest beginning of the
attribution's order that holds, then features are left out as long as it still holds. It ends when every single feature
was left out in turn and none of them could be; each of these answers is the network's own, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_compress.explain.engine import Engine, Scene
from causal_compress.results import MinimalSet
from causal_compress.understand.intervene import Baseline

Kind = Literal["sufficient", "necessary"]


@dataclass
class _Search:
    """One input on its way: the set so far, and what it took."""

    row: int
    kept: list[int]
    forwards: int
    found: bool
    done: bool = False


def minimal_sets(
    engine: Engine,
    scene: Scene,
    order: Float[Tensor, "samples features"],
    *,
    kind: Kind,
    baseline: Baseline,
    classes: Sequence[str],
) -> tuple[MinimalSet, ...]:
    """For each input a set of features that is sufficient, or necessary, and of which no single one can be left out.

    Args:
        engine: The network; asked in float32.
        scene: Inputs, features and the baseline's values.
        order: Attribution of each feature to the decision; guides the search, and can't make its answer wrong.
        kind: What the set shall be.
        baseline: One of the scene's.
        classes: Names of the classes.

    Returns:
        One for each input, in order. `forwards` counts inputs run through the network for it, verification included.

    Limits: no *single* feature can be left out; another, smaller set may exist, since only exhaustive search could
        exclude that (2^features forwards).
    """
    asking = _Asking(engine, scene, kind, baseline)
    searches = _shortest_beginnings(asking, order.argsort(1, descending=True))
    while open_ := [search for search in searches if search.found and not search.done]:
        _leave_out(asking, open_)
    return tuple(_described(asking, search, classes) for search in searches)


class _Asking:
    """Puts sets of features to the network: does the decision hold (sufficient), or fall (necessary)?"""

    def __init__(self, engine: Engine, scene: Scene, kind: Kind, baseline: Baseline) -> None:
        self.engine, self.scene, self.kind, self.baseline = engine, scene, kind, baseline
        self.decisions: Int[Tensor, " samples"] = engine.answer(scene.x, exact=True).argmax(1).cpu()

    def margins(self, rows: Sequence[int], sets: Bool[Tensor, "cases features"]) -> Float[Tensor, " cases"]:
        """How clearly each set does what it shall: positive when it does."""
        logits = self.logits(rows, sets)
        own = self.decisions[list(rows)][:, None]
        best_other = logits.scatter(1, own, float("-inf")).max(1).values
        margin = logits.gather(1, own)[:, 0] - best_other
        # argmax takes the first of equal logits, so a tie keeps or loses the decision as the network itself would
        keeps = logits.argmax(1) == own[:, 0]
        margin = torch.where(keeps, margin.clamp_min(1e-12), margin.clamp_max(-1e-12))
        return margin if self.kind == "sufficient" else -margin

    def logits(self, rows: Sequence[int], sets: Bool[Tensor, "cases features"]) -> Tensor:
        """Answers with the sets kept (sufficient), or masked (necessary)."""
        masks = ~sets if self.kind == "sufficient" else sets
        size, where = self.engine.batch_size, torch.tensor(list(rows), dtype=torch.int64)
        parts = [
            self.engine.answer(self.scene.masked(where[at], masks[at], self.baseline), exact=True).cpu()
            for at in (slice(start, start + size) for start in range(0, len(where), size))
        ]
        return torch.cat(parts)

    def set_of(self, features: Sequence[int]) -> Bool[Tensor, " features"]:
        """As a row of flags."""
        flags = torch.zeros(len(self.scene.names), dtype=torch.bool)
        flags[list(features)] = True
        return flags


def _shortest_beginnings(asking: _Asking, order: Tensor) -> list[_Search]:
    """Ask every beginning of each input's order, the empty one included, and take the shortest that holds."""
    samples, features = order.shape
    rank = order.argsort(1)
    lengths = torch.arange(features + 1)
    sets = (rank[:, None, :] < lengths[None, :, None]).flatten(0, 1)
    rows = torch.arange(samples).repeat_interleave(features + 1).tolist()
    holds = asking.margins(rows, sets).view(samples, features + 1) > 0
    searches = []
    for row in range(samples):
        found = bool(holds[row].any())
        length = int(holds[row].int().argmax()) if found else 0
        searches.append(_Search(row, order[row, :length].tolist(), features + 2, found))
    return searches


def _leave_out(asking: _Asking, searches: list[_Search]) -> None:
    """One round: leave each feature out in turn; then of those that can go, as many at once as the set bears."""
    cases = [(search, feature) for search in searches for feature in search.kept]
    if cases:
        sets = torch.stack([asking.set_of([f for f in search.kept if f != feature]) for search, feature in cases])
        margins = asking.margins([search.row for search, _ in cases], sets).tolist()
    else:
        margins = []
    able: dict[int, list[tuple[float, int]]] = {search.row: [] for search in searches}
    for (search, feature), margin in zip(cases, margins, strict=True):
        if margin > 0:
            able[search.row].append((margin, feature))
    for search in searches:
        search.forwards += len(search.kept)
        search.done = not able[search.row]
    _leave_out_several(asking, [s for s in searches if not s.done], able)


def _leave_out_several(asking: _Asking, searches: list[_Search], able: dict[int, list[tuple[float, int]]]) -> None:
    """Leave out the easiest first, then the two easiest, and so on, all asked at once; the longest that holds goes."""
    cases: list[tuple[_Search, list[int]]] = []
    for search in searches:
        easiest = [feature for _, feature in sorted(able[search.row], reverse=True)]
        cases += [(search, easiest[:count]) for count in range(1, len(easiest) + 1)]
    if not cases:
        return
    sets = torch.stack([asking.set_of([f for f in search.kept if f not in gone]) for search, gone in cases])
    margins = asking.margins([search.row for search, _ in cases], sets).tolist()
    best: dict[int, list[int]] = {}
    for (search, gone), margin in zip(cases, margins, strict=True):
        search.forwards += 1
        if margin > 0 or len(gone) == 1:  # one alone was asked a moment ago
            best[search.row] = gone
    for search in searches:
        search.kept = [feature for feature in search.kept if feature not in best[search.row]]


def _described(asking: _Asking, search: _Search, classes: Sequence[str]) -> MinimalSet:
    """Ask once more, afresh, and write down what came."""
    decision = int(asking.decisions[search.row])
    after, verified = None, False
    if search.found:
        logits = asking.logits([search.row], asking.set_of(search.kept)[None])
        search.forwards += 1
        after = int(logits.argmax(1))
        verified = (after == decision) == (asking.kind == "sufficient")
    names = asking.scene.names
    return MinimalSet(
        kind=asking.kind,
        found=search.found,
        features=tuple(names[feature] for feature in sorted(search.kept)),
        positions=tuple(sorted(search.kept)),
        of=len(names),
        baseline=asking.baseline,
        decision=classes[decision],
        decision_after=None if after is None else classes[after],
        verified=verified,
        minimal=search.found and search.done,
        forwards=search.forwards,
        reason=_reason(asking, search, classes[decision]),
    )


def _reason(asking: _Asking, search: _Search, decision: str) -> str | None:
    if not search.found:
        return (
            f"no beginning of the order, all features included, makes the network leave {decision!r} at this baseline"
        )
    if not search.kept:
        return f"the baseline alone is answered with {decision!r}, so no feature is needed for it"
    return None
