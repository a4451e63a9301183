"""Which calibration inputs are for fitting and which for reading harm; plain and intervened."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causal_compress.errors import DataError
from causal_compress.inputs.data import Features, Split
from causal_compress.recipe import InterveneSection, PlanSection
from causal_compress.understand.intervene import intervened

CHUNK = 64
FEWEST_INPUTS = 16


@dataclass(frozen=True)
class Probe:
    """Chunks of calibration inputs; the last may be up to half shorter or longer than the others.

    Attributes:
        fit: Plain and intervened inputs in alternation, for the candidates' normal equations.
        heldout: The same from other inputs, on which harm is read; never fitted on.
        surgery: Plain inputs that are not held out, for the refits of the surgery itself.
    """

    fit: list[Tensor]
    heldout: list[Tensor]
    surgery: list[Tensor]


def draw_probe(
    split: Split, features: Features, section: PlanSection, intervene: InterveneSection, refitted: int, *, seed: int
) -> Probe:
    """Calibration inputs for candidates: disjoint for fitting and scoring, every second input intervened.

    Args:
        split: Calibration split.
        features: What an intervention masks.
        section: How many inputs for the candidates.
        intervene: Grid, fraction and baselines of the interventions.
        refitted: How many inputs for the surgery; those for the candidates are among them.
        seed: Of the masks.

    Raises:
        DataError: too few calibration inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(split) < FEWEST_INPUTS:
        raise DataError(
            "too few calibration inputs for refits",
            found=f"{len(split)}",
            wanted=f"at least {FEWEST_INPUTS}",
            remedy="give another --out and raise data.calibration, or give more data",
        )
    size = min(CHUNK, len(split) // 4)
    chunks = -(-len(split) // size)
    held = max(1, min(chunks // 3, -(-section.heldout // size)))
    fitted = max(1, min(chunks - held, -(-section.inputs // size)))
    wanted = held + max(fitted, -(-refitted // size))
    plain = [x for x, _ in split.batches(size, limit=wanted * size)]
    if len(plain[-1]) < size / 2:  # too few for a batch norm's statistics, or to be held out alone
        plain[-2:] = [torch.cat(plain[-2:])]

    def mixed(x: Tensor) -> Tensor:
        changed = intervened(
            x,
            features,
            grid=intervene.grid,
            fraction=intervene.fraction,
            baselines=intervene.baselines,
            generator=generator,
        )
        every_second = (torch.arange(len(x)) % 2 == 1).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(every_second, changed, x)

    return Probe([mixed(x) for x in plain[held:][:fitted]], [mixed(x) for x in plain[:held]], plain[held:])
