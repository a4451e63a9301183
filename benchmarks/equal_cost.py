"""Students of one teacher at equal cost, data and recovery: what peers.py and ablation.py have in common.

The cost is MACs (--macs) and, where asked for, latency measured on ONNX Runtime, batch 1, one thread (--latency).

A method makes a student of a Case; everything after that is the same for all. Batch norms are re-estimated on the
calibration inputs where that lowers the output KL there; all recover by the same distillation; answers on the 10,000
test images are read once for each student and kept in --work, which makes intervals paired. Rows that are there are not
measured again, and rows of other seeds, methods or epochs that stand in the results stay there. A method that can't
reach the MACs has a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.deploy.latency import time_models
from causal_compress.errors import BudgetError
from causal_compress.files import atomic_write_bytes, atomic_write_text
from causal_compress.inputs.data import Data, Split, load_data
from causal_compress.pipeline import analyze
from causal_compress.provenance import machine
from causal_compress.recipe import BudgetSection, DistillSection, LatencySection, Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.recover.distill import distill
from causal_compress.results import Candidates, Effects, Groups, Plan
from causal_compress.runs import read_result
from causal_compress.shipped import find_recipe
from causal_compress.shrink.batch_norms import reestimate_batch_norms
from causal_compress.shrink.front import fresh_front, output_kl
from causal_compress.shrink.latency import measure_latency, plan_for_latency
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.rivals import plan_and_compare
from causal_compress.shrink.surgery import boundaries
from causal_compress.stages import probe_of
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.network import open_network
from causal_compress.understand.statistics import paired_drop, wilson
from causal_compress.understand.trace import Network

HERE = Path(__file__).parent
SCRATCH = "from scratch"
SCRATCH_RATE = 0.1

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """The teacher, its data and analysis, for one seed; the recipe's budget is the share of one cost that is kept."""

    recipe: Recipe
    data: Data
    network: Network
    effects: Effects
    groups: Groups
    candidates: Candidates
    probe: Probe

    @property
    def equal(self) -> str:
        """What is equal for all methods: "macs" or "latency"."""
        return "macs" if self.recipe.budget.latency_ms is None else "latency"

    @property
    def limit(self) -> float:
        """Largest share of the teacher's cost."""
        budget = self.recipe.budget
        kept = budget.macs if budget.latency_ms is None else budget.latency_ms.keep
        assert kept is not None
        return kept

    def macs_kept(self, model: nn.Module) -> float:
        """Share of the teacher's MACs."""
        return count_macs(model, self.data.example_input[:1]) / self.candidates.macs

    def cost(self, model: nn.Module) -> float:
        """Share of the teacher's cost that a student keeps."""
        section = self.recipe.budget.latency_ms
        if section is None:
            return self.macs_kept(model)
        example = self.data.example_input
        student, teacher = time_models([(model.eval(), example), (self.network.teacher, example)], section)
        return student / teacher

    @property
    def calibration(self) -> list[Tensor]:
        """All calibration inputs, in chunks."""
        return [x for x, _ in self.data.calibration.batches(256)]


Method = Callable[[Case], tuple[nn.Module, Pairs]]


def open_case(given: argparse.Namespace, seed: int) -> Case:
    """Analyse the teacher with one seed (or read the analysis back), for a budget on MACs."""
    settings = [
        f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:{given.arch}",
        f"model.weights={given.weights}",
        f"data.source=npz:{given.data}",
        f"budget.macs={given.macs}",
        f"seed={seed}",
        *given.settings,
    ]
    recipe = load_recipe(find_recipe("cifar-resnet"), settings)
    folder = given.work / f"analysis-{given.arch}-{seed}"
    # The analysis does not depend on the budget; one for half the MACs serves all.
    analyze(recipe.model_copy(update={"budget": BudgetSection(macs=0.5)}), folder, reuse=given.analysis)
    data = load_data(recipe.data, seed=seed)
    known = (read_result(folder, "intervene", Effects), read_result(folder, "group", Groups))
    candidates = read_result(folder, "candidates", Candidates)
    return Case(recipe, data, open_network(recipe, data), *known, candidates, probe_of(recipe, data))


def contests(given: argparse.Namespace, seed: int) -> list[Case]:
    """The same analysis with a budget on MACs and, where asked for, with one on latency."""
    case = open_case(given, seed)
    if given.latency is None:
        return [case]
    budget = BudgetSection(latency_ms=LatencySection(keep=given.latency))
    return [case, replace(case, recipe=case.recipe.model_copy(update={"budget": budget}))]


def ours(case: Case) -> tuple[nn.Module, Pairs]:
    """The product's own plan and surgery."""
    known, recipe = (case.candidates, case.effects, case.groups), case.recipe
    section = recipe.budget.latency_ms
    if section is None:
        return carry_out(case, plan_and_compare(case.network, known, recipe, case.probe))
    timer = partial(time_models, section=section)
    table = measure_latency(case.network, case.candidates, section, timer)
    return carry_out(case, plan_for_latency(case.network, *known, recipe.budget, recipe.plan, table, timer))


def out_of_reach(case: Case, found: str) -> BudgetError:
    """For a method that can't come down to the cost; its row says so."""
    return BudgetError(f"{case.limit:g} of the {case.equal} is out of reach", found=f"more with {found}", remedy="none")


def carry_out(case: Case, plan: Plan) -> tuple[nn.Module, Pairs]:
    """The surgery of a plan, and the cut points at which distillation compares."""
    temperature = case.recipe.plan.temperature
    first = fresh_front(case.network, case.probe, case.recipe.rewrite.inputs, temperature)
    student, _, _ = rewrite(case.network, plan, first, case.recipe.rewrite)
    second = fresh_front(case.network, case.probe, case.recipe.prune.inputs, temperature)
    student, _, _ = prune(student, plan, second, case.recipe.prune)
    return student.graph, boundaries(student, case.network, plan)


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


def measure(case: Case, name: str, method: Method, epochs: int) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Make a student, let it recover, and read the test split."""
    torch.manual_seed(case.recipe.seed)
    model, pairs = method(case)
    model = model if name == SCRATCH else repaired(case, model)
    if epochs:
        section = (case.recipe.distill or DistillSection()).model_copy(update={"epochs": epochs})
        if name == SCRATCH:
            section = section.model_copy(update={"optimizer": "sgd", "learning_rate": SCRATCH_RATE})
        teacher = case.network.graph
        model, _ = distill(
            model, teacher, pairs, case.data, section, seed=case.recipe.seed, device="cpu", progress_dir=None
        )
    about: dict[str, Any] = {"macs_kept": round(case.macs_kept(model), 4), "params": count_params(model)}
    about["latency_kept"] = round(case.cost(model), 4) if case.equal == "latency" else None
    return answers(model, case.data.test), about


def row_of(given: argparse.Namespace, case: Case, name: str, method: Method, epochs: int) -> dict[str, Any]:
    """One row, from --work if it is there; "hits" holds every single answer, None where there is no student."""
    stem = _stem(given, case, name, epochs)
    hits_file, about_file = given.work / f"{stem}.npy", given.work / f"{stem}.json"
    row = {"arch": given.arch, "equal": case.equal, "method": name, "recovery_epochs": epochs}
    if not about_file.exists():
        try:
            hits, about = measure(case, name, method, epochs)
        except BudgetError as error:
            missing = dict.fromkeys(("macs_kept", "params", "latency_kept", "accuracy_pct", "n"))
            return {**row, **missing, "why_none": error.what, "hits": None}
        with (given.work / f"{stem}.tmp").open("wb") as file:
            np.save(file, hits)
        atomic_write_bytes(hits_file, (given.work / f"{stem}.tmp").read_bytes())
        (given.work / f"{stem}.tmp").unlink()
        atomic_write_text(about_file, json.dumps(about))
    hits = np.load(hits_file)
    about = json.loads(about_file.read_text(encoding="utf-8"))
    accuracy = wilson(int(hits.sum()), len(hits)).pct
    return {**row, **about, "accuracy_pct": accuracy, "n": len(hits), "why_none": None, "hits": hits}


def _stem(given: argparse.Namespace, case: Case, name: str, epochs: int) -> str:
    plain = name.replace(" ", "-").replace(",", "")
    own = f"-{hashlib.sha256(' '.join(given.settings).encode()).hexdigest()[:8]}" if given.settings else ""
    return f"{given.arch}-{case.equal}-{case.limit:g}-{plain}-{epochs}-{case.recipe.seed}{own}"


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One seed's rows with their paired distance from ours [pp] instead of every single answer."""
    best = {_contest(row): row["hits"] for row in rows if row["method"] == "ours"}
    shown = [{key: value for key, value in row.items() if key != "hits"} for row in rows]
    return [{**kept, **_behind(row, best.get(_contest(row)))} for kept, row in zip(shown, rows, strict=True)]


def _contest(row: dict[str, Any]) -> tuple[str, int]:
    """Students are compared with those of the same kind of cost and the same recovery."""
    return row["equal"], row["recovery_epochs"]


def _behind(row: dict[str, Any], best: NDArray[np.bool_] | None) -> dict[str, Any]:
    hits, drop, interval = row["hits"], None, None
    if best is not None and hits is not None and row["method"] != "ours":
        drop, interval = paired_drop(int((best & ~hits).sum()), int((hits & ~best).sum()), len(hits))
    return {"behind_ours_pp": drop, "behind_ours_ci_pp": interval}


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method over all its seeds: mean accuracy, and its mean distance from ours, paired by seed and test image.

    Seeds share their test images, so an image counts once: with the mean over seeds of what was right on it. Intervals
    (normal, 95 %) say what chance of test images does; what chance of seeds does stands in the single rows.
    """
    kinds: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["hits"] is not None:
            kinds.setdefault((row["method"], *_contest(row)), {})[row["seed"]] = row
    done = []
    for (method, *_), same in kinds.items():
        first, seeds = next(iter(same.values())), list(same)
        means = {
            key: round(float(np.mean([row[key] for row in same.values()])), 4) for key in ("accuracy_pct", "macs_kept")
        }
        best = kinds.get(("ours", first["equal"], first["recovery_epochs"]), {})
        distance = None
        if method != "ours" and set(seeds) <= set(best):
            rows_of = np.mean([best[seed]["hits"].astype(float) - same[seed]["hits"] for seed in seeds], axis=0)
            mean, half = float(100 * rows_of.mean()), float(196 * rows_of.std(ddof=1) / len(rows_of) ** 0.5)
            distance = [mean, mean - half, mean + half]
        done.append(
            {
                **{key: first[key] for key in ("arch", "equal", "method", "recovery_epochs")},
                **means,
                "seeds": len(seeds),
                "behind_ours_pp": distance and distance[0],
                "behind_ours_ci_pp": distance and distance[1:],
            }
        )
    return done


def run(methods: Mapping[str, Method], description: str | None, script: str) -> None:
    """Measure, print and write: a command line around some methods.

    Args:
        methods: "ours" is among them, the others are compared with it.
        description: For --help.
        script: The script's name without ending; its results have the same.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20", help="function of examples/cifar_resnet.py")
    parser.add_argument("--weights", required=True, help="its public checkpoint")
    parser.add_argument("--data", required=True, help="npz with CIFAR-10")
    parser.add_argument("--work", type=Path, required=True, help="analyses and answers are kept here")
    parser.add_argument("--macs", type=float, default=0.5, help="share that is kept; another one wants another --out")
    parser.add_argument("--latency", type=float, help="beside it: share of the measured latency that is kept")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0], help="of recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(methods), default=list(methods), metavar="NAME")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="further recipe keys")
    parser.add_argument("--analysis", type=Path, help="a run folder whose analysis is taken over where it is the same")
    parser.add_argument("--kept", action="store_true", help="only the rows that are in --work already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{script}.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join([f"python benchmarks/{script}.py", *shown])}
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        for case, epochs, name in product(contests(given, seed), given.epochs, given.methods):
            there = (given.work / f"{_stem(given, case, name, epochs)}.json").exists()
            if (there or not given.kept) and (epochs or name != SCRATCH):
                rows.append({**row_of(given, case, name, methods[name], epochs), "seed": seed})
                print({key: value for key, value in rows[-1].items() if key != "hits"}, flush=True)
        single = [row for one in given.seeds for row in compared([row for row in rows if row["seed"] == one])]
        result = {**content, **together(before, single, pooled(rows))}
        atomic_write_text(given.out, json.dumps(result, indent=1) + "\n")


def together(
    before: Mapping[str, list[dict[str, Any]]], single: list[dict[str, Any]], over_seeds: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Rows and means, and those of earlier runs beside them; a mean gives way to one of as many seeds."""
    kept = {_name(row): row for row in map(_known_kind, before.get("rows", []))}
    kept |= {_name(row): {**row, "cpu": machine()["cpu"]} for row in single}
    means = {_name(row): row for row in map(_known_kind, before.get("over_seeds", []))}
    means |= {_name(row): row for row in over_seeds if row["seeds"] >= means.get(_name(row), {"seeds": 0})["seeds"]}
    return {"rows": sorted(kept.values(), key=_name), "over_seeds": sorted(means.values(), key=_name)}


def _known_kind(row: dict[str, Any]) -> dict[str, Any]:
    """A row from before latency could be what is equal."""
    return row if "equal" in row else {"arch": row["arch"], "equal": "macs", **row}


def _name(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of; ours first among its like."""
    method = row["method"]
    return row["arch"], row["equal"] != "macs", row["recovery_epochs"], row.get("seed"), method != "ours", method
