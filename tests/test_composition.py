"""What is measured part by part is what the whole student does, for any plan; excluded modules stay."""

from __future__ import annotations

import copy
import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_plan import candidate, candidates, kept_whole
from test_surgery import assemble, front_at_input, merging, planned, traced
from tiny import Residual, images, random_norms
from torch import nn

from causal_compress.errors import SurgeryError
from causal_compress.recipe import PlanSection, PruneSection, RewriteSection
from causal_compress.results import Merge
from causal_compress.shrink import prune as pruning
from causal_compress.shrink.choice import Choice
from causal_compress.shrink.front import open_front
from causal_compress.shrink.measure import Sweep, measure
from causal_compress.shrink.parts import fitting_adapter
from causal_compress.shrink.plan import KINDS, best_path, price
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.widths import find_widths
from causal_compress.understand.cost import count_macs
from causal_compress.understand.network import is_allowed
from causal_compress.understand.trace import trace


class Summed(nn.Module):
    """Convolutions in front of and behind a residual pair of equal shape: any of them can stand for any span."""

    def __init__(self):
        super().__init__()
        self.stem, self.before = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.behind, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.before(torch.relu(self.stem(x))))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.fc(torch.relu(self.last(torch.relu(self.behind(x)))).mean((2, 3)))


def network_of(model):
    torch.manual_seed(0)
    return trace(random_norms(model()), images(2, 1, 6))


def probe():
    fit = list(images(128, 1, 6, 1).split(32))
    return Probe(fit, list(images(64, 1, 6, 2).split(32)), fit)


def measured(network, **section):
    """Candidates of a network all of whose sites count as equal."""
    sites = len(network.regions)
    plan = PlanSection.model_validate({"low_rank": False, "widths": [0.5], "min_channels": 2, **section})
    return measure(network, probe(), SimpleNamespace(cka=[[1.0] * sites] * sites), plan)


def some_plan(known, seed):
    """A random plan that the search could choose: each part writes what the next one reads."""
    chance = random.Random(seed)

    def onward(at, share):
        if at == known.regions:
            return [] if share == 1.0 else None
        rows = [row for row in known.rows if row.first == at and row.inputs_kept == share]
        for row in chance.sample(rows, len(rows)):
            shares = {1.0, *(o.inputs_kept for o in known.rows if row.narrows_output and o.first == row.last + 1)}
            for out in chance.sample(sorted(shares), len(shares)):
                if (rest := onward(row.last + 1, out)) is not None:
                    return [(row, out), *rest]
        return None

    steps = onward(0, 1.0)
    merges = [Merge(first=r.first, last=r.last, representative=r.representative, adapter=r.adapter) for r, _ in steps]
    plan = planned(merges)
    decisions = [
        dataclasses.replace(decision, candidate=row, outputs_kept=out)
        for decision, (row, out) in zip(plan.decisions, steps, strict=True)
    ]
    return dataclasses.replace(plan, decisions=tuple(decisions))


def carried_out(network, plan):
    fit, heldout = images(128, 1, 6, 1).split(32), images(64, 1, 6, 2).split(32)
    student, _, _ = rewrite(network, plan, open_front(network, fit, heldout, 4.0), RewriteSection())
    return prune(student, plan, open_front(network, fit, heldout, 4.0), PruneSection())


@pytest.mark.parametrize("model", [Summed, Residual])
def test_whatever_plan_is_chosen_the_student_is_what_its_parts_are(model):
    network = network_of(model)
    known = measured(network)
    plans = [some_plan(known, seed) for seed in range(12)]
    rows = [decision.candidate for plan in plans for decision in plan.decisions]
    assert any(row.first != row.last for row in rows)
    assert model is Residual or any(row.inputs_kept < 1.0 for row in rows)
    for plan in plans:
        carried_out(network, plan)  # refuses a student that differs from its parts


def test_behind_a_representative_that_adds_something_no_channel_goes_and_it_reads_all_of_them():
    network = network_of(Summed)
    residual = next(r.info.index for r in network.regions if "outer" in r.info.modules)
    section = PlanSection(min_channels=2)
    sweep = Sweep(network, probe(), find_widths(network, section), section)
    found = {}
    for first in range(len(network.regions) - 2):
        for representative in (first, first + 1):
            adapter, part = fitting_adapter(network, first, first + 1, representative)
            choice = Choice(sweep, first, first + 1, representative, adapter, part)
            found[first, representative] = choice.reads_cut(), choice.measured({}, 1.0).narrows_output
        sweep.advance()
    cuts = sweep.widths.cuts
    assert cuts.keys() == {residual - 2, residual + 1, residual + 2}
    for (first, representative), (reads, writes) in found.items():
        assert (reads and first - 1 in cuts) == (representative != residual and first - 1 in cuts)
        assert writes == (representative != residual and first + 1 in cuts)


def test_no_plan_reads_fewer_channels_than_the_part_before_can_write():
    narrow = candidate(1, 1, macs=(10, 0.0), inputs_kept=0.5)
    for out, wanted in ((0.0, None), (50.0, narrow)):
        writer = candidate(0, 0, macs=(100 - out, out))
        known = candidates([writer, *kept_whole(2)[1:], narrow], 2)
        path = best_path(known, price(known), np.eye(len(KINDS))[0], {"macs": 0.7})
        assert (path is None) == (wanted is None)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [("blocks.1", {"blocks.1.conv1", "blocks.1.conv2"}), ("*.conv1", {"blocks.0.conv1", "blocks.1.conv1"})],
)
def test_an_excluded_module_keeps_its_outputs_on_every_axis(pattern, layers):
    network = network_of(Residual)
    rows = measured(network, low_rank=True, exclude=[pattern], rank_errors=[0.3]).rows
    free = measured(network, low_rank=True, rank_errors=[0.3]).rows
    touched = [{*row.widths, *row.ranks} for row in rows]
    assert any(layers & {*row.widths, *row.ranks} for row in free)
    assert not any(layers & names for names in touched)
    homes = {r.info.index for r in network.regions if layers.intersection(r.info.modules)}
    assert not [row for row in rows if row.first != row.last and homes.intersection(range(row.first, row.last + 1))]
    assert [row for row in free if row.first != row.last and homes.intersection(range(row.first, row.last + 1))]


def test_a_pattern_speaks_for_all_inside_what_it_names():
    section = PlanSection(include=["layer1", "fc"], exclude=["layer1.0"])
    assert is_allowed("layer1.1.conv1", section)
    assert is_allowed("fc", section)
    assert not is_allowed("layer1.0.conv1", section)
    assert not is_allowed("layer10.conv1", section)
    assert not is_allowed("layer2", section)


def test_a_student_that_differs_from_its_parts_is_refused(monkeypatch):
    network = traced("residual")
    copied = pruning.copied

    def apart(student):
        own = copied(student)
        return dataclasses.replace(own, graph=copy.deepcopy(own.graph))  # refits of the parts won't reach the graph

    merges = merging(network, 1, 2)
    plan = planned(merges)
    prune(assemble(network, merges), plan, front_at_input(network, "residual"), PruneSection())
    monkeypatch.setattr(pruning, "copied", apart)
    with pytest.raises(SurgeryError, match=r"nats as a whole[\s\S]*plan\.exclude"):
        prune(assemble(network, merges), plan, front_at_input(network, "residual"), PruneSection())


class Joined(nn.Module):
    """A residual block that reads its own input beside a few channels of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.few = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.out, self.fc = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(x + self.out(torch.cat([x, torch.relu(self.few(x))], 1))).mean((2, 3)))


def test_a_student_costs_what_was_planned_where_channels_are_concatenated():
    network = network_of(Joined)
    known = measured(network, min_channels=1)
    assert any(row.ranks or row.widths or row.first < row.last for row in known.rows)
    for seed in range(6):
        plan = some_plan(known, seed)
        student, _, _ = carried_out(network, plan)
        out = [decision.outputs_kept for decision in plan.decisions]
        rows = [decision.candidate for decision in plan.decisions]
        planned_macs = sum(row.macs_fixed + kept * row.macs_out for row, kept in zip(rows, out, strict=True))
        assert count_macs(student.graph, images(1, 1, 6)) == pytest.approx(planned_macs, rel=1e-6)


class Flat(nn.Module):
    """Convolutions and a flattening head of two layers; behind a PReLU of one slope torch-pruning loses track."""

    def __init__(self, act):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8))
        self.hidden, self.fc = nn.Linear(8 * 36, 16), nn.Linear(16, 3)
        self.acts = nn.ModuleList([act() for _ in range(4)])

    def forward(self, x):
        for layer, act in zip((self.first, self.second, self.third), self.acts[:3], strict=True):
            x = act(layer(x))
        return self.fc(self.acts[3](self.hidden(torch.flatten(x, 1))))


@pytest.mark.parametrize(("act", "read"), [(nn.ReLU, True), (nn.PReLU, False)])
def test_a_merged_part_reads_fewer_channels_only_if_they_can_go_where_it_stands(act, read):
    network = network_of(lambda: Flat(act))
    known = measured(network)
    moved = [row for row in known.rows if row.inputs_kept < 1.0 and row.first < row.representative]
    assert bool(moved) == read
    plans = [some_plan(known, seed) for seed in range(60)]
    merged = [p for p in plans if any(d.candidate.inputs_kept < 1.0 and d.candidate in moved for d in p.decisions)]
    for plan in (merged or plans)[:5]:
        carried_out(network, plan)
