"""What compressing ResNet-20 to half its MACs harms, beyond accuracy: every figure of the harm audit, paired.

    python benchmarks/harm_audit.py --weights resnet20-12fca82f.th --data cifar10.npz --out runs/harm_audit

Below --out lie the run (made if it is not there; --run names one that exists) and `apart.safetensors`: a ResNet-20 that
is trained from other random weights, so that the attribution drift between two trainings stands beside the student's.
Writes results/harm_audit.json. The test split is audited, for nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic_core import to_jsonable_python
from safetensors.torch import save_file

from causal_compress.afterwards import audit_run
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.pipeline import compress
from causal_compress.provenance import machine
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Audit, Compared, Estimate
from causal_compress.shipped import find_recipe

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "harm_audit.json"
EPOCHS = 10
DISTILLED = 8  # epochs: enough to recover most, and an hour less than the recipe's


def main() -> None:
    """Compress and train where that was not done yet, audit, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public ResNet-20")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a finished run of ResNet-20 at half the MACs; default: OUT/run")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the network that is trained apart")
    parser.add_argument("--inputs", type=int, help="audit so many test inputs only")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="recipe keys for a run that is made here")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the table")
    args = parser.parse_args()
    if args.result == RESULT and (args.inputs is not None or args.epochs < EPOCHS or args.settings):
        parser.error("a quick look must not overwrite the measured table: name another --result")
    folder = args.run or args.out / "run"
    args.out.mkdir(parents=True, exist_ok=True)
    if not (folder / "scorecard.json").exists():
        inputs = [
            f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:resnet20",
            f"model.weights={args.weights}",
            f"data.source=npz:{args.data}",
            "budget.macs=0.5",
            f"distill.epochs={DISTILLED}",
        ]
        recipe = load_recipe(find_recipe("cifar-resnet"), [*inputs, *args.settings])
        compress(recipe, folder, command=["python", "benchmarks/harm_audit.py"])
    recipe = load_recipe(folder / "recipe.resolved.yaml")
    apart = args.out / "apart.safetensors"
    if not apart.exists():
        train_apart(recipe, apart, args.epochs)
    limits = {} if args.inputs is None else {"inputs": args.inputs}
    found = audit_run(folder, {"split": "test", "groups": "class", **limits}, apart=apart)
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    command = " ".join(["python benchmarks/harm_audit.py", *shown])
    whole = to_jsonable_python(found, inf_nan_mode="constants")
    del whole["gallery"]  # pictures of the data
    result = {"schema": 1, "machine": machine(), "command": command, "rows": list(rows_of(found)), "audit": whole}
    args.result.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.result, json.dumps(result, indent=1) + "\n")


def train_apart(recipe: Recipe, target: Path, epochs: int) -> None:
    """Train the recipe's architecture on labels from random weights (SGD, one cycle), and write the weights."""
    data = load_data(recipe.data, seed=recipe.seed)
    torch.manual_seed(recipe.seed + 1)
    model = build_model(recipe.model.model_copy(update={"weights": None}), classes=len(data.classes)).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rounds = -(-len(data.train) // 128) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=rounds)
    for epoch in range(epochs):
        for x, y in data.train.batches(128, shuffle_seed=1000 + epoch, augment=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        sys.stderr.write(f"training apart: epoch {epoch + 1} of {epochs}, loss {float(loss):.3f}\n")
    partial = target.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
    partial.replace(target)


def rows_of(found: Audit) -> Iterator[dict[str, Any]]:
    """The audit as a table: one line for each figure, student minus teacher with its interval."""
    yield accuracies("accuracy [%]", found.overall)
    for one in found.quality:
        values = (one.teacher, one.student)
        change = one.change or Estimate(value=one.student - one.teacher, low=math.nan, high=math.nan, n=found.n)
        yield estimated(f"{one.measure} [{one.unit}]", values, change)
    for group in found.per_class:
        yield accuracies(f"class {group.name} [%]", group.compared, group.p_holm)
    if (gaps := found.groups) is not None:
        yield estimated("gap between classes [pp]", (gaps.teacher_gap_pp, gaps.student_gap_pp), gaps.growth_pp)
    for damaged in found.corruptions:
        yield accuracies(f"{damaged.corruption} {damaged.severity}: {damaged.setting} [%]", damaged.compared)
        yield estimated("  drop beyond clean [pp]", (None, None), damaged.extra_drop_pp)
    yield from drift_rows(found)


def drift_rows(found: Audit) -> Iterator[dict[str, Any]]:
    """Rank agreements with the teacher; the interval is that of the agreement itself."""
    if (drift := found.attribution) is not None:
        told = {"student": drift.student, "teacher with other masks": drift.floor, "trained apart": drift.apart}
        for name, agreement in told.items():
            if agreement is not None:
                yield estimated(f"attributions, rank agreement: {name}", (None, None), agreement)
        yield estimated("attributions, below the floor: student", (None, None), drift.beyond_floor)
    if (nodes := found.causal_map) is not None:
        agreements = (nodes.floor, nodes.student)
        yield row("causal map, rank agreement: floor, student", agreements, (None, None, None), len(nodes.nodes))


def estimated(name: str, values: tuple[float | None, float | None], one: Estimate) -> dict[str, Any]:
    """One estimate with its interval."""
    return row(name, values, (one.value, one.low, one.high), one.n)


def accuracies(name: str, compared: Compared, p_value: float | None = None) -> dict[str, Any]:
    """One comparison of accuracies; the change is minus the drop."""
    low, high = compared.drop_ci_pp
    change = (0.0 - compared.drop_pp, 0.0 - high, 0.0 - low)
    found = row(name, (compared.teacher.pct, compared.student.pct), change, compared.teacher.n)
    return {**found, "p": round(compared.p_value if p_value is None else p_value, 5)}


def row(
    name: str, values: tuple[float | None, float | None], change: tuple[float | None, ...], n: int
) -> dict[str, Any]:
    """One line; numbers rounded for people, the whole audit stands beside it."""
    shown = [None if value is None or math.isnan(value) else round(value, 4) for value in (*values, *change)]
    return {
        "figure": name,
        "teacher": shown[0],
        "student": shown[1],
        "change": shown[2],
        "change_ci": shown[3:],
        "n": n,
        "p": None,
    }


if __name__ == "__main__":
    main()
