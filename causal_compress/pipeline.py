"""The whole story, from a checkpoint to a verified small model, in straight lines.

Every stage writes its result into the run folder before the next one starts, and weights are always read back from
there, so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from causal_compress.deploy.benchmark import benchmark, deployed
from causal_compress.deploy.onnx import export
from causal_compress.deploy.scorecard import scorecard_csv, scorecard_markdown
from causal_compress.errors import UsageError
from causal_compress.explain.examples import Examples, find_disagreements
from causal_compress.explain.report import ReportInput, build_report, report_json
from causal_compress.inputs.data import Data, load_data
from causal_compress.inputs.models import build_model, checkpoint_sha256
from causal_compress.recipe import Recipe
from causal_compress.recover.distill import distill, resolve_device
from causal_compress.results import (
    Candidates,
    Change,
    Distilled,
    Effects,
    Exported,
    Groups,
    Log,
    Plan,
    Scorecard,
    Skip,
    Surgery,
    TeacherScore,
)
from causal_compress.runs import Run, open_run, read_provenance
from causal_compress.shrink.front import Front, open_front
from causal_compress.shrink.measure import measure
from causal_compress.shrink.plan import make_plan
from causal_compress.shrink.probe import Probe, draw_probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.surgery import Student, boundaries, save_weights
from causal_compress.shrink.surgery import replay as replay_surgery
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.group import group
from causal_compress.understand.intervene import intervene
from causal_compress.understand.teacher import accuracy, refuse_near_chance, score_teacher, weights_sha256
from causal_compress.understand.trace import Network, trace

WEIGHTS = "student.safetensors"
SURGERY = "surgery.json"
_ANY_PLAN = {"depth": True, "width": True}  # both are always measured, so one analysis serves every plan


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    scorecard: Scorecard
    folder: Path


@dataclass(frozen=True)
class Understood:
    """All that is known before anything is touched."""

    data: Data
    network: Network
    teacher: TeacherScore
    effects: Effects
    groups: Groups
    candidates: Candidates
    plan: Plan
    probe: Probe
    temperature: float


def compress(
    recipe: Recipe, run_dir: Path, *, command: Sequence[str] = (), reuse: Path | None = None, force: bool = False
) -> Outcome:
    """Compress a checkpoint: understand, shrink, recover, deploy, explain.

    Args:
        recipe: What is asked for.
        run_dir: Where everything is written; resumed if it holds an unfinished run of the same recipe.
        command: The command line, for run.json.
        reuse: Another run whose analysis is taken over where it is the same.
        force: Go on with a teacher near chance.

    Raises:
        CausalCompressError: whatever the user has to mend; what was finished by then stays in the folder.
    """
    with open_run(run_dir, recipe, command=command, reuse=reuse) as run, numerics(recipe):
        known = understand(run, recipe, force=force)
        rewritten, student = shrink_depth(run, recipe, known)
        pruned, student = shrink_width(run, recipe, known, student)
        distilled, student = recover(run, recipe, known, student)
        exported = deploy(run, recipe, known, student)
        scorecard = score(run, recipe, known, student, exported)
        examples = look_at_examples(run, recipe, known, student)
        report(run, recipe, known, (rewritten, pruned, distilled, exported, scorecard, examples))
        return Outcome(scorecard, run.folder)


def analyze(
    recipe: Recipe, run_dir: Path, *, command: Sequence[str] = (), reuse: Path | None = None, force: bool = False
) -> Plan:
    """Dry run: what would merge and narrow, with predicted MACs, parameters and harm; nothing is trained.

    Args:
        recipe: What is asked for.
        run_dir: Where the analysis is written; `compress` on the same folder goes on from it.
        command: The command line, for run.json.
        reuse: Another run whose analysis is taken over where it is the same.
        force: Go on with a teacher near chance.
    """
    with open_run(run_dir, recipe, command=command, reuse=reuse) as run, numerics(recipe):
        return understand(run, recipe, force=force).plan


@contextmanager
def numerics(recipe: Recipe) -> Iterator[None]:
    """Threads and seed for the time of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or os.cpu_count() or 1)
    torch.manual_seed(recipe.seed)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def understand(run: Run, recipe: Recipe, *, force: bool) -> Understood:
    """Everything up to the plan."""
    resolve_device(recipe.device)  # a device that is not there is refused before any work
    if recipe.model.arch is None or recipe.data.source is None:
        raise UsageError(
            "nothing to compress", found="no model.arch or no data.source", remedy="give --arch and --data"
        )
    data = load_data(recipe.data, seed=recipe.seed)
    network = trace(build_model(recipe.model, classes=len(data.classes)), data.example_input)
    run.note_inputs(checkpoint_sha256=checkpoint_sha256(recipe.model), data_sha256=data.fingerprint)
    inputs = {"weights": weights_sha256(network.graph), "data": data.fingerprint, "seed": recipe.seed}

    teacher = run.stage("teacher", TeacherScore, lambda _: score_teacher(network, data), depends=inputs)
    refuse_near_chance(teacher, recipe.data, force=force)
    effects = run.stage(
        "intervene",
        Effects,
        lambda _: intervene(network, data.calibration, data.features, recipe.intervene, seed=recipe.seed),
        depends={**inputs, "intervene": recipe.intervene},
    )
    groups = run.stage(
        "group",
        Groups,
        lambda _: group(effects, recipe.group, seed=recipe.seed),
        depends={"intervene": run.key_of("intervene"), "group": recipe.group},
    )
    refitted = max(recipe.rewrite.inputs, recipe.prune.inputs)
    probe = draw_probe(data.calibration, data.features, recipe.plan, recipe.intervene, refitted, seed=recipe.seed)
    candidates = run.stage(
        "candidates",
        Candidates,
        lambda _: measure(network, probe, effects, recipe.plan),
        depends={"intervene": run.key_of("intervene"), "plan": recipe.plan.model_copy(update=_ANY_PLAN)},
    )
    plan = run.stage(
        "plan",
        Plan,
        lambda _: make_plan(candidates, effects, groups, recipe.budget, recipe.plan),
        depends={
            "candidates": run.key_of("candidates"),
            "group": run.key_of("group"),
            "budget": recipe.budget,
            "plan": recipe.plan,
        },
    )
    return Understood(data, network, teacher, effects, groups, candidates, plan, probe, recipe.plan.temperature)


def shrink_depth(run: Run, recipe: Recipe, known: Understood) -> tuple[Log, Student]:
    """Merge: one refitted representative per causal node."""

    def work(scratch: Path) -> Log:
        front = front_of(known, recipe.rewrite.inputs)
        student, changes, skips = rewrite(known.network, known.plan, front, recipe.rewrite)
        return write_log(scratch, "rewrite", student, known, (changes, skips), front.harm_kl)

    log = run.stage("rewrite", Log, work, depends={"plan": run.key_of("plan"), "rewrite": recipe.rewrite})
    return log, read_student(run, known, log.surgery, "rewrite.safetensors")


def shrink_width(run: Run, recipe: Recipe, known: Understood, student: Student) -> tuple[Log, Student]:
    """Narrow: channels removed, readers refitted."""

    def work(scratch: Path) -> Log:
        front = front_of(known, recipe.prune.inputs)
        narrowed, changes, skips = prune(student, known.plan, front, recipe.prune)
        return write_log(scratch, "prune", narrowed, known, (changes, skips), front.harm_kl)

    log = run.stage("prune", Log, work, depends={"rewrite": run.key_of("rewrite"), "prune": recipe.prune})
    return log, read_student(run, known, log.surgery, "prune.safetensors")


def front_of(known: Understood, inputs: int) -> Front:
    """A fresh front at the network's input, on so many of the probe's inputs (whole chunks of them)."""
    chunks = known.probe.surgery[: -(-inputs // len(known.probe.surgery[0]))]
    return open_front(known.network, chunks, known.probe.heldout, known.temperature)


def write_log(
    scratch: Path,
    stage: str,
    student: Student,
    known: Understood,
    ledger: tuple[Sequence[Change], Sequence[Skip]],
    harm: float,
) -> Log:
    """Write the student's weights and describe what was done to it."""
    save_weights(student.graph, scratch / f"{stage}.safetensors")
    return Log(
        stage=stage,
        surgery=student.surgery,
        changes=tuple(ledger[0]),
        skipped=tuple(ledger[1]),
        heldout_kl=harm,
        validation=accuracy(student.graph, known.data.validation),
        macs=count_macs(student.graph, known.data.example_input[:1]),
        params=count_params(student.graph),
    )


def read_student(run: Run, known: Understood, surgery: Surgery, weights: str) -> Student:
    """The student as it lies in the run folder."""
    return replay_surgery(known.network, surgery, load_file(run.folder / weights))


def recover(run: Run, recipe: Recipe, known: Understood, student: Student) -> tuple[Distilled | None, Student]:
    """Distil, where the recipe asks for it."""
    section = recipe.distill
    if section is None:
        return None, student

    def work(scratch: Path) -> Distilled:
        trained, distilled = distill(
            student.graph,
            known.network.graph,
            boundaries(student, known.network, known.plan),
            known.data,
            section,
            seed=recipe.seed,
            device=resolve_device(recipe.device),
            progress_dir=run.progress("distill"),
        )
        save_weights(trained.cpu(), scratch / "distill.safetensors")
        return distilled

    depends = {"prune": run.key_of("prune"), "distill": section, "augment": recipe.data.augment}
    distilled = run.stage("distill", Distilled, work, depends=depends)
    return distilled, read_student(run, known, student.surgery, "distill.safetensors")


def deploy(run: Run, recipe: Recipe, known: Understood, student: Student) -> Exported:
    """Export and check parity; leave the student's weights and surgery for further training."""
    before = "prune" if recipe.distill is None else "distill"

    def work(scratch: Path) -> Exported:
        save_weights(student.graph, scratch / WEIGHTS)
        return export(student.graph, known.network.graph, known.data, recipe.export, scratch)

    exported = run.stage("export", Exported, work, depends={before: run.key_of(before), "export": recipe.export})
    run.write_json(SURGERY, {"schema": 1, "input_shape": known.data.input_shape, "surgery": student.surgery})
    return exported


def score(run: Run, recipe: Recipe, known: Understood, student: Student, exported: Exported) -> Scorecard:
    """Benchmark teacher and student; the only place where the test split is read."""
    section = recipe.benchmark
    if section is None:
        reasons = ("the benchmark was skipped (benchmark: null), so nothing was measured",)
        scorecard = Scorecard(verdict="INCONCLUSIVE", reasons=reasons, notes=(), rows=())
    else:
        models = deployed(exported, run.folder, known.network.graph, student.graph)
        scorecard = run.stage(
            "benchmark",
            Scorecard,
            lambda _: benchmark(*models, known.data.test, section, recipe.budget),
            depends={"export": run.key_of("export"), "benchmark": section, "budget": recipe.budget},
        )
    run.write_json("scorecard.json", scorecard)
    run.write_text("scorecard.csv", scorecard_csv(scorecard))
    run.write_text("scorecard.md", scorecard_markdown(scorecard))
    return scorecard


def look_at_examples(run: Run, recipe: Recipe, known: Understood, student: Student) -> Examples:
    """Validation inputs on which teacher and student part."""
    return run.stage(
        "examples",
        Examples,
        lambda _: find_disagreements(known.network.graph, student.graph, known.data, most=recipe.report.examples),
        depends={"export": run.key_of("export"), "report": recipe.report},
    )


Told = tuple[Log, Log, Distilled | None, Exported, Scorecard, Examples]


def report(run: Run, recipe: Recipe, known: Understood, told: Told) -> None:
    """Write report.json and report.html."""
    rewritten, pruned, distilled, exported, scorecard, examples = told
    context = ReportInput(
        recipe=recipe,
        provenance=read_provenance(run.folder),
        teacher=known.teacher,
        effects=known.effects,
        groups=known.groups,
        candidates=known.candidates,
        plan=known.plan,
        rewritten=rewritten,
        pruned=pruned,
        distilled=distilled,
        exported=exported,
        scorecard=scorecard if scorecard.rows else None,
        disagreements=examples.disagreements,
        disagreed=(examples.disagreed, examples.inputs),
    )
    run.write_text("report.json", report_json(context))
    run.write_text("report.html", build_report(context))
