"""What each part of recovery is worth: one student, taught many times, each time with one thing changed.

    python benchmarks/recovery.py --weights resnet20-12fca82f.th --data cifar10.npz --work runs/recovery

ResNet-20 at half the MACs. Accuracy, cross entropy and output KL (T = 4, unscaled) are read on 5,000 validation inputs
that come from the test split, since the public teacher has seen all training images; the rest of the test split is not
read. Rates shrink with the length of a recovery, as a search's do. Every run is kept in --work; results of other
lengths and seeds stay in results/recovery.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from budget_search import recipe_for
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Split
from causal_compress.provenance import machine
from causal_compress.recipe import Recipe
from causal_compress.recover import training
from causal_compress.recover.distill import distill, resolve_device
from causal_compress.runs import open_run
from causal_compress.searching import shortened
from causal_compress.shrink.surgery import Student, boundaries, save_weights
from causal_compress.stages import Understood, shrink_depth, shrink_width, understand
from causal_compress.understand.statistics import paired_drop

HERE = Path(__file__).parent
SHIPPED = "as shipped"
TEMPERATURE = 4.0
PLACE = "recovered_on.txt"


def dist_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """One minus the correlations of softened outputs: over the classes of each input, over the inputs of each class.

    Args:
        student: Logits (samples, classes).
        teacher: Logits (samples, classes) of the same inputs.
        temperature: Both are divided by this; the loss is multiplied by its square.

    Source: Huang et al. 2022, "Knowledge distillation from a stronger teacher", arXiv:2205.10536, equal weights.
    """
    ours, wanted = (F.softmax(logits.float() / temperature, 1) for logits in (student, teacher))
    between = 1.0 - _correlation(ours, wanted).mean()
    within = 1.0 - _correlation(ours.T, wanted.T).mean()
    return (between + within) * temperature**2


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True))


class Committee(nn.Module):
    """Several networks that answer with the mean of their logits."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Mean logits (samples, classes)."""
        return torch.stack([member(x) for member in self.members]).mean(0)


@dataclass(frozen=True)
class Variant:
    """What is changed: recipe keys, functions of the training, or who teaches."""

    settings: dict[str, Any] = field(default_factory=dict)
    patched: tuple[str, Callable[..., Any]] | None = None
    committee: bool = False

    def changed(self) -> AbstractContextManager[Any]:
        """Inside, training is as the variant wants it."""
        return nullcontext() if self.patched is None else patch.object(training, *self.patched)


VARIANTS = {
    SHIPPED: Variant(),
    "without boundary loss": Variant({"boundary_weight": 0.0}),
    "without interventions": Variant({"intervened_share": 0.0}),
    "half of each batch intervened": Variant({"intervened_share": 0.5}),
    "without labels": Variant({"label_weight": 0.0}),
    "labels for half of the loss": Variant({"label_weight": 0.5}),
    "labels alone": Variant({"label_weight": 1.0}),
    "temperature 1": Variant({"temperature": 1.0}),
    "temperature 2, labels for half": Variant({"temperature": 2.0, "label_weight": 0.5}),
    "DIST instead of KL": Variant(patched=("kd_loss", dist_loss)),
    "SGD instead of Muon": Variant({"optimizer": "sgd"}),
    "without averaged weights": Variant({"ema": 0.0}),
    "rate not annealed": Variant(patched=("learning_rate_at", lambda step, steps, peak: peak)),
    "one view of each image": Variant({"views": 1}),
    "four views, without boundary loss": Variant({"views": 4, "boundary_weight": 0.0}),
    "teacher and recovered student teach": Variant({"boundary_weight": 0.0}, committee=True),
}


@dataclass(frozen=True)
class Case:
    """The student before recovery, for one seed."""

    recipe: Recipe
    known: Understood
    student: Student


def open_case(given: argparse.Namespace, seed: int) -> Case:
    """Analysis, plan and surgery, from --work where they are there."""
    recipe = recipe_for(given, {"macs": 0.5}, seed)
    with open_run(given.work / f"surgery-{seed}", recipe, command=("recovery.py",), reuse=given.analysis) as run:
        known = understand(run, recipe, force=True)
        _, student = shrink_depth(run, recipe, known)
        _, student = shrink_width(run, recipe, known, student)
    return Case(recipe, known, student)


def taught(case: Case, variant: Variant, epochs: int, folder: Path, shipped: Path) -> nn.Module:
    """The student after recovery, from its file if it is there; one that was cut off goes on."""
    network, weights = case.known.network, folder / "student.safetensors"
    if weights.exists():
        trained = copy.deepcopy(case.student.graph)
        trained.load_state_dict(load_file(weights))
        return trained
    assert case.recipe.distill is not None
    section = shortened(case.recipe.distill, epochs).model_copy(update=variant.settings)
    teacher: nn.Module = network.graph
    pairs = boundaries(case.student, network, case.known.plan) if section.boundary_weight else []
    if variant.committee:
        other = copy.deepcopy(case.student.graph)
        other.load_state_dict(load_file(shipped / "student.safetensors"))
        teacher = Committee([network.graph, other]).eval()
    folder.mkdir(parents=True, exist_ok=True)
    device = resolve_device(case.recipe.device)
    arguments = {"seed": case.recipe.seed, "device": device, "progress_dir": folder}
    with variant.changed():
        trained, _ = distill(case.student.graph, teacher, pairs, case.known.data, section, **arguments)
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else machine()["cpu"]
    atomic_write_text(folder / PLACE, place)
    save_weights(trained, folder / "partial.safetensors")
    (folder / "partial.safetensors").replace(weights)
    return trained


def read(model: nn.Module, teacher: nn.Module, split: Split) -> tuple[NDArray[np.bool_], float, float]:
    """Which inputs are answered rightly, cross entropy, and KL from the teacher's softened outputs [nats]."""
    hits, losses, divergences = [], [], []
    with torch.no_grad():
        for x, y in split.batches(250):
            ours, wanted = model.eval()(x), teacher(x)
            hits.append((ours.argmax(1) == y).numpy())
            losses.append(F.cross_entropy(ours, y, reduction="none"))
            soft = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (ours, wanted))
            divergences.append(F.kl_div(*soft, log_target=True, reduction="none").sum(1))
    return np.concatenate(hits), torch.cat(losses).mean().item(), torch.cat(divergences).mean().item()


def rows_of(given: argparse.Namespace, case: Case, epochs: int) -> Iterator[dict[str, Any]]:
    """One row for each variant, compared with the recovery as shipped, which comes first."""
    network, split, seed = case.known.network.graph, case.known.data.validation, case.recipe.seed
    best: NDArray[np.bool_] | None = None
    for name in [SHIPPED, *(name for name in given.variants if name != SHIPPED)]:
        folders = [given.work / f"{each.replace(' ', '-')}-{epochs}-{seed}" for each in (name, SHIPPED)]
        model = taught(case, VARIANTS[name], epochs, *folders)
        hits, entropy, divergence = read(model, network, split)
        best = hits if best is None else best
        gain, interval = paired_drop(int((hits & ~best).sum()), int((best & ~hits).sum()), len(hits))
        yield {
            "arch": "resnet20",
            "variant": name,
            "epochs": epochs,
            "seed": seed,
            "validation_pct": round(100 * float(hits.mean()), 2),
            "n": len(hits),
            "gain_pp": None if name == SHIPPED else gain,
            "gain_ci_pp": None if name == SHIPPED else interval,
            "cross_entropy_nats": round(entropy, 4),
            "output_kl_nats": round(divergence, 5),
            "recovered_on": (folders[0] / PLACE).read_text(encoding="utf-8"),
        }


def together(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows, and those of before that they don't replace (their place once had another name)."""
    old = [{"recovered_on" if key == "cpu" else key: value for key, value in row.items()} for row in before]
    kept = {_name(row): row for row in [*old, *rows]}
    order = list(VARIANTS)
    return sorted(kept.values(), key=lambda row: (row["epochs"], row["seed"], order.index(row["variant"])))


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["epochs"], row["seed"]


def main() -> None:
    """Teach every variant, or read it back, and write the table's results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public ResNet-20")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--work", type=Path, required=True, help="surgery and students are kept here")
    parser.add_argument("--epochs", type=int, default=2, help="of each recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--analysis", type=Path, help="a run folder whose analysis is taken over where it is the same")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recovery.json")
    given = parser.parse_args()
    before = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    command = shlex.join(["python", "benchmarks/recovery.py", *shown])
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        for row in rows_of(given, open_case(given, seed), given.epochs):
            rows.append(row)
            print(row, flush=True)
            result = {"schema": 1, "machine": machine(), "command": command, "rows": together(before, rows)}
            atomic_write_text(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
