"""A limit on the drop of accuracy and nothing else: which ResNet-20 is found, how long it takes, what is refused.

    python benchmarks/budget_search.py --weights resnet20-12fca82f.th --data cifar10.npz --out runs/search

First a budget that nothing can meet (a thousandth of the MACs), which has to be refused; then the search, unattended,
from the analysis that the refusal left. Validation inputs come from the test split, since the public teacher has seen
all training images; the others are read once, at the end. A run that was cut off goes on (say so with --note). Writes
results/budget_search.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causal_compress.errors import BudgetError
from causal_compress.files import atomic_write_text
from causal_compress.pipeline import compress
from causal_compress.provenance import machine
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Distilled, Pareto
from causal_compress.runs import read_provenance, read_result
from causal_compress.shipped import find_recipe

HERE = Path(__file__).parent
IMPOSSIBLE = 0.001


def recipe_for(given: argparse.Namespace, budget: dict[str, Any], seed: int) -> Recipe:
    """The shipped recipe with this budget.

    Args:
        given: Weights and data from the command line.
        budget: Replaces the recipe's.
        seed: Of everything random.
    """
    settings = {
        "model.arch": f"{HERE.parent / 'examples' / 'cifar_resnet.py'}:resnet20",
        "model.weights": given.weights,
        "data.source": f"npz:{given.data}",
        "data.validation_from": "test",
        "data.validation": 5000,
        "budget": budget,
        "seed": seed,
    }
    return load_recipe(find_recipe("cifar-resnet"), [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def refused(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of a budget that can't be met: minutes until that was said, and what was said to be possible."""
    try:
        compress(recipe_for(given, {"macs": IMPOSSIBLE, "max_accuracy_drop": None}, given.seed), folder)
    except BudgetError as error:
        about = {"verdict": "refused", "why": f"{error.what}; {error.found}"}
    else:
        about = {"verdict": "not refused", "why": None}
    return {"asked": f"{IMPOSSIBLE:g} of the MACs", "minutes": round(_seconds([folder]) / 60, 1), **about}


def searched(given: argparse.Namespace, folder: Path, analysis: Path) -> dict[str, Any]:
    """The row of the search. Minutes are the sum over the stages of all sizes, those of the analysis among them."""
    limit = given.max_accuracy_drop
    card = compress(
        recipe_for(given, {"macs": None, "max_accuracy_drop": limit}, given.seed), folder, reuse=analysis
    ).scorecard
    teacher, student = (next(row for row in card.rows if row.model == name) for name in ("teacher", "student"))
    pareto = read_result(folder, "search", Pareto)
    return {
        "asked": f"drop of at most {limit:g} pp",
        "minutes": round(_seconds([analysis, folder, *sorted((folder / "points").iterdir())]) / 60, 1),
        "verdict": card.verdict,
        "why": pareto.reason,
        "macs_kept": round(student.macs / teacher.macs, 4),
        "params_kept": round(student.params / teacher.params, 4),
        "accuracy_pct": student.accuracy_pct,
        "teacher_accuracy_pct": teacher.accuracy_pct,
        "drop_pp": student.drop_pp,
        "drop_ci_pp": student.drop_ci_pp,
        "n": student.n,
        "points": [
            {
                "macs": round(point.macs, 4),
                "epochs": point.epochs,
                "validation_drop_pp": round(point.drop_pp, 2),
            }
            for point in pareto.points
        ],
    }


def _seconds(folders: Sequence[Path]) -> float:
    """What all stages took, each once; a recovery that went on has noted the time of each of its epochs."""
    took: dict[str, float] = {}
    for folder in folders:
        for stage in read_provenance(folder).stages:
            if stage.stage == "distill":
                took[stage.key] = max(stage.seconds, read_result(folder, "distill", Distilled).seconds)
            elif stage.stage != "search":  # consists of the others
                took[stage.key] = stage.seconds
    return sum(took.values())


def main() -> None:
    """Refuse, search, and write both rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public ResNet-20")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-accuracy-drop", type=float, default=0.5, help="[pp]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", help="what a reader of the minutes has to know")
    parser.add_argument("--result", type=Path, default=HERE / "results" / "budget_search.json")
    given = parser.parse_args()
    rows = [refused(given, given.out / "refused")]
    print(rows[0], flush=True)
    rows.append(searched(given, given.out / "found", given.out / "refused"))
    print(rows[1], flush=True)
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    command = shlex.join(["python", "benchmarks/budget_search.py", *shown])
    about = {"note": given.note, "command": command}
    rows = [{"arch": "resnet20", "seed": given.seed, **row} for row in rows]
    atomic_write_text(
        given.result, json.dumps({"schema": 1, "machine": machine(), **about, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
