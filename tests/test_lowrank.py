"""Low ranks: planted ones are found, split layers compute the same, costs are those of the network that comes out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_surgery import answers, front_at_input, harm, inputs_of, planned, singles, traced, weights_of
from tiny import Residual, images, random_norms
from torch import nn

from causal_compress.recipe import PlanSection, PruneSection
from causal_compress.results import Factor
from causal_compress.shrink.choice import Choice
from causal_compress.shrink.lowrank import components, cost_share, reduced, split
from causal_compress.shrink.measure import Sweep, measure
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.ranks import spectra, thinned, with_ranks
from causal_compress.shrink.refit import NormalEquations
from causal_compress.shrink.surgery import assemble, replay
from causal_compress.shrink.widths import find_widths
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.trace import trace


def rows(features=6, targets=4, count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, features, generator=generator) @ torch.randn(features, features, generator=generator)
    sums = NormalEquations(features, targets)
    sums.add(z + 1.0, torch.zeros(count, targets))
    return sums, z + 1.0, torch.randn(features, targets, generator=generator).double()


def planted(rank=3):
    """A residual network whose second block's convolutions put out few components, and its sweep."""
    model = random_norms(Residual())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and "blocks.1" in name:
                weight = layer.weight.flatten(1)
                basis = torch.linalg.qr(torch.randn(len(weight), rank, generator=generator))[0]
                layer.weight.copy_((basis @ basis.T @ weight).reshape(layer.weight.shape))
    return trace(model, images(2, 1, 6))


def sweep_of(network, section):
    fit, heldout = list(images(128, 1, 6, 1).split(32)), list(images(64, 1, 6, 2).split(32))
    return Sweep(network, Probe(fit, heldout, fit), find_widths(network, section), section)


def test_components_are_those_of_the_output():
    sums, z, weight = rows()
    found = components(sums, weight)
    outputs = z.double() @ weight
    variances = (outputs - outputs.mean(0)) @ found.basis
    share = variances.square().mean(0) / variances.square().mean(0).sum()
    torch.testing.assert_close(found.left, 1 - torch.cat([torch.zeros(1), share.cumsum(0)]), atol=1e-6, rtol=0)
    assert found.left[0] == 1.0
    assert bool((share[:-1] >= share[1:] - 1e-9).all())


def test_no_other_map_of_that_rank_is_nearer_on_the_data():
    sums, z, weight = rows()
    bias = torch.arange(4.0).double()
    found = components(sums, weight)
    low, shift = reduced(sums, weight, bias, found.basis[:, :2])
    truth, got = z.double() @ weight + bias, z.double() @ low + shift
    assert torch.linalg.matrix_rank(low) == 2
    torch.testing.assert_close(got.mean(0), truth.mean(0), atol=1e-5, rtol=1e-5)
    error = (got - truth).square().sum() / (truth - truth.mean(0)).square().sum()
    assert float(error) == pytest.approx(float(found.left[2]), abs=1e-6)
    for seed in range(20):
        other = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)).double())[0]
        rival, moved = reduced(sums, weight, bias, other)
        assert (z.double() @ rival + moved - truth).square().sum() >= (got - truth).square().sum()


def test_ranks_are_multiples_and_at_least_one():
    sums, _, weight = rows()
    found = components(sums, weight)
    assert found.rank_for(0.999999, 1) == 1
    assert found.rank_for(1e-9, 1) == 4
    assert found.rank_for(0.999999, 8) == 8
    assert cost_share(9 * 16, 16, 4) == pytest.approx((9 * 16 * 4 + 4 * 16) / (9 * 16 * 16))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(3, 5, (1, 3), dilation=2, bias=False), nn.Linear(7, 5)]
)
def test_split_layers_have_the_shape_and_bias_of_the_one_they_replace(layer):
    x = torch.randn(2, 7) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 9, 9)
    network = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    before = network(x).shape
    names = [node.name for node in network.graph.nodes]
    assert split([network], Factor(layer="0", rank=2)) == ("0.0", "0.1")
    assert network(x).shape == before
    assert (network.get_submodule("0.1").bias is None) == (layer.bias is None)
    assert network.get_submodule("0.0").bias is None
    assert set(names) <= {node.name for node in network.graph.nodes}  # cut points keep their names


def test_a_planted_low_rank_is_found_and_does_no_harm():
    network, section = planted(), PlanSection(rank_errors=[0.001])
    sweep = sweep_of(network, section)
    found = {}
    for index, region in enumerate(network.regions):
        choice = Choice(sweep, index, index, index, None, region.module)
        shape = choice.shaped({}, 1.0)
        known = spectra(choice, shape)
        candidate = thinned(choice, shape, known, 0.001)
        if candidate is not None:
            found |= candidate.ranks
            scored = choice.scored(with_ranks(choice, shape, known, candidate.ranks), candidate)
            if any("blocks.1" in layer for layer in candidate.ranks):
                assert scored.harm_kl < 1e-6
        sweep.advance()
    assert {rank for layer, rank in found.items() if "blocks.1" in layer} == {3}


@pytest.mark.parametrize("name", ["residual", "stages", "plain"])
def test_ranks_are_carried_out_replayed_and_cost_what_was_foreseen(name):
    network = traced(name)
    section = PlanSection(rank_errors=[0.2, 0.5], widths=[0.75], min_channels=2)
    fit, heldout = list(inputs_of(name, 128, 1).split(32)), list(inputs_of(name, 64, 2).split(32))
    sites = len(network.regions)
    effects = SimpleNamespace(cka=[[0.0] * sites for _ in range(sites)])
    candidates = measure(network, Probe(fit, heldout, fit), effects, section)
    thin = [row for row in candidates.rows if row.ranks]
    assert thin
    chosen = {}
    for row in thin:  # of each region the one that loses most
        chosen[row.first] = max(chosen.get(row.first, row), row, key=lambda one: one.relative_error)
    plan = planned(singles(network), {first: row.widths for first, row in chosen.items()})
    for decision in plan.decisions:
        row = chosen.get(decision.candidate.first)
        if row is not None:
            decision.candidate.ranks.update(row.ranks)
    front = front_at_input(network, name)
    student, changes, _ = prune(assemble(network, singles(network)), plan, front, PruneSection())
    wanted = {layer: rank for row in chosen.values() for layer, rank in row.ranks.items()}
    assert {factor.layer: factor.rank for factor in student.surgery.factors} == wanted
    assert any("in two layers of rank" in change.what for change in changes)
    x = inputs_of(name, 8, 3)
    again = replay(network, student.surgery, weights_of(student.graph))
    assert torch.equal(answers(again.graph, x), answers(student.graph, x))
    kept = {row.first: row for row in candidates.rows if not row.ranks and not row.widths and row.first == row.last}
    rows_taken = [chosen.get(index, kept[index]) for index in range(sites)]
    macs = sum(row.macs_fixed + row.macs_out for row in rows_taken)
    assert count_macs(student.graph, network.example_input[:1]) == pytest.approx(macs, rel=1e-6)
    foreseen = sum(row.params_fixed + row.params_out for row in rows_taken)
    assert count_params(student.graph) == pytest.approx(foreseen, abs=sum(len(f) for f in student.surgery.biased) * 64)


def test_the_second_layer_makes_up_for_what_the_first_one_loses():
    network, bare = traced("stages"), traced("stages")
    convolutions = {path for path, module in network.graph.named_modules() if isinstance(module, nn.Conv2d)}
    region, layer = next((r.info.index, m) for r in network.regions[1:] for m in r.info.modules if m in convolutions)
    plan = planned(singles(network))
    plan.decisions[region].candidate.ranks[layer] = 2
    student, _, _ = prune(assemble(network, singles(network)), plan, front_at_input(network, "stages"), PruneSection())
    weight = bare.graph.get_submodule(layer).weight
    u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    with torch.no_grad():
        weight.copy_((u[:, :2] * s[:2] @ v[:2]).reshape(weight.shape))
    assert harm(network, student.graph, "stages") < 0.7 * harm(network, bare.graph, "stages")


def test_a_cut_point_behind_a_split_layer_can_still_lose_channels():
    network = traced("plain")
    cuts = find_widths(network, PlanSection(min_channels=2)).cuts
    before, group = next(iter(sorted(cuts.items())))
    plan = planned(singles(network), shares={before + 1: 0.5})
    plan.decisions[before].candidate.ranks[group.producer] = 2
    student, _, _ = prune(assemble(network, singles(network)), plan, front_at_input(network, "plain"), PruneSection())
    (keep,), (factor,) = student.surgery.keeps, student.surgery.factors
    assert (keep.producer, len(keep.channels)) == (group.producer, round(0.5 * group.channels))
    assert (factor.layer, factor.rank) == (group.producer, 2)
    x = inputs_of("plain", 8, 3)
    again = replay(network, student.surgery, weights_of(student.graph))
    assert torch.equal(answers(again.graph, x), answers(student.graph, x))
