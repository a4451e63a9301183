"""The benchmarks of records: which rows stay, what students and teachers are taught on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # its scripts are no package

import alexnet_mnist
import over_seeds
import resnet56
import resnet_cifar10

from causal_compress.inputs.data import Data


def test_rows_of_other_settings_stay_and_those_of_the_same_run_are_replaced() -> None:
    def row(pct: float, settings: str | None, epochs: int = 40) -> dict[str, Any]:
        return {"target_removed_pct": 89.0, "epochs": epochs, "seed": 0, "accuracy_pct": pct, "settings": settings}

    before = [row(90.4, None), row(89.0, "plan.low_rank=false"), row(85.0, None, epochs=3)]
    found = resnet_cifar10.together(before, [row(90.1, "plan.low_rank=false")])
    assert [(r["accuracy_pct"], r["epochs"]) for r in found] == [(85.0, 3), (90.4, 40), (90.1, 40)]
    more = resnet_cifar10.together(
        found, [row(91.0, "plan.low_rank=false distill.views=null"), row(88.0, "distill.views=1", 3)]
    )
    assert [r["views"] for r in more] == ["10", "1", "10", "10", "new"]


def test_rows_of_other_processors_stay_and_name_theirs() -> None:
    def row(variant: str, pct: float, **more: Any) -> dict[str, Any]:
        return {"variant": variant, "accuracy_pct": pct, **more}

    before = {"machine": {"cpu": "A"}, "rows": [row("speed-no-borrowing", 89.0), row("speed", 91.0, gone=1)]}
    found = resnet56.together(before, [row("speed", 90.0, asked=0.49, cpu="B")])
    assert [(r["variant"], r["accuracy_pct"], r["cpu"], r["asked"]) for r in found] == [
        ("speed", 91.0, "A", None),
        ("speed", 90.0, "B", 0.49),
        ("speed-no-borrowing", 89.0, "A", None),
    ]
    assert all("gone" not in r for r in found)
    again = resnet56.together({"machine": {"cpu": "B"}, "rows": found}, [row("speed", 90.5, asked=0.5, cpu="B")])
    assert [r["accuracy_pct"] for r in again] == [91.0, 90.5, 89.0]
    assert resnet56.together({}, [row("speed", 90.0, cpu="B")]) == [row("speed", 90.0, cpu="B")]


def test_seeds_of_one_size_and_one_setting_have_a_mean() -> None:
    def row(size: float, seed: int, drop: float, epochs: int = 25) -> dict[str, Any]:
        return {
            "target_removed_pct": size,
            "seed": seed,
            "epochs": epochs,
            "params": 10 + seed,
            "accuracy_pct": 99.0 - drop,
            "drop_pp": drop,
        }

    before = [row(99.0, 0, 5.0), row(99.0, 1, 0.3), row(99.9, 0, 1.0), row(99.0, 7, 9.0, epochs=5)]
    rows = over_seeds.together(before, [row(99.0, 0, 0.1), row(99.0, 2, -0.1)])
    assert [(r["target_removed_pct"], r["seed"], r["drop_pp"]) for r in rows] == [
        (99.0, 0, 0.1),
        (99.0, 1, 0.3),
        (99.0, 2, -0.1),
        (99.0, 7, 9.0),
        (99.9, 0, 1.0),
    ]
    (mean,) = over_seeds.over_seeds(rows, ("epochs",))
    assert (mean["target_removed_pct"], mean["epochs"], mean["seeds"], mean["most_params"]) == (99.0, 25, 3, 12)
    assert mean["accuracy_pct"] == pytest.approx(98.9)
    assert (mean["drop_pp"], mean["largest_drop_pp"]) == (pytest.approx(0.1), 0.3)
    # Three numbers 0.2 apart: a standard error of 0.2 / sqrt(3), and t(0.975; 2) = 4.303 from a table.
    assert mean["drop_over_seeds_ci_pp"] == pytest.approx([0.1 - 4.303 * 0.11547, 0.1 + 4.303 * 0.11547], abs=1e-4)


def test_students_of_alexnet_learn_from_turned_images_and_its_teacher_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def trained(model: nn.Module, data: Data, seed: int) -> nn.Module:
        seen.append(data.train.rows)
        return nn.Linear(1, 1)

    monkeypatch.setattr(alexnet_mnist, "train", trained)
    file, images = tmp_path / "digits.npz", np.zeros((40, 28, 28, 1), np.uint8)
    images[:, 0, 0, 0] = range(40)
    labels = np.arange(40) % 10
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    kept = alexnet_mnist.recipe_for(file, tmp_path / "none", 1e-4, 25, 0)
    small = kept.model_copy(update={"data": kept.data.model_copy(update={"calibration": 10, "validation": 10})})
    monkeypatch.setattr(alexnet_mnist, "recipe_for", lambda *_: small)
    alexnet_mnist.make_teacher(file, tmp_path / "teacher.safetensors", 0)
    assert (tmp_path / "teacher.safetensors").exists()
    prepared = seen[0].preparation
    assert (prepared.crop_padding, prepared.rotation, prepared.zoom) == (4, 0.0, 1.0)
    augment = small.data.augment
    assert (augment.crop_padding, augment.rotation, augment.zoom) == (4, 10.0, 1.1)
    assert small.budget.params == 1e-4
    assert small.distill is not None
    assert small.distill.epochs == 25
