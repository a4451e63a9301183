"""AlexNet on MNIST: torchvision's network with ten classes (57.0 M parameters), made as small as asked for.

    python benchmarks/alexnet_mnist.py --data mnist.npz
    python benchmarks/alexnet_mnist.py --data mnist.npz --removed 99.42 99.9 --seeds 0 1 2 --work runs/alexnet

The teacher is trained here, on the product's own training split (28 x 28 grey images resized to 96 x 96, three equal
channels, as the architecture wants). Students come out of the shipped recipe `tiny-cnn` with a budget on parameters.
All 10,000 test images are read once for each student, after its last epoch. Teachers and run folders in --work are
used again. Writes results/alexnet_mnist.json after each row; rows of other sizes and seeds stay there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
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
from causal_compress.progress import progress
from causal_compress.provenance import machine
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.runs import read_provenance
from causal_compress.shipped import find_recipe

RESULTS = Path(__file__).parent / "results"
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 4, 256, 0.03, 0.9, 5e-4
SIDE = 96
SETTINGS = ("pixels", "rotation", "zoom", "optimizer", "intervened_share", "epochs")


def recipe_for(data: Path, weights: Path, kept: float, epochs: int, seed: int, threads: int | None = None) -> Recipe:
    """The shipped recipe with MNIST, this teacher and this budget.

    Args:
        data: npz file of MNIST.
        weights: The teacher's.
        kept: Largest share of parameters.
        epochs: Of distillation.
        seed: Of splits, masks and distillation.
        threads: Of the compression; None: all.
    """
    given = {
        "model.arch": "torchvision:alexnet",
        "model.args": {"num_classes": 10},
        "model.weights": str(weights),
        "data.source": f"npz:{data}",
        "data.image_size": SIDE,
        "data.channels": 3,
        "data.normalize": {"mean": [0.1307] * 3, "std": [0.3081] * 3},
        "budget.params": kept,
        "distill.epochs": epochs,
        "seed": seed,
        "threads": threads,
    }
    return load_recipe(find_recipe("tiny-cnn"), [f"{key}={json.dumps(value)}" for key, value in given.items()])


def train(model: nn.Module, data: Data, seed: int) -> nn.Module:
    """Train the teacher: SGD, one cycle, bfloat16 where the CPU multiplies it.

    Args:
        model: Changed in place.
        data: Trains on `train`, augmented as the recipe says.
        seed: Of the order of images.
    """
    steps = -(-len(data.train) // BATCH)
    parameters = model.train().parameters()
    optimizer = torch.optim.SGD(parameters, RATE, MOMENTUM, weight_decay=DECAY, nesterov=True, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * steps, pct_start=0.2)
    for epoch in progress(range(EPOCHS), label="training the teacher", unit="epoch"):
        for x, y in data.train.batches(BATCH, shuffle_seed=1000 * seed + epoch, augment=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def make_teacher(data: Path, weights: Path, seed: int) -> None:
    """Train a teacher on crops alone, as the students of all tables had theirs, and write its weights."""
    recipe = recipe_for(data, weights, 1.0, 0, seed)
    crops = recipe.data.augment.model_copy(update={"rotation": 0.0, "zoom": 1.0})
    torch.manual_seed(seed)
    model = build_model(recipe.model.model_copy(update={"weights": None}))
    images = load_data(recipe.data.model_copy(update={"augment": crops}), seed=seed)
    save_file(train(model, images, seed).state_dict(), weights)


def measure(given: argparse.Namespace, work: Path, removed_pct: float, seed: int) -> dict[str, Any]:
    """One row: a teacher and its student.

    Args:
        given: Data, epochs and threads from the command line.
        work: Teacher and run folder are made here.
        removed_pct: Parameters to remove [percent].
        seed: Of everything.
    """
    weights = work / f"teacher-{seed}.safetensors"
    if not weights.exists():
        make_teacher(given.data, weights, seed)
    recipe = recipe_for(given.data, weights, 1 - removed_pct / 100, given.epochs, seed, given.threads)
    folder = _folder(work, removed_pct, seed)
    earlier = [found.parent for found in sorted(work.glob(f"run-*-{seed}/prune.json"))]  # its analysis serves again
    card = compress(recipe, folder, reuse=earlier[0] if earlier else None).scorecard
    teacher, student = (next(row for row in card.rows if row.model == name) for name in ("teacher", "student"))
    return {
        "target_removed_pct": removed_pct,
        "params": student.params,
        "teacher_params": teacher.params,
        "removed_pct": round(100 * (1 - student.params / teacher.params), 4),
        "accuracy_pct": student.accuracy_pct,
        "teacher_accuracy_pct": teacher.accuracy_pct,
        "drop_pp": student.drop_pp,
        "drop_ci_pp": student.drop_ci_pp,
        "n": student.n,
        "pixels": SIDE,
        **recipe.data.augment.model_dump(include={"crop_padding", "rotation", "zoom"}),
        **(recipe.distill.model_dump(include={"intervened_share", "optimizer"}) if recipe.distill else {}),
        "epochs": given.epochs,
        "minutes": round(sum(stage.seconds for stage in read_provenance(folder).stages) / 60, 1),
        "seed": seed,
    }


def _folder(work: Path, removed_pct: float, seed: int) -> Path:
    return work / f"run-{removed_pct:g}-{seed}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz with MNIST")
    parser.add_argument("--removed", type=float, nargs="+", default=[99.42], help="parameters to remove [percent]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=5, help="of distillation")
    parser.add_argument("--threads", type=int, help="of the compression; default: all")
    parser.add_argument("--work", type=Path, help="keep teachers and run folders here; unfinished ones go on")
    parser.add_argument("--kept", action="store_true", help="only the rows whose runs in --work are finished")
    parser.add_argument("--out", type=Path, default=RESULTS / "alexnet_mnist.json")
    given = parser.parse_args()
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join(["python benchmarks/alexnet_mnist.py", *shown])}
    rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for seed in given.seeds:
            for share in given.removed:
                if given.kept and not (_folder(work, share, seed) / "scorecard.json").exists():
                    continue
                row = measure(given, work, share, seed)
                print(row, flush=True)
                rows = together(rows, [row])
                result = {**content, "rows": rows, "over_seeds": over_seeds(rows, SETTINGS)}
                atomic_write_text(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
