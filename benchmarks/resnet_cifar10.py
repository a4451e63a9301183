"""Accuracy at a given cost: ResNet-56 on CIFAR-10 from the public checkpoint, distilled, five sizes.

    python benchmarks/resnet_cifar10.py --weights resnet56-4bfd9763.th --data cifar10.npz --out runs/records
    python benchmarks/resnet_cifar10.py ... --removed 53 --epochs 40 --seeds 0

One run folder for each size and seed below --out; all sizes of a seed share one analysis, and a run that was cut off
goes on. All 10,000 test images are read once for each, after the last epoch. Writes results/resnet_cifar10.json after
each run; rows of other sizes, epochs, seeds or settings that stand there stay, each with its machine. Minutes are of
all stages but an analysis that was taken over.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from causal_compress.files import atomic_write_text
from causal_compress.pipeline import compress
from causal_compress.provenance import machine
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Distilled
from causal_compress.runs import read_provenance, read_result
from causal_compress.shipped import find_recipe

HERE = Path(__file__).parent
REMOVED = [53.0, 61.0, 71.0, 76.0, 89.0]
# The teacher is most of a step beside so small a student, and one of a hundred layers wants short steps (LOG.md).
RECOVERY = {"distill.views": 10, "distill.relative_rate": 0.003}
TIMED = ("student", "onnxruntime", 1)  # what fewer MACs were worth in time


def row_of(folder: Path, removed: float, epochs: int, seed: int) -> dict[str, Any]:
    """One line of the table, from a finished run folder."""
    card = json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    student, teacher = (next(row for row in card["rows"] if row["model"] == name) for name in ("student", "teacher"))
    timed = [row for row in card["rows"] if (row["model"], row["runtime"], row["batch"]) == TIMED]
    return {
        "arch": "resnet56",
        "target_removed_pct": removed,
        "macs_removed_pct": round(100 * (1 - student["macs"] / teacher["macs"]), 2),
        "params": student["params"],
        "accuracy_pct": student["accuracy_pct"],
        "teacher_accuracy_pct": teacher["accuracy_pct"],
        "drop_pp": student["drop_pp"],
        "drop_ci_pp": student["drop_ci_pp"],
        "n": student["n"],
        "onnxruntime_speedup_batch_1": timed[0]["speedup"] if timed else None,
        "onnxruntime_speedup_ci": timed[0]["speedup_ci"] if timed else None,
        "epochs": epochs,
        "minutes": round(_seconds(folder) / 60, 1),
        "recovered_on": read_result(folder, "distill", Distilled).device,
        "seed": seed,
        "cpu": machine()["cpu"],
    }


def together(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows, and those of before that they don't replace, by size; all have the keys of the newest."""
    kept = {_name(row): row for row in [*({"recovered_on": "cpu", **row} for row in before), *rows]}
    keys = [key for row in rows[-1:] for key in row]
    return [{**dict.fromkeys(keys), **kept[name], "views": _views(kept[name])} for name in sorted(kept)]


def _name(row: dict[str, Any]) -> tuple[float, int, int, str]:
    return row["target_removed_pct"], row["epochs"], row["seed"], row.get("settings") or ""


def _views(row: dict[str, Any]) -> str:
    """How many views of each image the student learned from; `new`: another one in every epoch."""
    own = dict(setting.split("=", 1) for setting in (row.get("settings") or "").split())
    asked = own.get("distill.views", str(RECOVERY["distill.views"]))
    return "new" if asked == "null" else asked


def _seconds(folder: Path) -> float:
    """What all stages took; a recovery that was cut off and went on has noted the time of each of its epochs."""
    trained = read_result(folder, "distill", Distilled).seconds
    stages = read_provenance(folder).stages
    return sum(max(stage.seconds, trained) if stage.stage == "distill" else stage.seconds for stage in stages)


def main() -> None:
    """Run or read back every size, and write the table's results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public ResNet-56")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--removed", type=float, nargs="+", default=REMOVED, help="MACs to remove [percent]")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="further recipe keys")
    parser.add_argument("--analysis", type=Path, help="a run folder whose analysis is taken over where it is the same")
    parser.add_argument("--result", type=Path, default=HERE / "results" / "resnet_cifar10.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    before = json.loads(given.result.read_text(encoding="utf-8"))["rows"] if given.result.exists() else []
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    command = " ".join(["python benchmarks/resnet_cifar10.py", *shown])
    for seed in given.seeds:
        analysis: Path | None = given.analysis
        for removed in given.removed:
            settings = [
                f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:resnet56",
                f"model.weights={given.weights}",
                f"data.source=npz:{given.data}",
                f"budget.macs={1 - removed / 100}",
                f"distill.epochs={given.epochs}",
                f"seed={seed}",
                *(f"{key}={value}" for key, value in RECOVERY.items()),
                *given.settings,
            ]
            folder = given.out / f"{removed:g}-{given.epochs}-{seed}"
            recipe = load_recipe(find_recipe("cifar-resnet"), settings)
            compress(recipe, folder, command=["python", "benchmarks/resnet_cifar10.py"], reuse=analysis)
            analysis = analysis or folder
            own = " ".join(word for word in given.settings if not word.startswith(("benchmark", "threads")))
            rows.append({**row_of(folder, removed, given.epochs, seed), "settings": own})
            print(rows[-1], flush=True)
            result = {"schema": 1, "machine": machine(), "command": command, "rows": together(before, rows)}
            atomic_write_text(given.result, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
