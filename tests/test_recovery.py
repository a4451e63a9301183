"""The ablation of recovery (benchmarks/recovery.py): its own loss, its committee, and which rows stay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # its scripts are no package

from recovery import SHIPPED, VARIANTS, Committee, dist_loss, together

from causal_compress.recipe import DistillSection
from causal_compress.recover import training


def test_correlations_forgive_what_scales_all_classes_alike_and_nothing_else() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(64, 10)
    assert dist_loss(wanted, wanted, 4.0).item() == pytest.approx(0.0, abs=1e-4)
    other = dist_loss(torch.randn(64, 10), wanted, 4.0).item()
    assert 0.7 * 32 < other < 1.3 * 32  # two correlations near zero, times the squared temperature
    probabilities = wanted.softmax(1)
    shrunk = (0.5 * probabilities + 0.05).log()  # on the line between the answer and not knowing
    assert dist_loss(shrunk, wanted, 1.0).item() == pytest.approx(0.0, abs=1e-4)


def test_a_committee_answers_with_the_mean() -> None:
    members = [nn.Linear(3, 2), nn.Linear(3, 2)]
    x = torch.randn(5, 3)
    assert torch.allclose(Committee(members)(x), (members[0](x) + members[1](x)) / 2)


def test_every_variant_changes_something_that_exists() -> None:
    usual = DistillSection()
    for name, variant in VARIANTS.items():
        changed = {key for key, value in variant.settings.items() if getattr(usual, key) != value}
        assert changed == set(variant.settings), name
        before = {key: value for key, value in vars(training).items() if callable(value)}
        with variant.changed():
            differs = [key for key, value in before.items() if vars(training)[key] is not value]
        assert bool(differs) == (variant.patched is not None), name
        assert (name == SHIPPED) == (not differs and not changed and not variant.committee)


def test_rows_of_other_lengths_stay() -> None:
    def row(variant: str, epochs: int, pct: float) -> dict[str, Any]:
        return {"variant": variant, "epochs": epochs, "seed": 0, "validation_pct": pct}

    before = [row(SHIPPED, 10, 91.0), row("labels alone", 2, 88.0)]
    found = together(before, [row(SHIPPED, 2, 90.0), row("labels alone", 2, 89.0)])
    assert [(r["variant"], r["epochs"], r["validation_pct"]) for r in found] == [
        (SHIPPED, 2, 90.0),
        ("labels alone", 2, 89.0),
        (SHIPPED, 10, 91.0),
    ]
