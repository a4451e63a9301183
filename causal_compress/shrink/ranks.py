"""Low ranks of a part's layers: which are worth it at which loss, and the part with them written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from causal_compress.results import Candidate
from causal_compress.shrink.choice import Choice, Shape
from causal_compress.shrink.lowrank import Components, components, cost_share, reduced
from causal_compress.shrink.repair import affine_layers, current_affine, too_large, write_solution
from causal_compress.understand.graph import fetch
from causal_compress.understand.network import is_allowed

WORTHWHILE = 0.95
"""Two layers may cost at most this share of the one that they replace."""


@dataclass(frozen=True)
class Spectrum:
    """What is known of a layer: its output's components, the outputs that stay, and the inputs each is made of."""

    found: Components
    stays: Tensor
    fan_in: int


def spectra(choice: Choice, shape: Shape) -> dict[str, Spectrum]:
    """The components of every layer of a shape that may change, on the teacher's activations.

    Args:
        choice: A region as its own representative.
        shape: Of that choice.
    """
    known = {}
    for layer in affine_layers(shape.part):
        if is_allowed(layer, choice.sweep.section) and too_large(fetch(shape.part, layer)) is None:
            weight, _ = current_affine(shape.part, layer, choice.norm(shape.part, layer))
            stays = shape.kept.get(layer, torch.arange(weight.shape[1]))
            found = components(choice.reader(layer)[0].both(), weight[:, stays])
            known[layer] = Spectrum(found, stays, round(len(weight) * shape.shares.get(layer, (1.0, 1.0))[0]))
    return known


def thinned(choice: Choice, shape: Shape, known: Mapping[str, Spectrum], share: float) -> Candidate | None:
    """The candidate whose layers have the least ranks that lose at most a share, or None where no rank is worth it.

    Args:
        choice: A region as its own representative.
        shape: Of that choice.
        known: Its layers' components.
        share: Of each layer's output variance.
    """
    ranks = {}
    for layer, spectrum in known.items():
        rank = spectrum.found.rank_for(share, choice.sweep.section.align)
        if cost_share(spectrum.fan_in, len(spectrum.stays), rank) <= WORTHWHILE:
            ranks[layer] = rank
    if not ranks:
        return None
    return choice.candidate(shape, ranks, max(float(known[layer].found.left[rank]) for layer, rank in ranks.items()))


def with_ranks(choice: Choice, shape: Shape, known: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> fx.GraphModule:
    """A copy of a shape's part whose layers compute what their two factors would.

    The last layer is refitted to what the others put out now, as surgery will do it, and loses its own rank after that.
    """
    part = copy.deepcopy(shape.part)
    last = None if choice.tail is None else choice.tail.affine
    inner = [layer for layer in ranks if layer != last]
    for layer in inner:
        _reduce(choice, part, layer, known[layer], known[layer].found, ranks[layer])
    if last is not None and inner and too_large(fetch(part, last)) is None:
        sums = choice.refit_tail(part)
        if last in ranks:
            weight, _ = current_affine(part, last, choice.norm(part, last))
            _reduce(choice, part, last, known[last], components(sums.both(), weight[:, known[last].stays]), ranks[last])
    elif last is not None and last in ranks:
        _reduce(choice, part, last, known[last], known[last].found, ranks[last])
    return part


def _reduce(choice: Choice, part: fx.GraphModule, layer: str, spectrum: Spectrum, found: Components, rank: int) -> None:
    """Keep a layer's output on its first components (in place)."""
    norm = choice.norm(part, layer)
    sums = choice.reader(layer)[0].both()
    weight, bias = current_affine(part, layer, norm)
    low = reduced(sums, weight[:, spectrum.stays], bias[spectrum.stays], found.basis[:, :rank])
    weight[:, spectrum.stays], bias[spectrum.stays] = low
    write_solution(part, layer, norm, (weight, bias), sums)
