"""ResNet-56 on CIFAR-10 from the public checkpoint: without training, and with distillation, from one analysis.

    python benchmarks/resnet56.py --weights resnet56-4bfd9763.th --data cifar10.npz --out runs/resnet56

Each variant is a run folder below --out; a finished one is read back, so the script can be stopped and started again.
Writes results/resnet56_no_training.json, results/resnet56_distilled.json and results/resnet56_speed.json: at equal
measured latency, what borrowed channels and Gauss-Newton steps are worth. Rows of other variants that stand there stay,
and those of other processors, which like other channel counts and make other times. All 10,000 test images are read
once for each variant, at its end; everything is chosen on training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from causal_compress.files import atomic_write_text
from causal_compress.pipeline import compress
from causal_compress.provenance import machine
from causal_compress.recipe_file import load_recipe
from causal_compress.runs import read_provenance
from causal_compress.shipped import find_recipe

HERE = Path(__file__).parent
QUICK = ["benchmark.runtimes=[onnxruntime]", "benchmark.batches=[1]"]
FULL_RANK = ["plan.low_rank=false"]  # depth and width alone; `all` splits layers as well
NO_TRAINING = ["distill=null", "budget.max_accuracy_drop=null"]
SPEED = [
    *NO_TRAINING, *FULL_RANK, *QUICK,
    "budget.macs=null", "budget.latency_ms.keep=0.495", "plan.align=cpu", "plan.max_span=4",
]  # fmt: skip

VARIANTS: dict[str, list[str]] = {
    "both-055": [*NO_TRAINING, *FULL_RANK, "budget.macs=0.55"],
    "both-033": [*NO_TRAINING, *FULL_RANK, *QUICK, "budget.macs=0.33"],
    "width-055": [*NO_TRAINING, *FULL_RANK, *QUICK, "budget.macs=0.55", "plan.depth=false"],
    "depth-055": [*NO_TRAINING, *FULL_RANK, *QUICK, "budget.macs=0.55", "plan.width=false"],
    "width-033": [*NO_TRAINING, *FULL_RANK, *QUICK, "budget.macs=0.33", "plan.depth=false"],
    "depth-033": [*NO_TRAINING, *FULL_RANK, *QUICK, "budget.macs=0.33", "plan.width=false"],
    "all-047": [*NO_TRAINING, *QUICK, "budget.macs=0.471"],
    "all-033": [*NO_TRAINING, *QUICK, "budget.macs=0.333"],
    "latency-049": [*NO_TRAINING, "budget.macs=null", "budget.latency_ms.keep=0.49", "plan.align=16"],
    "latency-052": [*NO_TRAINING, "budget.macs=null", "budget.latency_ms.keep=0.52", "plan.align=16"],
    "speed": SPEED,
    "speed-gauss-newton": [*SPEED, "prune.refine=true"],
    "speed-no-borrowing": [*SPEED, "plan.borrow=false"],
    "distilled-050": [*FULL_RANK, "budget.macs=0.5", "distill.epochs=20"],
}


def main() -> None:
    """Run or read back the variants, then write the tables' results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, help="of the compression; default: all")
    parser.add_argument("--analysis", type=Path, help="a run whose analysis is taken over by the first variant")
    args = parser.parse_args()
    inputs = [
        f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:resnet56",
        f"model.weights={args.weights}",
        f"data.source=npz:{args.data}",
        *([] if args.threads is None else [f"threads={args.threads}"]),
    ]
    rows: dict[str, list[dict[str, Any]]] = {"no_training": [], "distilled": [], "speed": []}
    analyses: dict[tuple[str, ...], Path] = {}  # by the settings that an analysis depends on
    for name, overrides in VARIANTS.items():
        folder = args.out / name
        kind = tuple(
            setting
            for setting in overrides
            if setting.startswith(("plan.low_rank", "plan.align", "plan.max_span", "plan.borrow"))
        )
        if name in args.only:
            recipe = load_recipe(find_recipe("cifar-resnet"), [*inputs, *overrides])
            known = analyses.get(kind, args.analysis)
            compress(recipe, folder, command=["python", "benchmarks/resnet56.py", name], reuse=known)
        if (folder / "scorecard.json").exists():
            analyses.setdefault(kind, folder)
            rows[next((kind for kind in rows if name.startswith(kind)), "no_training")].append(row_of(name, folder))
    for name, found in rows.items():
        if found:
            target = HERE / "results" / f"resnet56_{name}.json"
            before = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
            told = {"schema": 1, "machine": machine(), "command": "benchmarks/resnet56.py"}
            atomic_write_text(target, json.dumps({**told, "rows": together(before, found)}, indent=1) + "\n")


def together(before: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows, and those of an earlier result that they don't replace; all have the keys of the newest.

    Args:
        before: The file as it stands; its rows without a processor were made on its machine.
        rows: At least one.
    """
    earlier = [{"cpu": before["machine"]["cpu"], **row} for row in before.get("rows", [])]
    kept = {(row["variant"], row["cpu"]): row for row in [*earlier, *rows]}
    order = sorted(kept, key=lambda name: (list(VARIANTS).index(name[0]), name[1]))
    return [{key: kept[name].get(key) for key in rows[-1]} for name in order]


def row_of(name: str, folder: Path) -> dict[str, Any]:
    """One line of the table, from a finished run folder."""
    card = json.loads((folder / "scorecard.json").read_text())
    onnx = [row for row in card["rows"] if row["runtime"] == "onnxruntime" and row["threads"] == 1]
    student = next(row for row in onnx if row["model"] == "student" and row["batch"] == 1)
    teacher = next(row for row in onnx if row["model"] == "teacher" and row["batch"] == 1)
    provenance = read_provenance(folder)
    plan = json.loads((folder / "plan.json").read_text())
    distilled = folder / "distill.json"
    recipe = load_recipe(folder / "recipe.resolved.yaml", [])
    limit = recipe.budget.latency_ms
    return {
        "arch": "resnet56",
        "variant": name,
        "latency_asked": limit and limit.keep,
        "calibration_inputs": recipe.data.calibration,
        "macs_kept": round(student["macs"] / teacher["macs"], 4),
        "params": student["params"],
        "accuracy_pct": student["accuracy_pct"],
        "n": student["n"],
        "drop_pp": student["drop_pp"],
        "drop_ci_pp": student["drop_ci_pp"],
        "regions_merged": sum(d["candidate"]["last"] - d["candidate"]["first"] for d in plan["decisions"]),
        "predicted_harm_kl": round(plan["predicted_harm_kl"], 4),
        "measured_harm_kl": round(json.loads((folder / "prune.json").read_text())["heldout_kl"], 4),
        "onnxruntime_speedup_batch_1": student["speedup"],
        "onnxruntime_speedup_ci": student["speedup_ci"],
        "epochs": len(json.loads(distilled.read_text())["epochs"]) if distilled.exists() else 0,
        "minutes": round(sum(stage.seconds for stage in provenance.stages) / 60, 1),
        "seed": provenance.seed,
        "cpu": machine()["cpu"],
    }


if __name__ == "__main__":
    main()
