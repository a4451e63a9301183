"""The causal map against truth: dead blocks do nothing, strong blocks do much, and ablating them says the same."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import tiny
import torch
from scipy.stats import spearmanr

from causal_compress.explain.ablation import ablation_harm, mean_interval, output_kl, part, part_network, run_parted
from causal_compress.explain.causal_map import _draw, as_graph, causal_map
from causal_compress.explain.engine import open_engine, open_scene
from causal_compress.inputs.data import Features
from causal_compress.understand.trace import trace

STRENGTHS = (0.0, 0.3, 0.7, 1.5)


class Inputs:
    """A split of given inputs."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def batches(self, batch_size, *, limit=None, **_):
        yield from zip(self.x[:limit].split(batch_size), self.labels[:limit].split(batch_size), strict=True)


@pytest.fixture(scope="module")
def graded():
    """Four residual blocks of growing strength, the first of which does nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = tiny.random_norms(tiny.Residual(blocks=4, channels=6))
    for block, strength in zip(model.blocks, STRENGTHS, strict=True):
        with torch.no_grad():
            block.bn2.weight.mul_(strength)
            block.bn2.bias.mul_(strength)
    x = tiny.images(64, 1, 8)
    with torch.no_grad():  # answers that hang on the input, and are not sure of themselves
        model.fc.weight.mul_(30)
        model.fc.bias.sub_(model(x).mean(0))
    return trace(model, x[:2]), x


def scene_of(x, baselines=("mean",)):
    zero = torch.zeros(1, 8, 8)
    return open_scene(x, Features("image", (), (), zero, zero), baselines, grid=4)


@pytest.mark.parametrize("model", [tiny.Plain(), tiny.Residual(), tiny.Stages(), tiny.Depthwise(), tiny.Opaque()])
def test_parts_together_are_the_region(model):
    channels = next(model.parameters()).shape[1]
    x = tiny.images(3, channels, 4 if isinstance(model, tiny.Plain) else 8)
    network = trace(tiny.random_norms(model), x[:2])
    with torch.no_grad():
        plain = run_parted(part_network(network), x)
        torch.testing.assert_close(plain.logits, network.graph(x))
        for region, entry, site in zip(network.regions, plain.entries, range(9), strict=False):
            torch.testing.assert_close(region.module(entry), plain.exit_of(site))


def test_a_residual_block_is_its_branch_and_what_goes_around():
    x = tiny.images(2, 1, 8)
    network = trace(tiny.random_norms(tiny.Residual()), x)
    pieces = [part(region) for region in network.regions]
    assert [piece.around for piece in pieces] == [False, True, True, False]
    entry = tiny.images(2, 4, 8).abs()
    with torch.no_grad():
        torch.testing.assert_close(pieces[1].run(entry, torch.zeros_like(entry)), entry)


def test_a_dead_block_has_no_effect_and_does_no_harm(graded):
    network, x = graded
    nodes = tuple((site,) for site in range(len(network.regions)))
    found = causal_map(open_engine(network, precision="fp32"), nodes, scene_of(x), masks=2)
    assert found.nodes[1].ace == pytest.approx(0, abs=1e-9)
    assert found.nodes[4].ace > 1e-5
    assert found.nodes[4].low <= found.nodes[4].ace <= found.nodes[4].high
    split = Inputs(x, torch.zeros(len(x), dtype=torch.int64))
    for how in ("mean", "bypass"):
        harm = ablation_harm(network, nodes, split, how=how)
        by_node = {node.index: node for node in harm.nodes}
        assert by_node[1].kl == pytest.approx(0, abs=1e-9)
        assert by_node[4].kl > 1e-5
        assert by_node[4].kl_low <= by_node[4].kl <= by_node[4].kl_high
        aces = [found.nodes[site].ace for site in (1, 2, 3, 4)]
        assert spearmanr(aces, [by_node[site].kl for site in (1, 2, 3, 4)]).statistic > 0.75


def test_ablation_to_the_mean_is_what_it_says(graded):
    network, x = graded
    split = Inputs(x, torch.zeros(len(x), dtype=torch.int64))
    harm = ablation_harm(network, ((3,),), split, how="mean")
    pieces = part_network(network)
    with torch.no_grad():
        plain = run_parted(pieces, x)
        own = plain.owns[3].mean(0, keepdim=True).expand_as(plain.owns[3])
        value = pieces[3].run(plain.entries[3], own)
        for region in network.regions[4:]:
            value = region.module(value)
    assert harm.nodes[0].kl == pytest.approx(float(output_kl(plain.logits, value).mean()), rel=1e-4)


def test_what_can_not_be_bypassed_is_said():
    x = tiny.images(8, 1, 8)
    network = trace(tiny.random_norms(tiny.Stages()), x[:2])
    split = Inputs(x, torch.zeros(8, dtype=torch.int64))
    harm = ablation_harm(network, tuple((site,) for site in range(4)), split, how="bypass")
    assert [node.index for node in harm.nodes] == [2]
    assert len(harm.skipped) == 3
    assert "another shape" in harm.skipped[0].reason


def test_nulls_are_zero_and_shares_add_up(graded):
    network, x = graded
    nodes = ((0, 1), (2,), (3,), (4, 5))
    found = causal_map(open_engine(network, precision="fp32"), nodes, scene_of(x, ("mean", "blur")), masks=2)
    assert max(node.null for node in found.nodes) < 1e-9
    assert [node.sites[0] for node in found.nodes] == [network.regions[node[0]].info.name for node in nodes]
    graph = as_graph(found)
    assert nx.is_directed_acyclic_graph(graph)
    through = {edge.source: edge.share for edge in found.edges if edge.kind == "through"}
    around = {edge.target - 1: edge.share for edge in found.edges if edge.kind == "around"}
    assert through[0] == 1  # the stem lets nothing past
    for node, share in around.items():
        assert share + through[node] == pytest.approx(1)
    assert set(around) == {1, 2}


def test_a_node_that_does_nothing_lets_everything_around(graded):
    network, x = graded
    nodes = ((0,), (1,), (2, 3), (4, 5))
    found = causal_map(open_engine(network, precision="fp32"), nodes, scene_of(x), masks=2)
    around = next(edge for edge in found.edges if edge.kind == "around" and edge.target == 2)
    assert around.share == pytest.approx(1, abs=1e-6)


def test_the_papers_estimator_is_there_too(graded):
    network, x = graded
    nodes = tuple((site,) for site in range(len(network.regions)))
    found = causal_map(open_engine(network, precision="fp32"), nodes, scene_of(x), estimator="units", masks=1)
    assert found.estimator == "units"
    assert all(node.ace > 0 for node in found.nodes)
    assert found.interventions == 64
    assert found.forwards > 128


def test_a_feature_that_the_network_can_not_see_has_no_effect():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    seen = torch.zeros(8, 8)
    seen[:2, :2] = 1
    with torch.no_grad():
        model[1].weight.mul_(30 * seen.flatten())
    x = tiny.images(64, 1, 8)
    network = trace(model, x[:2])
    found = causal_map(open_engine(network, precision="fp32"), ((0,),), scene_of(x), masks=8)
    largest = max(found.features, key=lambda feature: feature.value)
    assert largest.name == "row 1, column 1"
    assert largest.value > found.features_null
    far = found.features[-1]
    assert far.value <= found.features_null


def test_no_intervention_is_repeated_and_unused_baselines_are_not_named(graded):
    network, x = graded
    for baselines, count in ((("mean",), 4), (("mean", "blur"), 6)):
        drawn = _draw(scene_of(x, baselines), count, 0)
        assert int(drawn.all(2).sum(1).max()) == len(baselines)
    found = causal_map(open_engine(network, precision="fp32"), ((0, 1, 2, 3, 4, 5),), scene_of(x, ("mean", "blur")))
    assert found.baselines == ("mean",)


def test_one_input_has_no_interval():
    assert all(np.isnan(mean_interval(np.ones(1), seed=0)))
