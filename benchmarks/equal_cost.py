"""Students of one teacher at equal cost, data and recovery: what peers.py and ablation.py have in common.

The cost is MACs (--macs) and, where asked for, latency measured on ONNX Runtime, batch 1, one thread (--latency).

A method makes a student of a Case; everything after that is the same for all. Batch norms are re-estimated on the
calibration inputs where that lowers the output KL there; all recover by the same distillation; answers on the 10,000
test images are read once for each student. Students and answers are kept in --work, which makes intervals paired: what
is there is neither made nor measured again, so students can be made on one machine (--make) and recover on another that
has a GPU. Rows of other seeds, methods or epochs that stand in the results stay there, and are paired with the new ones
where they hold their answers; a method that can't reach the cost has a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from equal_cost_tables import together
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from causal_compress.deploy.latency import time_models
from causal_compress.errors import BudgetError
from causal_compress.files import atomic_write_bytes, atomic_write_text
from causal_compress.inputs.data import Data, Split, load_data
from causal_compress.pipeline import analyze
from causal_compress.provenance import machine
from causal_compress.recipe import BudgetSection, DistillSection, LatencySection, Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.recover.distill import distill, resolve_device
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
from causal_compress.understand.statistics import wilson
from causal_compress.understand.trace import Network

HERE = Path(__file__).parent
SCRATCH = "from scratch"
SCRATCH_RATE = 0.1

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Teacher:
    """What students learn from, for one seed; the recipe's budget is the share of one cost that is kept."""

    recipe: Recipe
    data: Data
    network: Network

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


@dataclass(frozen=True)
class Case(Teacher):
    """A teacher and its analysis: what students are made of."""

    effects: Effects
    groups: Groups
    candidates: Candidates
    probe: Probe

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


@dataclass(frozen=True)
class Contest:
    """One kind of cost for one seed; the analysis is looked at only where a student has to be made."""

    given: argparse.Namespace
    teacher: Teacher
    analysed: Callable[[], Case]

    @property
    def case(self) -> Case:
        """The analysis, with this contest's budget."""
        return replace(self.analysed(), recipe=self.teacher.recipe)

    def file(self, name: str, what: str) -> Path:
        """Where something of a method's student is kept."""
        plain, settings = name.replace(" ", "-").replace(",", ""), self.given.settings
        own = f"-{hashlib.sha256(' '.join(settings).encode()).hexdigest()[:8]}" if settings else ""
        cost, seed = f"{self.teacher.equal}-{self.teacher.limit:g}", self.teacher.recipe.seed
        return Path(self.given.work / f"{self.given.arch}-{cost}-{plain}-{seed}{own}-{what}")


def open_teacher(given: argparse.Namespace, seed: int) -> Teacher:
    """The teacher and its data, for a budget on MACs."""
    settings = [
        f"model.arch={HERE.parent / 'examples' / 'cifar_resnet.py'}:{given.arch}",
        f"model.weights={given.weights}",
        f"data.source=npz:{given.data}",
        f"budget.macs={given.macs}",
        f"seed={seed}",
        *given.settings,
    ]
    recipe = load_recipe(find_recipe("cifar-resnet"), settings)
    data = load_data(recipe.data, seed=seed)
    return Teacher(recipe, data, open_network(recipe, data))


def open_case(given: argparse.Namespace, teacher: Teacher) -> Case:
    """Analyse the teacher, or read its analysis back."""
    recipe, data = teacher.recipe, teacher.data
    folder = given.work / f"analysis-{given.arch}-{recipe.seed}"
    # The analysis does not depend on the budget; one for half the MACs serves all.
    analyze(recipe.model_copy(update={"budget": BudgetSection(macs=0.5)}), folder, reuse=given.analysis)
    known = (read_result(folder, "intervene", Effects), read_result(folder, "group", Groups))
    candidates = read_result(folder, "candidates", Candidates)
    return Case(recipe, data, teacher.network, *known, candidates, probe_of(recipe, data))


def contests(given: argparse.Namespace, seed: int) -> list[Contest]:
    """The same analysis with a budget on MACs and, where asked for, with one on latency."""
    teacher = open_teacher(given, seed)
    analysed = cache(partial(open_case, given, teacher))
    found = [Contest(given, teacher, analysed)]
    if given.latency is not None:
        budget = BudgetSection(latency_ms=LatencySection(keep=given.latency))
        timed = replace(teacher, recipe=teacher.recipe.model_copy(update={"budget": budget}))
        found.append(Contest(given, timed, analysed))
    return [contest for contest in found if given.only in (None, contest.teacher.equal)]


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


@dataclass(frozen=True)
class Made:
    """A student before recovery: None where the cost is out of reach; the pairs are what distillation compares."""

    model: nn.Module | None
    pairs: Pairs
    about: dict[str, Any]


def student_of(contest: Contest, name: str, method: Method) -> Made:
    """A method's student, from --work if it is there."""
    file = contest.file(name, "student.pt")
    if not file.exists():
        write_student(make(contest.case, name, method), file)
    return read_student(file)


def write_student(made: Made, file: Path) -> None:
    """Keep a student as a graph, which needs no class of the user's, and its nodes' names: read back, it is traced."""
    graph = made.model
    if graph is not None and not isinstance(graph, fx.GraphModule):
        graph = fx.symbolic_trace(graph)
    nodes = [] if graph is None else [node.name for node in graph.graph.nodes]
    content = io.BytesIO()
    torch.save({"graph": graph, "nodes": nodes, "pairs": made.pairs, "about": made.about}, content)
    atomic_write_bytes(file, content.getvalue())


def read_student(file: Path) -> Made:
    """A student that `write_student` kept; graphs are pickled, so only files of one's own may be read."""
    kept = torch.load(file, weights_only=False)
    if kept["graph"] is not None:
        for node, known in zip(kept["graph"].graph.nodes, kept["nodes"], strict=True):
            node.name = known
        kept["graph"].recompile()
    return Made(kept["graph"], kept["pairs"], kept["about"])


def make(case: Case, name: str, method: Method) -> Made:
    """Make a student, and repair its batch norms."""
    torch.manual_seed(case.recipe.seed)
    cpu = machine()["cpu"]
    try:
        model, pairs = method(case)
    except BudgetError as error:
        return Made(
            None, [], {**dict.fromkeys(("macs_kept", "params", "latency_kept")), "why_none": error.what, "cpu": cpu}
        )
    model = model if name == SCRATCH else repaired(case, model)
    about: dict[str, Any] = {"macs_kept": round(case.macs_kept(model), 4), "params": count_params(model)}
    about["latency_kept"] = round(case.cost(model), 4) if case.equal == "latency" else None
    return Made(model, pairs, {**about, "why_none": None, "cpu": cpu})


def answered(contest: Contest, name: str, made: Made, epochs: int) -> tuple[NDArray[np.bool_], str | None]:
    """Which test inputs a student gets right after recovery, and where it recovered; from --work if they are there."""
    hits_file, place_file = (contest.file(name, f"{epochs}{ending}") for ending in (".npy", ".json"))
    if not place_file.exists():
        model, place = recovered(contest.teacher, name, made, epochs)
        content = io.BytesIO()
        np.save(content, answers(model, contest.teacher.data.test))
        atomic_write_bytes(hits_file, content.getvalue())
        atomic_write_text(place_file, json.dumps(place))
    return np.load(hits_file), json.loads(place_file.read_text(encoding="utf-8"))


def recovered(teacher: Teacher, name: str, made: Made, epochs: int) -> tuple[nn.Module, str | None]:
    """The student after so many epochs, and the name of what it was trained on."""
    assert made.model is not None
    if not epochs:
        return made.model, None
    recipe = teacher.recipe
    section = (recipe.distill or DistillSection()).model_copy(update={"epochs": epochs})
    if name == SCRATCH:
        section = section.model_copy(update={"optimizer": "sgd", "learning_rate": SCRATCH_RATE})
    device = resolve_device(recipe.device)
    how: dict[str, Any] = {"seed": recipe.seed, "device": device, "progress_dir": None}
    model, _ = distill(made.model, teacher.network.graph, made.pairs, teacher.data, section, **how)
    return model, torch.cuda.get_device_name(device) if device.startswith("cuda") else machine()["cpu"]


def row_of(contest: Contest, name: str, method: Method, epochs: int) -> dict[str, Any]:
    """One row; "hits" holds every single answer, None where there is no student."""
    made = student_of(contest, name, method)
    row = {"arch": contest.given.arch, "equal": contest.teacher.equal, "method": name, "recovery_epochs": epochs}
    row |= {"seed": contest.teacher.recipe.seed, **made.about}
    if made.model is None:
        return {**row, "accuracy_pct": None, "n": None, "recovered_on": None, "hits": None}
    hits, place = answered(contest, name, made, epochs)
    accuracy = wilson(int(hits.sum()), len(hits)).pct
    return {**row, "accuracy_pct": accuracy, "n": len(hits), "recovered_on": place, "hits": hits}


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
    parser.add_argument("--only", choices=["macs", "latency"], help="one of both costs")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0], help="of recovery")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(methods), default=list(methods), metavar="NAME")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="further recipe keys")
    parser.add_argument("--analysis", type=Path, help="a run folder whose analysis is taken over where it is the same")
    parser.add_argument("--make", action="store_true", help="only make the students that are not in --work")
    parser.add_argument("--kept", action="store_true", help="only the rows that are in --work already")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{script}.json")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join([f"python benchmarks/{script}.py", *shown])}
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        for contest, epochs, name in product(contests(given, seed), given.epochs, given.methods):
            if given.make:
                print(name, student_of(contest, name, methods[name]).about, flush=True)
            elif (contest.file(name, f"{epochs}.json").exists() or not given.kept) and (epochs or name != SCRATCH):
                rows.append(row_of(contest, name, methods[name], epochs))
                print({key: value for key, value in rows[-1].items() if key != "hits"}, flush=True)
        if given.make:
            continue
        result = {**content, **together(before, rows)}
        atomic_write_text(given.out, json.dumps(result, indent=1) + "\n")
