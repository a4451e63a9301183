"""The student as a chain of parts, and its replay on the teacher's architecture without data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn

from causal_compress.errors import TraceError
from causal_compress.files import atomic_write_bytes
from causal_compress.results import Candidate, Keep, Merge, Plan, Surgery
from causal_compress.shrink.channels import dependencies_of, remove_channels
from causal_compress.shrink.lowrank import split
from causal_compress.shrink.parts import build_part
from causal_compress.understand.algebra import folded
from causal_compress.understand.graph import compose_with_ends, fetch
from causal_compress.understand.trace import Network


@dataclass(frozen=True)
class Student:
    """The network that comes out: one graph, the parts that it is composed of (sharing its modules), and its history.

    `sites` names the graph's node at the end of each part; `ends` the teacher's region that each part ends with.
    """

    graph: fx.GraphModule
    parts: tuple[fx.GraphModule, ...]
    sites: tuple[str, ...]
    ends: tuple[int, ...]
    surgery: Surgery


def merges_of(plan: Plan) -> tuple[Merge, ...]:
    """The plan's spans as replayable steps, in chain order; regions that stay are spans of one."""
    return tuple(merge_of(decision.candidate) for decision in plan.decisions)


def merge_of(candidate: Candidate) -> Merge:
    """A candidate's span as a replayable step."""
    return Merge(
        first=candidate.first,
        last=candidate.last,
        representative=candidate.representative,
        adapter=candidate.adapter,
    )


def assemble(network: Network, merges: Sequence[Merge]) -> Student:
    """The student's structure after all merges, with the representatives' weights as they are.

    Args:
        network: The teacher; left as it is.
        merges: Spans that cover the chain, in order.

    Raises:
        TraceError: the merges belong to another network.
    """
    parts: list[fx.GraphModule] = []
    expected = 0
    for merge in merges:
        part = build_part(network, merge) if merge.first == expected < len(network.regions) else "the spans have gaps"
        if isinstance(part, str):
            raise TraceError(
                "the surgery does not fit this network",
                found=f"regions {merge.first}..{merge.last}: {part}",
                wanted="the architecture that the plan was made for",
                remedy="pass the teacher's own architecture and arguments",
            )
        parts.append(part)
        expected = merge.last + 1
    graph, sites = compose_with_ends(parts)
    graph.eval()
    surgery = Surgery(folds=network.folds, merges=tuple(merges))
    return Student(graph, tuple(parts), sites, tuple(m.last for m in merges), surgery)


def replay(network: Network, surgery: Surgery, weights: dict[str, Tensor]) -> Student:
    """Carry out a recorded surgery on the teacher's architecture and load the student's weights.

    Args:
        network: The traced teacher (its weights do not matter); left as it is.
        surgery: Folds, merges, kept channels, added biases, factors.
        weights: The student's state dict.

    Raises:
        TraceError: the surgery or the weights belong to another network.
    """
    student = assemble(folded(network, surgery.folds), surgery.merges)
    add_biases(student.graph, surgery.biased)
    narrow(student.graph, network.example_input, surgery.keeps)
    for factor in surgery.factors:
        split([student.graph, *student.parts], factor)
    try:
        student.graph.load_state_dict(weights)
    except RuntimeError as error:
        raise TraceError(
            "the student's weights do not fit the replayed surgery",
            found=" ".join(str(error).split()[:40]),
            wanted="weights and surgery of one run",
            remedy="take both files from the same run folder",
        ) from error
    return Student(student.graph, student.parts, student.sites, student.ends, surgery)


def add_biases(graph: fx.GraphModule, layers: Sequence[str]) -> None:
    """Give layers without bias a zero one (in place)."""
    for path in layers:
        layer = fetch(graph, path)
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))


def narrow(graph: fx.GraphModule, example_input: Tensor, keeps: Sequence[Keep]) -> None:
    """Take out all channels that do not stay (in place)."""
    if keeps:
        dependencies = dependencies_of(graph, example_input)
        for keep in keeps:
            remove_channels(graph, dependencies, keep)


def copied(student: Student) -> Student:
    """A student of its own: deep copies of the parts, composed again."""
    parts = tuple(copy.deepcopy(part) for part in student.parts)
    graph, sites = compose_with_ends(parts)
    return Student(graph.eval(), parts, sites, student.ends, student.surgery)


def boundaries(student: Student, network: Network, plan: Plan) -> list[tuple[str, str]]:
    """Cut points that student and teacher share in full width: pairs of graph nodes (student's, teacher's)."""
    pairs = zip(student.sites, student.ends, plan.decisions, strict=True)
    return [(site, network.sites[end]) for site, end, decision in pairs if decision.outputs_kept == 1.0][:-1]


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a state dict as safetensors, whole or not at all; unlike `save_file`'s, others may read the file."""
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    atomic_write_bytes(path, save(state))
