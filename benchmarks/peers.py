"""Ours beside its peers and without each of its parts: ResNet-20 on CIFAR-10 at equal MACs, data and recovery.

    python benchmarks/peers.py --weights resnet20-12fca82f.th --data cifar10.npz --work runs/peers
    python benchmarks/peers.py --weights ... --data ... --work runs/peers --epochs 15 --seeds 0 1 2

Peers: Torch-Pruning (inner channels, ranked over the whole network) by L1 group norm, Taylor, batch norm scale and
random importance; blocks replaced by identity in the order of CKA; the L1 student's architecture from new weights.
Ours: the plan for the same MACs from one analysis, whole and without one part each. Every student's batch norms are
re-estimated on the calibration inputs where that lowers the output KL there; all recover by the same distillation.
Answers on the 10,000 test images are read once for each student and kept in --work, which makes intervals paired;
rows that are there are not measured again. Writes results/peers.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.files import atomic_write_bytes, atomic_write_text
from causal_compress.inputs.data import Data, Split, load_data
from causal_compress.inputs.models import build_model
from causal_compress.pipeline import analyze
from causal_compress.provenance import machine
from causal_compress.recipe import BudgetSection, DistillSection, PlanSection, Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.recover.distill import distill
from causal_compress.results import Candidates, Effects, Groups, Plan
from causal_compress.runs import read_result
from causal_compress.shipped import find_recipe
from causal_compress.shrink.front import fresh_front, output_kl
from causal_compress.shrink.plan import make_plan
from causal_compress.shrink.prune import prune, reestimate_batch_norms
from causal_compress.shrink.refit import Solution, fit
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.surgery import boundaries
from causal_compress.stages import probe_of
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.statistics import paired_drop, wilson
from causal_compress.understand.trace import Network, trace

HERE = Path(__file__).parent
SCRATCH_RATE = 0.1
TAYLOR_INPUTS = 512

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """The teacher, its data and analysis, for one seed."""

    recipe: Recipe
    data: Data
    network: Network
    effects: Effects
    groups: Groups
    candidates: Candidates
    macs: float

    @property
    def calibration(self) -> list[Tensor]:
        """All calibration inputs, in chunks."""
        return [x for x, _ in self.data.calibration.batches(256)]


def open_case(arguments: argparse.Namespace, seed: int) -> Case:
    """Analyse the teacher with one seed (or read the analysis back)."""
    settings = [
        f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:resnet20",
        f"model.weights={arguments.weights}",
        f"data.source=npz:{arguments.data}",
        f"seed={seed}",
    ]
    recipe = load_recipe(find_recipe("cifar-resnet"), settings)
    folder = arguments.work / f"analysis-{seed}"
    analyze(recipe, folder)
    data = load_data(recipe.data, seed=seed)
    network = trace(build_model(recipe.model, classes=len(data.classes)), data.example_input)
    known = (read_result(folder, "intervene", Effects), read_result(folder, "group", Groups))
    return Case(recipe, data, network, *known, read_result(folder, "candidates", Candidates), arguments.macs)


# ---- ours, whole and without its parts


def ours(case: Case, **changes: Any) -> tuple[nn.Module, Pairs]:
    """Plan, rewrite and prune, with some settings of the plan changed."""
    section = case.recipe.plan.model_copy(update=changes)
    return carry_out(case, plan_of(case, case.candidates, section))


def plan_of(case: Case, candidates: Candidates, section: PlanSection) -> Plan:
    """The plan for the MACs asked for."""
    return make_plan(candidates, case.effects, case.groups, BudgetSection(macs=case.macs), section)


def carry_out(case: Case, plan: Plan) -> tuple[nn.Module, Pairs]:
    """The surgery of a plan, and the cut points at which distillation compares."""
    probe = probe_of(case.recipe, case.data)
    temperature = case.recipe.plan.temperature
    first = fresh_front(case.network, probe, case.recipe.rewrite.inputs, temperature)
    student, _, _ = rewrite(case.network, plan, first, case.recipe.rewrite)
    second = fresh_front(case.network, probe, case.recipe.prune.inputs, temperature)
    student, _, _ = prune(student, plan, second, case.recipe.prune)
    return student.graph, boundaries(student, case.network, plan)


def by_similarity(case: Case) -> tuple[nn.Module, Pairs]:
    """Merges alone, each thought to do as much harm as its CKA falls short of 1; no harm is measured."""
    cka = case.effects.cka
    rows = tuple(
        replace(row, harm_kl=sum(1 - cka[site][row.last] for site in range(row.first, row.last)))
        for row in case.candidates.rows
    )
    section = case.recipe.plan.model_copy(update={"width": False, "low_rank": False})
    return carry_out(case, plan_of(case, replace(case.candidates, rows=rows), section))


@contextmanager
def random_channels(case: Case) -> Iterator[None]:
    """Which channels stay is drawn, how many is planned; everything is repaired as ever."""
    generator = torch.Generator().manual_seed(case.recipe.seed)

    def drawn(readers: Any, counts: Any, penalty: float) -> dict[int, Tensor]:
        order = torch.randperm(len(readers[0][2]), generator=generator)
        return {count: order[:count].sort().values for count in counts}

    with patch("causal_compress.shrink.prune.kept_channels", drawn):
        yield


@contextmanager
def no_refit(case: Case) -> Iterator[None]:
    """Layers keep their weights: what is removed is replaced by its mean alone, which moves into the next bias."""

    def unchanged(train: Any, heldout: Any, penalties: Any, prior: Any = None) -> Solution:
        if prior is None:  # an adapter, which has no weights yet
            return fit(train, heldout, penalties)
        both = train + heldout
        return Solution(prior, both.bias(prior) if hasattr(both, "bias") else _bias(both, prior), 0.0, 0.0)

    with patch("causal_compress.shrink.repair.fit", unchanged):
        yield


def _bias(rows: Any, weight: Tensor) -> Tensor:
    found: Tensor = rows.t.double().mean(0) - rows.z.double().mean(0) @ weight
    return found


@contextmanager
def no_rectified(case: Case) -> Iterator[None]:
    """Refits don't look behind rectifiers."""
    with patch("causal_compress.shrink.prune.RECTIFIED_ROUNDS", 0):
        yield


# ---- peers


def torch_pruning(case: Case, importance: Callable[[], Any]) -> tuple[nn.Module, Pairs]:
    """Torch-Pruning to the MACs asked for: the first convolution of each block loses channels, ranked globally."""
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(12):
        ratio = (low + high) / 2
        pruned = _pruned(case, importance(), ratio)
        if count_macs(pruned, case.data.example_input[:1]) <= case.macs * case.candidates.macs:
            best, high = pruned, ratio
        else:
            low = ratio
    assert best is not None
    return best, []


def _pruned(case: Case, importance: Any, ratio: float) -> nn.Module:
    model = build_model(case.recipe.model, classes=len(case.data.classes)).eval()
    inner = {module for name, module in model.named_modules() if name.endswith(".conv1")}
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner]
    with torch.enable_grad():
        pruner = tp.pruner.BasePruner(
            model,
            case.data.example_input[:1],
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=others,
        )
        if isinstance(importance, tp.importance.GroupTaylorImportance):
            for x, y in case.data.calibration.batches(128, limit=TAYLOR_INPUTS):
                F.cross_entropy(model(x), y).backward()
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def identities(case: Case) -> tuple[nn.Module, Pairs]:
    """Blocks whose input and output are most alike become identities until the MACs are reached."""
    model = build_model(case.recipe.model, classes=len(case.data.classes)).eval()
    regions = case.network.chain().regions
    alike = sorted(
        (index for index, region in enumerate(regions) if index and region.input_shape == region.output_shape),
        key=lambda index: -case.effects.cka[index - 1][index],
    )
    for index in alike:
        if count_macs(model, case.data.example_input[:1]) <= case.macs * case.candidates.macs:
            break
        block = regions[index].modules[0].rpartition(".")[0]
        model.set_submodule(block, nn.Identity())
    return model, []


def from_scratch(case: Case) -> tuple[nn.Module, Pairs]:
    """The L1 student's architecture with new weights."""
    model, _ = torch_pruning(case, lambda: tp.importance.GroupMagnitudeImportance(p=1))
    torch.manual_seed(case.recipe.seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model, []


METHODS: dict[str, Callable[[Case], tuple[nn.Module, Pairs]]] = {
    "ours": ours,
    "ours, full rank": lambda case: ours(case, low_rank=False),
    "ours, width alone": lambda case: ours(case, low_rank=False, depth=False),
    "ours, low rank alone": lambda case: ours(case, width=False, depth=False),
    "ours, depth alone": lambda case: ours(case, low_rank=False, width=False),
    "ours, CKA only": by_similarity,
    "ours, random channels": lambda case: _within(random_channels, case),
    "ours, no refit": lambda case: _within(no_refit, case),
    "ours, no rectified refit": lambda case: _within(no_rectified, case),
    "Torch-Pruning, L1": lambda case: torch_pruning(case, lambda: tp.importance.GroupMagnitudeImportance(p=1)),
    "Torch-Pruning, Taylor": lambda case: torch_pruning(case, tp.importance.GroupTaylorImportance),
    "Torch-Pruning, batch norm scale": lambda case: torch_pruning(case, tp.importance.BNScaleImportance),
    "Torch-Pruning, random": lambda case: torch_pruning(case, tp.importance.RandomImportance),
    "identity in CKA order": identities,
    "from scratch": from_scratch,
}


def _within(without: Callable[[Case], Any], case: Case) -> tuple[nn.Module, Pairs]:
    with ExitStack() as stack:
        stack.enter_context(without(case))
        return ours(case)


# ---- measuring


def repaired(case: Case, model: nn.Module) -> nn.Module:
    """The student, or a copy with batch norms re-estimated on the calibration inputs if its output KL is lower."""
    trial = copy.deepcopy(model)
    if not reestimate_batch_norms(trial, case.calibration):
        return model
    temperature = case.recipe.plan.temperature
    with torch.no_grad():
        wanted = [F.log_softmax(case.network.graph(x) / temperature, 1) for x in case.calibration]
        before, after = (output_kl([m(x) for x in case.calibration], wanted, temperature) for m in (model, trial))
    return trial if after < before else model


def answers(model: nn.Module, split: Split) -> NDArray[np.bool_]:
    """Which inputs a network gets right."""
    with torch.no_grad():
        return np.concatenate([(model.eval()(x).argmax(1) == y).numpy() for x, y in split.batches(250)])


def measure(case: Case, method: str, epochs: int) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Make a student, let it recover, and read the test split."""
    torch.manual_seed(case.recipe.seed)
    model, pairs = METHODS[method](case)
    model = model if method == "from scratch" else repaired(case, model)
    if epochs:
        section = (case.recipe.distill or DistillSection()).model_copy(update={"epochs": epochs})
        if method == "from scratch":
            section = section.model_copy(update={"learning_rate": SCRATCH_RATE})
        teacher = case.network.graph
        model, _ = distill(
            model, teacher, pairs, case.data, section, seed=case.recipe.seed, device="cpu", progress_dir=None
        )
    example = case.data.example_input[:1]
    about = {"macs_kept": round(count_macs(model, example) / case.candidates.macs, 4), "params": count_params(model)}
    return answers(model, case.data.test), about


def row_of(work: Path, case: Case, method: str, epochs: int) -> dict[str, Any]:
    """One row, from --work if it is there."""
    stem = f"{method.replace(' ', '-').replace(',', '')}-{epochs}-{case.recipe.seed}"
    hits_file, about_file = work / f"{stem}.npy", work / f"{stem}.json"
    if not about_file.exists():
        hits, about = measure(case, method, epochs)
        with (work / f"{stem}.tmp").open("wb") as file:
            np.save(file, hits)
        atomic_write_bytes(hits_file, (work / f"{stem}.tmp").read_bytes())
        (work / f"{stem}.tmp").unlink()
        atomic_write_text(about_file, json.dumps(about))
    hits = np.load(hits_file)
    row = {"arch": "resnet20", "method": method, "recovery_epochs": epochs}
    about = json.loads(about_file.read_text(encoding="utf-8"))
    return {**row, **about, "accuracy_pct": wilson(int(hits.sum()), len(hits)).pct, "n": len(hits), "hits": hits}


def compared(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows with their paired distance from ours [pp] instead of every single answer."""
    ours_hits = {row["recovery_epochs"]: row["hits"] for row in rows if row["method"] == "ours"}
    done = []
    for row in rows:
        hits, mine = row.pop("hits"), ours_hits.get(row["recovery_epochs"])
        behind = None if mine is None else paired_drop(int((mine & ~hits).sum()), int((hits & ~mine).sum()), len(hits))
        behind = None if row["method"] == "ours" else behind
        done.append(
            {**row, "behind_ours_pp": behind and behind[0], "behind_ours_ci_pp": behind and behind[1], "seed": seed}
        )
    return done


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the public ResNet-20")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--work", type=Path, required=True, help="analyses and answers are kept here")
    parser.add_argument("--macs", type=float, default=0.5, help="share that is kept")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0], help="of recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        case, found = open_case(given, seed), []
        for epochs in given.epochs:
            for method in given.methods:
                if epochs or method != "from scratch":
                    found.append(row_of(given.work, case, method, epochs))
                    print({key: value for key, value in found[-1].items() if key != "hits"}, flush=True)
        rows += compared(found, seed)
        result = {"schema": 1, "machine": machine(), "command": "python benchmarks/peers.py", "rows": rows}
        atomic_write_text(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
