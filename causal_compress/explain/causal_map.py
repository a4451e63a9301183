"""The causal map: nodes in graph order, what each does to the answer, what flows on from one to the next.

Interventions on the input make every node compute something else than it would. A node's effect is what *its own
computation* does with that (the branch; see `ablation.py`), the rest of the network being left in peace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.explain.ablation import Parted, Plain, mean_interval, output_kl, part_network, run_parted, run_with
from causal_compress.explain.attribution import Draws, estimate
from causal_compress.explain.engine import Engine, Scene
from causal_compress.results import CausalMap, FeatureEffect, MapEdge, MapNode, Skip
from causal_compress.understand.effect import effect_terms, units

Estimator = Literal["output", "units"]
Array = NDArray[np.float64]
Nodes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Seen:
    """What interventions did, mean over an input's interventions; `flow` and `held` are effects on the next node."""

    ace: Float[Array, "samples nodes"]
    null: Float[Array, "samples nodes"]
    flow: Float[Array, "samples nodes"]
    held: Float[Array, "samples nodes"]
    output: Float[Tensor, "samples masks"]


def causal_map(
    engine: Engine,
    nodes: Nodes,
    scene: Scene,
    *,
    estimator: Estimator = "output",
    masks: int = 2,
    seed: int = 0,
) -> CausalMap:
    """Average causal effects of nodes, edges and input features, with intervals and nulls.

    Args:
        engine: The network; run in float32 here.
        nodes: Sites of each causal node, in chain order, all sites covered.
        scene: Inputs. For the map of a single input: that input many times; intervals are then over interventions.
        estimator: output: KL(P(do) || P) of the network's answer when the node's own computation alone gets what it
            makes of the intervened input (the effect that the node mediates). units: the ACE of the paper, |delta|
            times KL over the softmax of the node's units, of the whole activation at the node's end.
        masks: Interventions of each input: half of its features, and once for each baseline all of them; baselines take
            turns, two interventions at a time, so 2 * baselines use each of them once both ways.
        seed: Of masks and resamples.

    Source: TRACER, arXiv:2410.05484 (units); natural indirect effects, Pearl 2001 (output).
    Limits: effects of nodes do not add up: what one mediates another can undo or repeat. Where nothing goes around a
        node, "output" gives it the whole effect; without any skip connection that is one number for all of them.
    """
    parts = part_network(engine.network)
    drawn = _draw(scene, masks, seed)
    used = tuple(scene.baselines)[: -(-masks // 2)]
    before = (engine.spent.forwards, engine.spent.seconds)
    seen = _observe(engine, parts, nodes, scene, drawn, estimator)
    count = len(scene.x) * masks
    effects, null = _features(scene, drawn, seen.output, masks, seed)
    return CausalMap(
        scope=scene.scope,
        estimator=estimator,
        nodes=tuple(_node(engine, number, nodes, seen, seed) for number in range(len(nodes))),
        edges=_edges(seen, len(nodes), seed),
        features=effects,
        features_null=null,
        baselines=used,
        inputs=len(scene.x),
        interventions=count,
        forwards=engine.spent.forwards - before[0],
        seconds=engine.spent.seconds - before[1],
        skipped=_unparted(engine, parts),
    )


def _draw(scene: Scene, masks: int, seed: int) -> Bool[Tensor, "samples masks features"]:
    """Half of the features, then all of them: measured on ResNet-56 (benchmarks/causal_map.py), these two rank nodes as
    ablation does, while weak interventions see only nodes that react to details. All of them only once for each
    baseline: a second time would be the same intervention again.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(len(scene.x), masks, len(scene.names), generator=generator) < 0.5
    half[:, 1 : 2 * len(scene.baselines) : 2] = True
    return half


def _observe(
    engine: Engine,
    parts: Sequence[Parted],
    nodes: Nodes,
    scene: Scene,
    drawn: Tensor,
    estimator: Estimator,
) -> _Seen:
    names = list(scene.baselines)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, len(scene.x), engine.batch_size):
        at = torch.arange(start, min(start + engine.batch_size, len(scene.x)))
        with torch.inference_mode():
            with engine.spent.on(len(at)):
                plain = run_parted(parts, scene.x[at].to(engine.device))
            versions = []
            for number in range(drawn.shape[1]):
                changed = scene.masked(at, drawn[at, number], names[number // 2 % len(names)]).to(engine.device)
                versions.append(_one_intervention(engine, parts, nodes, plain, changed, estimator))
            null = _one_intervention(engine, parts, nodes, plain, scene.x[at].to(engine.device), estimator)[0]
        ace, flow, held = (torch.stack([version[i] for version in versions]).mean(0) for i in range(3))
        rows.append((ace, null, flow, held, torch.stack([version[3] for version in versions], 1)))
    ace, null, flow, held, output = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    return _Seen(ace.numpy(), null.numpy(), flow.numpy(), held.numpy(), output)


def _one_intervention(
    engine: Engine, parts: Sequence[Parted], nodes: Nodes, plain: Plain, changed: Tensor, estimator: Estimator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ACE of each node; effect on the next node, as it is and with this node held; effect on the answer."""
    with engine.spent.on(len(changed)):
        moved = run_parted(parts, changed)
    ace, flow, held = [], [], []
    for number, node in enumerate(nodes):
        match estimator:
            case "output":
                ace.append(_mediated(engine, parts, plain, moved, node))
            case "units":
                ace.append(effect_terms(units(plain.exit_of(node[-1])), units(moved.exit_of(node[-1])))[0])
        full, kept = _flow(engine, parts, plain, moved, nodes, number)
        flow.append(full)
        held.append(kept)
    answer = output_kl(moved.logits, plain.logits)
    return torch.stack(ace, 1), torch.stack(flow, 1), torch.stack(held, 1), answer


def _mediated(engine: Engine, parts: Sequence[Parted], plain: Plain, moved: Plain, node: tuple[int, ...]) -> Tensor:
    first, last = node[0], node[-1]
    with engine.spent.on(_share_of(parts, len(plain.logits), first, len(parts) - 1)):
        logits = run_with(parts, plain.entries[first], moved.owns, (first, last), len(parts) - 1)
    return output_kl(logits, plain.logits)


def _flow(
    engine: Engine, parts: Sequence[Parted], plain: Plain, moved: Plain, nodes: Nodes, number: int
) -> tuple[Tensor, Tensor]:
    """Effect on the next node's end, and what is left of it when this node's own computation stays as it was."""
    node, following = nodes[number], nodes[min(number + 1, len(nodes) - 1)]
    end, before = following[-1], units(plain.exit_of(following[-1]))
    full = effect_terms(before, units(moved.exit_of(end)))[1]
    if not all(parts[site].around for site in node):  # nothing goes around it: all stands still
        return full, torch.zeros_like(full)
    with engine.spent.on(_share_of(parts, len(full), node[0], end)):
        exit_ = run_with(parts, moved.entries[node[0]], plain.owns, (node[0], node[-1]), end)
    return full, effect_terms(before, units(exit_))[1]


def _share_of(parts: Sequence[Parted], inputs: int, first: int, end: int) -> int:
    return -(-inputs * (end - first + 1) // len(parts))


def _node(engine: Engine, number: int, nodes: Nodes, seen: _Seen, seed: int) -> MapNode:
    values = seen.ace[:, number]
    low, high = mean_interval(values, seed=seed)
    names = tuple(engine.network.regions[site].info.name for site in nodes[number])
    null = float(seen.null[:, number].mean())
    return MapNode(index=number, sites=names, ace=float(values.mean()), low=low, high=high, null=null)


def _edges(seen: _Seen, nodes: int, seed: int) -> tuple[MapEdge, ...]:
    edges = [MapEdge(source=-1, target=0, kind="through", share=1.0, low=1.0, high=1.0)]
    for number in range(nodes - 1):
        share, low, high = _share_with_interval(seen.flow[:, number], seen.held[:, number], seed)
        edges.append(MapEdge(source=number, target=number + 1, kind="through", share=share, low=low, high=high))
        if seen.held[:, number].any():
            edges.append(
                MapEdge(
                    source=number - 1, target=number + 1, kind="around", share=1 - share, low=1 - high, high=1 - low
                )
            )
    return tuple(edges)


def _share_with_interval(flow: Array, held: Array, seed: int) -> tuple[float, float, float]:
    """1 - held / flow of the means, with a bootstrap over inputs; NaN where there is one input only."""
    if not flow.sum() > 0:
        return 0.0, 0.0, 0.0
    if len(flow) < 2:
        return float(1 - held.sum() / flow.sum()), math.nan, math.nan
    draws = np.random.default_rng(seed).integers(0, len(flow), (500, len(flow)))
    totals = flow[draws].sum(1)
    ratios = 1 - held[draws].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(1 - held.sum() / flow.sum()), float(low), float(high)


def _features(
    scene: Scene, drawn: Tensor, output: Tensor, masks: int, seed: int
) -> tuple[tuple[FeatureEffect, ...], float]:
    """What masking each feature adds to the effect on the answer: one surrogate over all interventions."""
    inputs = len(scene.x)
    groups = (torch.arange(masks) // 2).remainder(len(scene.baselines)).repeat(inputs)
    scores = estimate(
        drawn.reshape(1, inputs * masks, -1),
        -output.reshape(1, inputs * masks, 1),
        groups,
        scene.layout,
        draws=Draws(100, seed, together=masks),
    )
    columns = (scene.names, scores.values[0, 0].tolist(), scores.low[0, 0].tolist(), scores.high[0, 0].tolist())
    effects = tuple(
        FeatureEffect(name=name, value=value, low=low, high=high)
        for name, value, low, high in zip(*columns, strict=True)
    )
    return effects, float(scores.null_high[0, 0])


def _unparted(engine: Engine, parts: Sequence[Parted]) -> tuple[Skip, ...]:
    reason = (
        "no skip connection was found around it, so its own computation is all that passes, and its effect is total"
    )
    regions = engine.network.regions
    alone = [region.info.name for region, piece in zip(regions, parts, strict=True) if not piece.around]
    return tuple(Skip(what=name, reason=reason) for name in alone)


def as_graph(found: CausalMap) -> nx.DiGraph:
    """The map as a networkx graph: nodes -1 (input), 0 ..; their attributes and those of the edges are the fields'."""
    graph = nx.DiGraph()
    graph.add_node(-1, sites=("input",), ace=None)
    for node in found.nodes:
        graph.add_node(node.index, sites=node.sites, ace=node.ace, low=node.low, high=node.high)
    for edge in found.edges:
        graph.add_edge(edge.source, edge.target, kind=edge.kind, share=edge.share, low=edge.low, high=edge.high)
    assert nx.is_directed_acyclic_graph(graph), "edges go forward"
    return graph
