"""Explain one network: the causal map over data, what speaks for each class, and why one input got its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_compress.errors import DataError, UsageError
from causal_compress.explain.ablation import part_network
from causal_compress.explain.attribution import Attributed, Draws, Scores, Targets, attribute
from causal_compress.explain.causal_map import Estimator, Nodes, causal_map
from causal_compress.explain.engine import DONOR_ROWS, DONORS, Engine, Scene, open_engine, open_scene
from causal_compress.explain.minimal import minimal_sets
from causal_compress.inputs.data import Data, Split
from causal_compress.recipe import ExplainSection, GroupSection, InterveneSection
from causal_compress.results import Attribution, Explanation, FeatureEffect, LocalExplanation
from causal_compress.understand.group import group
from causal_compress.understand.intervene import Baseline, intervene
from causal_compress.understand.trace import Network

_LOCAL_INTERVENTIONS = 64
_MOST_SEARCHED = 5000
_OTHER_CLASSES = 2
_NODE_INPUTS = 512


@dataclass(frozen=True)
class Subject:
    """A network to be explained, and its causal nodes."""

    name: str
    network: Network
    nodes: Nodes


@dataclass(frozen=True)
class Question:
    """What is asked: over a split; and one input (1, ...) or one class, where they are named.

    Attributes:
        split: Inputs over which the map and the classes are explained.
        x: The input.
        name: What to call it.
        index: Its index in the split; None for a file.
        true_class: Its label, where it is known.
        of_class: Only inputs that the network gives this class count.
    """

    split: Split
    x: Tensor | None = None
    name: str = ""
    index: int | None = None
    true_class: int | None = None
    of_class: int | None = None


def find_nodes(network: Network, data: Data, intervening: InterveneSection, grouping: GroupSection, seed: int) -> Nodes:
    """Causal nodes of a network that was not analysed yet, from calibration inputs.

    Limits: at most 512 inputs and no bootstrap: enough to draw a map; `analyze` says how stable the partition is.
    """
    few = intervening.model_copy(update={"inputs": min(intervening.inputs, _NODE_INPUTS)})
    effects = intervene(network, data.calibration, data.features, few, seed=seed)
    return group(effects, grouping.model_copy(update={"bootstraps": 0}), seed=seed).chosen.nodes


def explain(subject: Subject, data: Data, section: ExplainSection, question: Question, *, seed: int) -> Explanation:
    """Explain a network over data, and one input of it.

    Args:
        subject: The network; left unchanged.
        data: Features, classes, calibration inputs from which "marginal" draws.
        section: Estimators, baselines, numbers of inputs and masks.
        question: What is asked.
        seed: Of masks and resamples.

    Raises:
        UsageError: a class that the network gives to none of the inputs.
    """
    engine = open_engine(subject.network, precision=section.precision, batch_size=section.batch_size)
    asked = _Asked(engine, data, section, _baselines(section, data), _map_estimator(subject.network, section), seed)
    found = _decided(asked, question)
    scene = asked.map_scene(_map_inputs(found, question, section), _scope(question, data))
    drawn = causal_map(engine, subject.nodes, scene, estimator=asked.estimator, masks=section.map_masks, seed=seed)
    explained = {number: x for number, x in found.items() if len(x) and number >= 0 and question.x is None}
    classes = tuple(_class_attribution(asked, number, x) for number, x in explained.items())
    local = None if question.x is None else _local(asked, subject, question)
    grid = section.grid if data.kind == "image" else None
    return Explanation(
        network=subject.name,
        grid=grid,
        causal_map=drawn,
        classes=classes,
        local=local,
        forwards=engine.spent.forwards,
        seconds=engine.spent.seconds,
        notes=tuple(_notes(asked, found)),
    )


@dataclass(frozen=True)
class _Asked:
    """What every part of an explanation needs."""

    engine: Engine
    data: Data
    section: ExplainSection
    baselines: tuple[Baseline, ...]
    estimator: Estimator
    seed: int

    def scene(self, x: Tensor, scope: str) -> Scene:
        """Inputs under the baselines of attributions."""
        return self._scene(x, scope, self.baselines)

    def map_scene(self, x: Tensor, scope: str) -> Scene:
        """Inputs under the baselines of the causal map."""
        return self._scene(x, scope, tuple(self.section.map_baselines))

    def _scene(self, x: Tensor, scope: str, baselines: tuple[Baseline, ...]) -> Scene:
        donors, _ = next(self.data.calibration.batches(DONOR_ROWS))
        opened = open_scene(x, self.data.features, baselines, grid=self.section.grid, donors=donors, seed=self.seed)
        return replace(opened, scope=scope)


def _baselines(section: ExplainSection, data: Data) -> tuple[Baseline, ...]:
    """A table has nothing to blur: there `blur` would be the mean a second time."""
    chosen = dict.fromkeys(section.baselines)
    if data.kind == "table" and "blur" in chosen and len(chosen) > 1:
        chosen.pop("blur")
    return tuple(chosen)


def _map_estimator(network: Network, section: ExplainSection) -> Estimator:
    """Without any skip connection every node passes all that there is, so effects on the answer are one number."""
    chained = not any(piece.around for piece in part_network(network))
    return "units" if chained else section.map_estimator


def _scope(question: Question, data: Data) -> str:
    return "data" if question.of_class is None else f"class {data.classes[question.of_class]}"


def _decided(asked: _Asked, question: Question) -> dict[int, Tensor]:
    """Inputs by the class that the network gives them, where classes are explained; under -1 some, whatever they are.
    All are drawn at random, for a split may stand in the order of its classes.
    """
    engine, data, section = asked.engine, asked.data, asked.section
    wanted = [] if question.x is not None else list(range(len(data.classes)))
    wanted = wanted if question.of_class is None else [question.of_class]
    enough = section.class_inputs if question.of_class is None else max(section.class_inputs, section.map_inputs)
    found: dict[int, list[Tensor]] = {number: [] for number in wanted}
    first: list[Tensor] = []
    for x, _ in question.split.batches(section.batch_size, limit=_MOST_SEARCHED, shuffle_seed=asked.seed):
        first.append(x[: max(0, section.map_inputs - sum(map(len, first)))])
        decisions = engine.answer(x, exact=True).argmax(1).cpu()
        for number, kept in found.items():
            kept += list(x[decisions == number])[: enough - len(kept)]
        if all(len(kept) >= enough for kept in found.values()) and sum(map(len, first)) >= section.map_inputs:
            break
    if question.of_class is not None and not found[question.of_class]:
        raise UsageError(
            f"the network never answers with the class {data.classes[question.of_class]!r}",
            found=f"{min(len(question.split), _MOST_SEARCHED)} inputs, none of that answer",
            remedy="name another class or another split",
        )
    stacked = {number: torch.stack(kept) if kept else torch.empty(0) for number, kept in found.items()}
    return {**stacked, -1: torch.cat(first)}


def _map_inputs(found: dict[int, Tensor], question: Question, section: ExplainSection) -> Tensor:
    return found[-1 if question.of_class is None else question.of_class][: section.map_inputs]


def _class_attribution(asked: _Asked, number: int, x: Float[Tensor, "samples ..."]) -> Attribution:
    """Mean effect of each feature on the class over inputs that get it, with an interval over inputs."""
    section, name = asked.section, asked.data.classes[number]
    x = x[: section.class_inputs]
    scene = asked.scene(x, f"class {name}")
    done = attribute(
        asked.engine,
        scene,
        masks=section.class_masks,
        estimator=section.estimator,
        targets=Targets([number]),
        draws=Draws(20, asked.seed),
    )
    values = done.output.values[:, 0].double().numpy()
    drawn = np.random.default_rng(asked.seed).integers(0, len(x), (500, len(x)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5), axis=0)
    if len(x) < 2:  # one input says nothing about others
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    # nulls of single inputs are independent, so the mean's is narrower by the root of their number
    root = len(x) ** 0.5
    return Attribution(
        site="output",
        target=name,
        estimator=section.estimator,
        features=_effects(scene.names, values.mean(0).tolist(), low.tolist(), high.tolist()),
        null_low=float(done.output.null_low[:, 0].mean()) / root,
        null_high=float(done.output.null_high[:, 0].mean()) / root,
        baselines=asked.baselines,
        inputs=len(x),
        masks=done.masks,
    )


def _effects(
    names: Sequence[str], values: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> tuple[FeatureEffect, ...]:
    return tuple(
        FeatureEffect(name=name, value=value, low=low, high=high)
        for name, value, low, high in zip(names, values, lows, highs, strict=True)
    )


def _local(asked: _Asked, subject: Subject, question: Question) -> LocalExplanation:
    """Why one input got its answer."""
    section, engine, classes = asked.section, asked.engine, asked.data.classes
    assert question.x is not None
    scene = asked.scene(question.x, "one input")
    ends = [node[-1] for node in subject.nodes[:-1]]
    logits = engine.answer(question.x, exact=True)[0].cpu()
    likeliest = logits.argsort(descending=True).tolist()[: 1 + _OTHER_CLASSES]
    done = attribute(
        engine,
        scene,
        masks=section.masks,
        estimator=section.estimator,
        targets=Targets(likeliest, ends),
        draws=Draws(section.bootstraps, asked.seed),
    )
    order = done.output.values[:, 0]
    sets = {
        kind: minimal_sets(engine, scene, order, kind=kind, baseline=asked.baselines[0], classes=classes)[0]
        for kind in ("sufficient", "necessary")
    }
    many = asked.map_scene(question.x.repeat(_LOCAL_INTERVENTIONS, *[1] * (question.x.ndim - 1)), "one input")
    found = causal_map(
        engine,
        subject.nodes,
        many,
        estimator=asked.estimator,
        masks=2 * len(many.baselines),
        seed=asked.seed,
    )
    return LocalExplanation(
        index=question.index,
        name=question.name,
        true_class=None if question.true_class is None else classes[question.true_class],
        decision=classes[likeliest[0]],
        confidence_pct=100 * float(logits.softmax(0).max()),
        output=tuple(
            _attribution(asked, scene, done, (done.output, place), ("output", classes[number]))
            for place, number in enumerate(likeliest)
        ),
        nodes=_at_sites(asked, scene, done, [subject.network.regions[site].info.name for site in ends]),
        sufficient=sets["sufficient"],
        necessary=sets["necessary"],
        causal_map=replace(found, inputs=1, interventions=_different(many)),  # one input, many times
    )


def _different(many: Scene) -> int:
    """Interventions that differ: random halves all do, all features at once only where a baseline has many donors."""
    different: list[int] = [len(values.flatten(1).unique(dim=0)) for values in many.baselines.values()]
    return len(many.x) * len(different) + sum(different)


def _at_sites(asked: _Asked, scene: Scene, done: Attributed, sites: Sequence[str]) -> tuple[Attribution, ...]:
    if done.sites is None:
        return ()
    return tuple(
        _attribution(asked, scene, done, (done.sites, number), (name, None)) for number, name in enumerate(sites)
    )


def _attribution(
    asked: _Asked, scene: Scene, done: Attributed, scores: tuple[Scores, int], of: tuple[str, str | None]
) -> Attribution:
    found, number = scores
    columns = (found.values[0, number], found.low[0, number], found.high[0, number])
    return Attribution(
        site=of[0],
        target=of[1],
        estimator=asked.section.estimator,
        features=_effects(scene.names, *(column.tolist() for column in columns)),
        null_low=float(found.null_low[0, number]),
        null_high=float(found.null_high[0, number]),
        baselines=asked.baselines,
        inputs=1,
        masks=done.masks,
    )


def _notes(asked: _Asked, found: dict[int, Tensor]) -> Iterator[str]:
    names, baselines, section = asked.data.classes, asked.baselines, asked.section
    precision = "bfloat16" if asked.engine.bf16 else "float32"
    yield f"attributions computed in {precision}; minimal sets and the map in float32"
    yield f"masked features became: {', '.join(baselines)}; minimal sets: {baselines[0]}"
    if "marginal" in baselines:
        one = "; minimal sets hold against one of them" if baselines[0] == "marginal" else ""
        yield f"marginal: masks took turns with up to {DONORS} calibration inputs (occlusion: one){one}"
    if section.estimator == "occlusion":
        yield "occlusion draws nothing at random, so the effects on one input have no interval, and no null is known"
    if asked.estimator != section.map_estimator:
        yield (
            "no skip connection was found, so each node passes all that there is and its effect on the answer would be "
            "the same everywhere: the map shows effects on the nodes' own units (estimator units) instead"
        )
    seen = {names[number]: len(x) for number, x in found.items() if number >= 0}
    if unseen := [name for name, count in seen.items() if not count]:
        yield f"never the network's answer on the inputs searched, so not explained: {', '.join(unseen)}"
    if once := [name for name, count in seen.items() if count == 1]:
        yield f"answered once on the inputs searched, so without intervals: {', '.join(once)}"


def ask(data: Data, split: Split, *, index: int | None, of_class: str | None) -> Question:
    """The question that an index in a split and the name (or number) of a class ask.

    Raises:
        UsageError: an index or a class that isn't there.
    """
    number = None if of_class is None else _class_number(data, of_class)
    if index is None:
        return Question(split, of_class=number)
    if not 0 <= index < len(split):
        raise UsageError(
            f"the split has no input {index}",
            found=f"{len(split)} inputs",
            wanted=f"an index from 0 to {len(split) - 1}",
            remedy="name another --index, or another --split",
        )
    x, label = split.take([index])
    return Question(split, x=x, name=f"input {index}", index=index, true_class=int(label), of_class=number)


def _class_number(data: Data, name: str) -> int:
    if name in data.classes:
        return data.classes.index(name)
    if name.isdecimal() and int(name) < len(data.classes):
        return int(name)
    raise UsageError(
        f"there is no class {name!r}",
        found=", ".join(data.classes[:20]),
        remedy="name one of these classes, or its number from 0",
    )


def ask_about_file(data: Data, question: Question, x: Float[Tensor, "one ..."], name: str) -> Question:
    """The same question about an input of a file.

    Raises:
        DataError: an input of another shape than the data's.
    """
    if tuple(x.shape[1:]) != data.input_shape:
        raise DataError(
            f"{name} does not fit the network",
            found=f"shape {tuple(x.shape[1:])}",
            wanted=f"{data.input_shape}",
            remedy="give an input like those of the data source",
        )
    return replace(question, x=x, name=name, index=None, true_class=None)
