"""What each part of the product is worth: students of ResNet-20 (or --arch) at equal MACs, with one part left out.

    python benchmarks/ablation.py --weights resnet20-12fca82f.th --data cifar10.npz --work runs/peers
    python benchmarks/ablation.py --arch resnet56 --weights resnet56-4bfd9763.th --macs 0.4708 --seeds 0 ...

All variants start from one analysis of a seed; the one without intervened inputs measures its candidates anew. How
students recover and are read is said in equal_cost.py. Writes results/ablation.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from equal_cost import Case, Method, Pairs, carry_out, ours, out_of_reach, run
from torch import Tensor, nn

from causal_compress.recipe import BudgetSection
from causal_compress.shrink.measure import measure
from causal_compress.shrink.plan import make_plan
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.refit import Solution, fit


def without_rivals(case: Case, **changes: Any) -> tuple[nn.Module, Pairs]:
    """The plan of least predicted harm, not compared with one without merges; some settings of the plan changed."""
    if case.equal != "macs":
        raise out_of_reach(case, "a plan that counts MACs")
    section = case.recipe.plan.model_copy(update=changes)
    budget = BudgetSection(macs=case.limit)
    return carry_out(case, make_plan(case.candidates, case.effects, case.groups, budget, section))


def with_settings(case: Case, section: str, **changes: Any) -> tuple[nn.Module, Pairs]:
    """Ours with some settings of the recipe changed."""
    changed = getattr(case.recipe, section).model_copy(update=changes)
    return ours(replace(case, recipe=case.recipe.model_copy(update={section: changed})))


def by_similarity(case: Case) -> tuple[nn.Module, Pairs]:
    """Merges alone, each thought to do as much harm as its CKA falls short of 1; no harm is measured."""
    cka = case.effects.cka
    rows = tuple(
        replace(row, harm_kl=sum(1 - cka[site][row.last] for site in range(row.first, row.last)))
        for row in case.candidates.rows
    )
    known = replace(case, candidates=replace(case.candidates, rows=rows))
    return without_rivals(known, width=False, low_rank=False)


def without_interventions(case: Case) -> tuple[nn.Module, Pairs]:
    """Candidates fitted and scored on plain inputs alone, as is what the surgery is read on."""
    chunk, held = len(case.probe.heldout[0]), len(case.probe.heldout)
    plain = [x for x, _ in case.data.calibration.batches(chunk, limit=chunk * held)]
    probe = Probe(case.probe.surgery[: len(case.probe.fit)], plain, case.probe.surgery)
    candidates = measure(case.network, probe, case.effects, case.recipe.plan)
    return ours(replace(case, probe=probe, candidates=candidates))


def without_borrowing(case: Case) -> tuple[nn.Module, Pairs]:
    """Merged regions keep the channels of one of them; their candidates are measured anew."""
    section = case.recipe.plan.model_copy(update={"borrow": False})
    candidates = measure(case.network, case.probe, case.effects, section)
    return ours(replace(case, candidates=candidates, recipe=case.recipe.model_copy(update={"plan": section})))


@contextmanager
def random_channels(case: Case) -> Iterator[None]:
    """Which channels stay is drawn, how many is planned; everything is repaired as ever."""
    generator = torch.Generator().manual_seed(case.recipe.seed)

    def drawn(readers: Any, counts: Any, penalty: float) -> dict[int, Tensor]:
        order = torch.randperm(len(readers[0][2]), generator=generator)
        return {count: order[:count].sort().values for count in counts}

    with patch("causal_compress.shrink.prune.kept_channels", drawn):
        yield


@contextmanager
def largest_channels(case: Case) -> Iterator[None]:
    """The channels with the largest weights in their readers stay (L1); everything is repaired as ever."""

    def largest(readers: Any, counts: Any, penalty: float) -> dict[int, Tensor]:
        sizes = torch.stack([weight[columns].abs().sum((1, 2)) for _, weight, columns in readers]).sum(0)
        order = sizes.argsort(descending=True)
        return {count: order[:count].sort().values for count in counts}

    with patch("causal_compress.shrink.prune.kept_channels", largest):
        yield


@contextmanager
def no_refit(case: Case) -> Iterator[None]:
    """Layers keep their weights: what is removed is replaced by its mean alone, which moves into the next bias."""

    def unchanged(train: Any, heldout: Any, penalties: Any, prior: Any = None) -> Solution:
        if prior is None:  # an adapter, which has no weights yet
            return fit(train, heldout, penalties)
        both = train + heldout
        return Solution(prior, both.bias(prior) if hasattr(both, "bias") else _bias(both, prior), 0.0, 0.0)

    with patch("causal_compress.shrink.repair.fit", unchanged):
        yield


def _bias(rows: Any, weight: Tensor) -> Tensor:
    found: Tensor = rows.t.double().mean(0) - rows.z.double().mean(0) @ weight
    return found


@contextmanager
def no_drift(case: Case) -> Iterator[None]:
    """Inner layers keep their weights: only what reads fewer channels is refitted, and each region's last layer."""
    with patch("causal_compress.shrink.prune._Work._absorb_drift", lambda *_: None):
        yield


@contextmanager
def no_rectified(case: Case) -> Iterator[None]:
    """Refits don't look behind rectifiers."""
    with patch("causal_compress.shrink.prune.RECTIFIED_ROUNDS", 0):
        yield


def within(change: Callable[[Case], AbstractContextManager[None]]) -> Method:
    """Ours, made while something is changed."""

    def made(case: Case) -> tuple[nn.Module, Pairs]:
        with change(case):
            return ours(case)

    return made


METHODS: dict[str, Method] = {
    "ours": ours,
    "no trial of a plan without merges": without_rivals,
    "no low rank": lambda case: with_settings(case, "plan", low_rank=False),
    "no borrowing": without_borrowing,
    "no merges": lambda case: with_settings(case, "plan", depth=False),
    "no narrowing": lambda case: with_settings(case, "plan", width=False),
    "width alone": lambda case: with_settings(case, "plan", low_rank=False, depth=False),
    "low rank alone": lambda case: with_settings(case, "plan", width=False, depth=False),
    "depth alone": lambda case: with_settings(case, "plan", low_rank=False, width=False),
    "depth alone, by CKA": by_similarity,
    "no intervened inputs": without_interventions,
    "channels by L1": within(largest_channels),
    "random channels": within(random_channels),
    "no refit": within(no_refit),
    "no refit of inner layers": within(no_drift),
    "no rectified refit": within(no_rectified),
    "no refit of the classifier": lambda case: with_settings(case, "prune", head_refit="never"),
}

if __name__ == "__main__":
    run(METHODS, __doc__, "ablation")
