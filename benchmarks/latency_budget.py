"""A budget on measured latency beside a budget on MACs: ResNet-20 on CIFAR-10, from the public checkpoint, untrained.

    python benchmarks/latency_budget.py --weights resnet20-12fca82f.th --data cifar10.npz --out runs/latency

One run each, from one analysis: half of the teacher's latency on ONNX Runtime (batch 1, one thread); then the same
share of the MACs as that student kept, planned by MACs alone. A run folder that is there is read back. The share of
the latency is what the last benchmark measured on the written ONNX files, not what the plan foresaw; accuracy is of
all test images, read once. Writes results/latency_budget.json.
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
SETTINGS = [
    "distill=null",
    "budget.max_accuracy_drop=null",
    "benchmark.runtimes=[onnxruntime]",
    "benchmark.batches=[1]",
    "benchmark.threads=[1]",
]


def row_of(planned_by: str, folder: Path, target: float) -> dict[str, Any]:
    """One line of the table, from a finished run folder.

    Args:
        planned_by: "latency" or "macs".
        folder: The run.
        target: Share of the teacher's latency that was asked for, or would have been.
    """
    card = json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    of = {row["model"]: row for row in card["rows"] if (row["runtime"], row["batch"]) == ("onnxruntime", 1)}
    student, teacher = of["student"], of["teacher"]
    share = 1 / student["speedup"]
    return {
        "arch": "resnet20",
        "planned_by": planned_by,
        "latency_target": target,
        "latency_share": round(share, 4),
        "latency_share_ci": [round(1 / end, 4) for end in reversed(student["speedup_ci"])],
        "off_target_pct": round(100 * (share / target - 1), 2),
        "latency_share_planned": plan["latency_measured"],
        "macs_kept": round(student["macs"] / teacher["macs"], 4),
        "params_kept": round(student["params"] / teacher["params"], 4),
        "accuracy_pct": student["accuracy_pct"],
        "teacher_accuracy_pct": teacher["accuracy_pct"],
        "drop_pp": student["drop_pp"],
        "drop_ci_pp": student["drop_ci_pp"],
        "n": student["n"],
        "minutes": round(sum(stage.seconds for stage in read_provenance(folder).stages) / 60, 1),
    }


def main() -> None:
    """Run or read back both, then write the table's results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public ResNet-20")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the teacher's latency")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="further recipe keys")
    parser.add_argument("--result", type=Path, default=HERE / "results" / "latency_budget.json")
    given = parser.parse_args()
    inputs = [
        f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:resnet20",
        f"model.weights={given.weights}",
        f"data.source=npz:{given.data}",
        *SETTINGS,
        *given.settings,
    ]

    def finished(name: str, budget: list[str], analysis: Path | None = None) -> dict[str, Any]:
        folder: Path = given.out / name
        if not (folder / "scorecard.json").exists():
            recipe = load_recipe(find_recipe("cifar-resnet"), [*inputs, *budget])
            compress(recipe, folder, command=["python", "benchmarks/latency_budget.py", name], reuse=analysis)
        return row_of(name, folder, given.keep)

    timed = finished("latency", ["budget.macs=null", f"budget.latency_ms.keep={given.keep}"])
    counted = finished("macs", [f"budget.macs={timed['macs_kept']}"], given.out / "latency")
    result = {"schema": 1, "machine": machine(), "command": "python benchmarks/latency_budget.py"}
    atomic_write_text(given.result, json.dumps({**result, "rows": [timed, counted]}, indent=1) + "\n")
    for row in (timed, counted):
        print(row)


if __name__ == "__main__":
    main()
