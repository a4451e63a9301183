"""Each stage of a run: what it needs, what it depends on, what it leaves in the run folder.

Every stage writes its result first, and weights are read back from the folder: a killed run goes on as if unharmed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from causal_compress.deploy.benchmark import benchmark, chosen_int8, deployed
from causal_compress.deploy.faster import chosen_for_size, chosen_within
from causal_compress.deploy.latency import covering
from causal_compress.deploy.onnx import export, refuse_unknown_opset
from causal_compress.deploy.quantize import quantize
from causal_compress.deploy.scorecard import scorecard_csv, scorecard_markdown, seen_in_training
from causal_compress.errors import UsageError
from causal_compress.explain.audit import audit
from causal_compress.explain.examples import Examples, find_disagreements
from causal_compress.explain.report import ReportInput, audited_later, bisected, build_report, report_json
from causal_compress.files import sha256_of_json
from causal_compress.inputs.callables import callable_sha256
from causal_compress.inputs.data import Data, augmentation, load_data
from causal_compress.inputs.models import checkpoint_sha256
from causal_compress.planning import decide, most_inputs, surgery_depends
from causal_compress.provenance import place
from causal_compress.recipe import Recipe
from causal_compress.recover.distill import distill, resolve_device
from causal_compress.results import (
    Audit,
    Candidates,
    Change,
    Distilled,
    Effects,
    Exported,
    Groups,
    LatencyTable,
    Log,
    Pareto,
    Plan,
    Provenance,
    Quantized,
    RegionInfo,
    Scorecard,
    Skip,
    Surgery,
    TeacherScore,
)
from causal_compress.runs import Run, read_provenance, read_result
from causal_compress.shrink.front import Front, fresh_front
from causal_compress.shrink.measure import measure
from causal_compress.shrink.probe import Probe, draw_probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.surgery import Student, boundaries, save_weights
from causal_compress.shrink.surgery import replay as replay_surgery
from causal_compress.shrink.undo import whole_regions
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.group import group
from causal_compress.understand.intervene import intervene
from causal_compress.understand.network import open_network
from causal_compress.understand.teacher import (
    accuracy,
    refuse_near_chance,
    score_teacher,
    structure_sha256,
    weights_sha256,
)
from causal_compress.understand.trace import Network

WEIGHTS = "student.safetensors"
SURGERY = "surgery.json"
_ANY_PLAN = {"depth": True, "width": True}  # both are always measured, so one analysis serves every plan


Settle = Callable[[Run, Recipe, Candidates, Sequence[RegionInfo]], Recipe]
T = TypeVar("T")


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


@contextmanager
def numerics(recipe: Recipe) -> Iterator[None]:
    """Threads and seed for the time of a run.

    Without a number in the recipe PyTorch's own stays: it heeds OMP_NUM_THREADS and the cores that the process may use.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or before)
    torch.manual_seed(recipe.seed)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def understand(run: Run, recipe: Recipe, *, force: bool, settle: Settle | None = None) -> Understood:
    """Everything up to the plan.

    Args:
        run: The open run folder.
        recipe: What is asked for.
        force: Go on with a teacher near chance.
        settle: Turns a budget that leaves the size open into one that names it; None: half the MACs are planned for.
    """
    resolve_device(recipe.device)  # a device that is not there is refused before any work
    refuse_unknown_opset(recipe.export.opset)
    if recipe.model.arch is None or recipe.data.source is None:
        raise UsageError(
            "nothing to compress", found="no model.arch or no data.source", remedy="give --arch and --data"
        )
    data = load_data(recipe.data, seed=recipe.seed)
    network = open_network(recipe, data)
    whole_regions(recipe.plan.undo, network.chain().regions)  # a node that is not there is refused before any work
    inputs = {
        "weights": weights_sha256(network.graph),
        "structure": structure_sha256(network.graph),
        "data": data.fingerprint,
        "seed": recipe.seed,
    }

    teacher = run.stage("teacher", TeacherScore, lambda _: score_teacher(network, data), depends=inputs)
    run.note_inputs(checkpoint_sha256=checkpoint_sha256(recipe.model), data_sha256=data.fingerprint)
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
    probe = probe_of(recipe, data)
    candidates = run.stage(
        "candidates",
        Candidates,
        lambda _: measure(network, probe, effects, recipe.plan),
        depends={
            "intervene": run.key_of("intervene"),
            "plan": recipe.plan.model_copy(update=_ANY_PLAN).model_dump(exclude={"undo"}),
        },
    )
    settled = recipe if settle is None else settle(run, recipe, candidates, effects.chain.regions)
    plan = decide(run, settled, network, (candidates, effects, groups), probe)
    return Understood(data, network, teacher, effects, groups, candidates, plan, probe, recipe.plan.temperature)


def probe_of(recipe: Recipe, data: Data) -> Probe:
    """The calibration inputs on which candidates and surgery are fitted, and on which harm is read."""
    most = most_inputs(recipe)
    return draw_probe(data.calibration, data.features, recipe.plan, recipe.intervene, most, seed=recipe.seed)


def shrink_depth(run: Run, recipe: Recipe, known: Understood) -> tuple[Log, Student]:
    """Merge: one refitted representative per causal node."""

    def work(scratch: Path) -> Log:
        front = front_of(known, recipe.rewrite.inputs)
        student, changes, skips = rewrite(known.network, known.plan, front, recipe.rewrite)
        return write_log(scratch, "rewrite", student, known, (changes, skips), front.harm_kl)

    depends = surgery_depends(run.sources, run.key_of("candidates"), run.key_of("plan"), known.plan, recipe)
    log = run.stage("rewrite", Log, work, depends=depends)
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
    return fresh_front(known.network, known.probe, inputs, known.temperature)


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

    depends = {"prune": run.key_of("prune"), "distill": section, "augment": augmentation(recipe.data.augment)}
    distilled = run.stage("distill", Distilled, work, depends=depends)
    return distilled, read_student(run, known, student.surgery, "distill.safetensors")


def deploy(run: Run, recipe: Recipe, known: Understood, student: Student) -> Exported:
    """Export and check parity; leave the student's weights and surgery for further training."""
    before = "prune" if recipe.distill is None else "distill"

    def work(scratch: Path) -> Exported:
        save_weights(student.graph, scratch / WEIGHTS)
        exported = export(student.graph, known.network.teacher, known.data, recipe.export, scratch)
        return replace(exported, classes=known.data.classes, encoding_sha256=known.data.encoding_sha256)

    exported = run.stage("export", Exported, work, depends={before: run.key_of(before), "export": recipe.export})
    run.write_json(SURGERY, {"schema": 1, "input_shape": known.data.input_shape, "surgery": student.surgery})
    return exported


def shrink_bits(run: Run, recipe: Recipe, known: Understood, student: Student, exported: Exported) -> Quantized | None:
    """INT8 forms of the exported student, where the recipe asks for them."""
    section = recipe.quantize
    if section is None:
        return None
    limits = recipe.budget.model_dump(include={"size_bytes", "max_accuracy_drop"}, exclude_none=True)

    def work(scratch: Path) -> Quantized:
        forms = quantize(student.graph, run.folder / exported.onnx, known.data, section, scratch)
        forms = chosen_within(forms, known.teacher.accuracy, recipe.budget.max_accuracy_drop)
        return chosen_for_size(forms, recipe.budget.size_bytes)

    depends = {"export": run.key_of("export"), "quantize": section, **place(), **limits}
    return run.stage("quantize", Quantized, work, depends=depends)


def score(
    run: Run, recipe: Recipe, known: Understood, student: Student, files: tuple[Exported, Quantized | None]
) -> Scorecard:
    """Benchmark teacher, student and the student's INT8 form.

    It is the only place where the test split is read, apart from an audit that asks for it.
    """
    section = None if recipe.benchmark is None else covering(recipe.benchmark, recipe.budget)
    if section is None:
        reasons = ("the benchmark was skipped (benchmark: null), so nothing was measured",)
        scorecard = Scorecard(verdict="INCONCLUSIVE", reasons=reasons, notes=(), rows=())
    else:
        exported, quantized = files
        models = deployed(exported, run.folder, known.network.teacher, student.graph)
        int8 = None if quantized is None else chosen_int8(quantized, run.folder)
        scorecard = run.stage(
            "benchmark",
            Scorecard,
            lambda _: benchmark(*models, known.data.test, section, recipe.budget, int8=int8),
            depends={
                "export": run.key_of("export"),
                "benchmark": section,
                "budget": recipe.budget,
                **place(),
                **({} if recipe.quantize is None else {"quantize": run.key_of("quantize")}),
            },
        )
    note = seen_in_training(known.teacher, scorecard)
    if note is not None:
        scorecard = replace(scorecard, notes=(*scorecard.notes, note))
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


def check_harm(run: Run, recipe: Recipe, known: Understood, student: Student) -> Audit | None:
    """Teacher against student beyond accuracy, where the recipe asks for it."""
    section = recipe.audit
    if section is None:
        return None
    return run.stage(
        "audit",
        Audit,
        lambda _: audit(known.network, student, known.data, section, seed=recipe.seed),
        depends={"export": run.key_of("export"), "audit": section, "groups": callable_sha256(section.groups)},
    )


Told = tuple[Log, Log, Distilled | None, tuple[Exported, Quantized | None], Scorecard, Examples, Audit | None]


def report(run: Run, recipe: Recipe, known: Understood, told: Told) -> None:
    """Write report.json and report.html."""
    rewritten, pruned, distilled, (exported, quantized), scorecard, examples, audited = told
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
        pareto=stored(run, "search", Pareto),
        latency=stored(run, "latency", LatencyTable),
        quantized=quantized,
        audit=audited_later(run.folder, student_mark(run.folder)) or audited,
        bisection=bisected(run.folder, student_mark(run.folder)),
    )
    run.write_text("report.json", report_json(context))
    run.write_text("report.html", build_report(context))


def student_mark(folder: Path) -> str:
    """Fingerprint of a run's student and of all that it was made from, for what is found about it after the run."""
    return mark_in(read_provenance(folder))


def mark_in(provenance: Provenance) -> str:
    """The same, by the record of a run at any time."""
    record = next(record for record in provenance.stages if record.stage == "export")
    return sha256_of_json([record.key, record.files[WEIGHTS]])


def stored(run: Run, stage: str, result_type: type[T]) -> T | None:
    """A stage's result where this run has been through that stage, else None."""
    return read_result(run.folder, stage, result_type) if run.has(stage) else None
