"""What can be done with a finished run: report it anew, measure its models again, carry out its surgery again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from causal_compress.deploy.benchmark import benchmark, chosen_int8, deployed
from causal_compress.deploy.bundle import Source, Wish, write_package
from causal_compress.deploy.evidence import Evidence, brought_evidence, given_evidence, random_evidence
from causal_compress.deploy.gate import Limits, judge
from causal_compress.deploy.latency import covering
from causal_compress.deploy.package import load
from causal_compress.deploy.targets import PACKAGE, Entry, choose_entries, files_of
from causal_compress.deploy.versus import measure_targets
from causal_compress.errors import RunFolderError
from causal_compress.explain.audit import audit
from causal_compress.explain.report import STUDENT, ReportInput, build_report, read_report_json, report_json
from causal_compress.files import atomic_write_text, make_folder
from causal_compress.inputs.data import Data, load_data
from causal_compress.inputs.models import build_model
from causal_compress.planning import recorded, surgery_depends
from causal_compress.recipe import AuditSection, BenchmarkSection, Recipe, RuntimeName
from causal_compress.recipe_file import load_recipe
from causal_compress.results import (
    Audit,
    Bisection,
    Candidates,
    Exported,
    Gated,
    Log,
    Package,
    Plan,
    Quantized,
    Scorecard,
    Surgery,
    TargetTable,
)
from causal_compress.runfolder import RECORD, disk_errors
from causal_compress.runs import read_provenance, read_result, refuse_mixed
from causal_compress.shrink.bisect import Case, bisect, with_inputs
from causal_compress.shrink.surgery import Student
from causal_compress.shrink.surgery import replay as replay_surgery
from causal_compress.stages import SURGERY, WEIGHTS, mark_in, numerics, probe_of, student_mark
from causal_compress.understand.algebra import folded
from causal_compress.understand.network import open_network
from causal_compress.understand.trace import Network, trace

RECIPE = "recipe.resolved.yaml"


def rebuild_report(run_dir: Path) -> Path:
    """Build report.html anew from report.json of a finished run.

    Raises:
        RunFolderError: the folder holds no finished run.
    """
    read_result(run_dir, "export", Exported)
    if not (run_dir / "report.json").exists():
        raise RunFolderError(
            f"{run_dir} holds no report.json",
            found="a run that ended before its report",
            remedy="run the compress command on this folder again: it computes only what is missing",
        )
    context = _report_of(run_dir)
    with _into_the_run(run_dir):
        atomic_write_text(run_dir / "report.html", build_report(context))
    return run_dir / "report.html"


def _report_of(run_dir: Path) -> ReportInput:
    """What report.json holds, refused if it is about another student than the folder's."""
    context = read_report_json((run_dir / "report.json").read_text(encoding="utf-8"))
    if mark_in(context.provenance) != student_mark(run_dir):
        raise RunFolderError(
            f"report.json in {run_dir} is about an earlier student",
            found="a later run that made another one and ended before its report",
            remedy="run the compress command on this folder again: it computes only what is missing",
        )
    return context


def rebenchmark(run_dir: Path, section: BenchmarkSection) -> Scorecard:
    """Measure a finished run's exported models again, on this machine; nothing in the folder is changed.

    Args:
        run_dir: A finished run.
        section: Only the keys that were set override the run's own; what the budget asks about is measured as well.
    """
    exported = read_result(run_dir, "export", Exported)
    recipe = load_recipe(run_dir / RECIPE)
    base = (recipe.benchmark or BenchmarkSection()).model_dump()
    chosen = covering(BenchmarkSection(**{**base, **section.model_dump(exclude_unset=True)}), recipe.budget)
    data, quantized = _data_of(run_dir, recipe), _quantized(run_dir)
    int8 = None if quantized is None else chosen_int8(quantized, run_dir)
    with numerics(recipe):
        models = deployed(exported, run_dir, load(run_dir / exported.teacher_pt2), load(run_dir / exported.pt2))
        return benchmark(*models, data.test, chosen, recipe.budget, int8=int8)


def _data_of(run_dir: Path, recipe: Recipe) -> Data:
    """A run's data, refused if they are not what the run was made with."""
    data = load_data(recipe.data, seed=recipe.seed)
    _same_as_in_run("data", data.fingerprint, read_provenance(run_dir).data_sha256, run_dir)
    return data


def _quantized(run_dir: Path) -> Quantized | None:
    """The run's INT8 forms, checked against their hashes; None where it has none."""
    return read_result(run_dir, "quantize", Quantized) if _has(run_dir, "quantize") else None


def _has(run_dir: Path, stage: str) -> bool:
    return any(record.stage == stage for record in read_provenance(run_dir).stages)


def export_run(run_dir: Path, wish: Wish, out: Path) -> Package:
    """Write a finished run's models as a package for one kind of runtime; the run is not changed.

    Args:
        run_dir: A finished run.
        wish: For what runtime, precisions and GPUs.
        out: Folder of the package.
    """
    exported = read_result(run_dir, "export", Exported)
    recipe = load_recipe(run_dir / RECIPE)
    make_folder(out)
    with numerics(recipe):
        source = Source(
            folder=run_dir,
            teacher=load(run_dir / exported.teacher_pt2),
            student=load(run_dir / exported.pt2),
            data=_data_of(run_dir, recipe),
            prepared=recipe.data,
            parity=recipe.export,
            quantized=_quantized(run_dir),
        )
        return write_package(source, wish, out)


def gate_run(run: Path, limits: Limits) -> Gated:
    """Judge a finished run's scorecard, or one that `benchmark RUN --json` printed into a file, against limits.

    Args:
        run: A run folder, or the file of a scorecard.
        limits: Largest drop and smallest speed-up, and where.
    """
    file = run if run.is_file() else run / "scorecard.json"
    if file != run and (_has(run, "benchmark") or not file.is_file()):
        return judge(read_result(run, "benchmark", Scorecard), limits)
    try:  # of a run with benchmark: null, scorecard.json is all there is, and says that nothing was measured
        return judge(TypeAdapter(Scorecard).validate_json(file.read_bytes()), limits)
    except ValidationError as error:
        raise RunFolderError(
            f"{file} is no scorecard",
            found=error.errors(include_url=False)[0]["msg"],
            remedy="give a run folder, or what causal-compress benchmark RUN --json prints for one run "
            "without --precision, --data, --recipe and settings other than benchmark.*",
        ) from error


def benchmark_targets(
    targets: Sequence[Path],
    section: BenchmarkSection,
    *,
    runtimes: Sequence[RuntimeName] = (),
    precisions: Sequence[str] = (),
    data: Recipe | None = None,
) -> TargetTable:
    """Measure runs, packages and model files against each other, on this machine.

    Args:
        targets: The first is what the others are compared with.
        section: Batch sizes, threads, repeats and time limit; its runtimes are not looked at.
        runtimes: Asked for; empty: all that are here, except torch-compiled.
        precisions: Asked for; empty: all.
        data: A recipe whose data section names labelled inputs; None: those of a package or run among the targets.
    """
    for target in targets:
        if (target / RECORD).is_file() and not (target / PACKAGE).is_file():
            refuse_mixed(target)
    entries, skipped = choose_entries(files_of(targets), runtimes, precisions)
    return measure_targets(entries, skipped, section, _evidence(targets, entries, section, data))


def _evidence(
    targets: Sequence[Path], entries: Sequence[Entry], section: BenchmarkSection, data: Recipe | None
) -> Evidence:
    batch = max(section.batches)
    if data is not None:
        return given_evidence(entries, batch, data)
    packages = [target for target in targets if (target / PACKAGE).is_file()]
    runs = [target for target in targets if (target / RECIPE).is_file()]
    if not packages and not runs:
        return random_evidence(entries, batch)
    return brought_evidence((*packages, *runs)[0], entries, batch, lambda run: _data_of(run, load_recipe(run / RECIPE)))


def replay(model: nn.Module, run_dir: Path | str) -> nn.Module:
    """Carry out a run's surgery on the teacher's own architecture, for further training with live batch norms.

    Args:
        model: The teacher's architecture; its weights do not matter, it is left unchanged.
        run_dir: A finished run.

    Returns:
        The student as a torch.fx.GraphModule in training mode, with the weights of the run.

    Raises:
        TraceError: the architecture is not the one that the run was made with.
    """
    run_dir = Path(run_dir)
    read_result(run_dir, "export", Exported)
    record = _surgery_record(run_dir)
    example: Tensor = torch.zeros(2, *record["input_shape"])
    return replay_surgery(trace(model, example), read_surgery(run_dir), load_file(run_dir / WEIGHTS)).graph.train()


def read_surgery(run_dir: Path) -> Surgery:
    """What was done to the teacher's architecture, from surgery.json."""
    return TypeAdapter(Surgery).validate_python(_surgery_record(run_dir)["surgery"])


def _surgery_record(run_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json((run_dir / SURGERY).read_bytes())
    return record


@dataclass(frozen=True)
class Finished:
    """A finished run's networks and data, as they were when it ended."""

    recipe: Recipe
    data: Data
    network: Network
    student: Student


def reopen(run_dir: Path, recipe: Recipe | None = None) -> Finished:
    """Load teacher, student and data of a finished run; nothing in the folder is changed.

    Args:
        run_dir: A finished run; the checkpoint and the data must still be where its recipe says.
        recipe: The run's with other settings, such as where checkpoint and data lie now; None: the run's.

    Raises:
        RunFolderError: no finished run, or data or checkpoint are not those of the run any more.
    """
    exported = read_result(run_dir, "export", Exported)
    recipe = recipe or load_recipe(run_dir / RECIPE)
    data = _data_of(run_dir, recipe)
    network = open_network(recipe, data)
    with torch.no_grad():
        recorded = load(run_dir / exported.teacher_pt2)(data.example_input)
        now = network.teacher(data.example_input)
    same = recorded.shape == now.shape and bool(torch.allclose(recorded, now, rtol=1e-3, atol=1e-3))
    _same_as_in_run("teacher", "its outputs", "its outputs" if same else "other outputs", run_dir)
    surgery = read_surgery(run_dir)
    network = folded(network, surgery.folds)
    return Finished(recipe, data, network, replay_surgery(network, surgery, load_file(run_dir / WEIGHTS)))


def _same_as_in_run(what: str, now: str, then: str | None, run_dir: Path) -> None:
    if then is not None and now != then:
        raise RunFolderError(
            f"the {what} of {run_dir} is not what it was",
            found=f"{now[:16]} now, {then[:16]} in the run",
            wanted="the files that the run was made with",
            remedy="put them back, or compress again into a new folder",
        )


def audit_run(run_dir: Path, overrides: Mapping[str, Any], *, apart: Path | None = None) -> Audit:
    """Audit a finished run's student against its teacher; write `audit_file` into its folder, tell it in the report.

    Args:
        run_dir: A finished run.
        overrides: Keys of the recipe's audit section that are to differ.
        apart: Checkpoint of the teacher's architecture that was trained apart, a yardstick for attribution drift.

    Raises:
        RunFolderError: no finished run, its folder can't be written, or data or checkpoint are not those of the run.
    """
    student = _student_asked_about(run_dir)
    finished = reopen(run_dir)
    recipe = finished.recipe
    section = AuditSection(**{**(recipe.audit or AuditSection()).model_dump(), **overrides})
    stranger = None
    if apart is not None:
        weights = recipe.model.model_copy(update={"weights": str(apart)})
        stranger = build_model(weights, classes=len(finished.data.classes))
    with numerics(recipe):
        found = audit(finished.network, finished.student, finished.data, section, seed=recipe.seed, apart=stranger)
    _write(audit_file(run_dir), found, student)
    _tell(run_dir, lambda context: replace(context, audit=found))
    return found


def audit_file(run_dir: Path) -> Path:
    """Where a later audit is written: beside the run's own audit.json, where the run has one."""
    return run_dir / ("audit-later.json" if _has(run_dir, "audit") else "audit.json")


def bisect_run(run_dir: Path, *, inputs: int | None = None, top: int | None = None) -> Bisection:
    """Undo the changes of a finished run one at a time; write bisect.json into its folder, and tell it in the report.

    Args:
        run_dir: A finished run.
        inputs: Calibration inputs for each refit; None: as many as the run used.
        top: Only so many changes, those with most harm in the ledger; None: all.

    Raises:
        RunFolderError: no finished run, its folder can't be written, data or checkpoint are not those of the run, or
            its plan was made anew since.
    """
    student = _student_asked_about(run_dir)
    plan = _plan_of_student(run_dir)
    finished = reopen(run_dir)
    recipe = finished.recipe
    ledger = [line for stage in ("rewrite", "prune") for line in read_result(run_dir, stage, Log).changes]
    with numerics(recipe):
        case = Case(
            network=finished.network,
            plan=plan,
            candidates=read_result(run_dir, "candidates", Candidates),
            probe=probe_of(recipe, finished.data),
            validation=finished.data.validation,
            rewrite=recipe.rewrite,
            prune=recipe.prune,
            temperature=recipe.plan.temperature,
        )
        found = bisect(with_inputs(case, inputs), ledger, top=top, distilled=recipe.distill is not None)
    _write(run_dir / "bisect.json", found, student)
    _tell(run_dir, lambda context: replace(context, bisection=found))
    return found


def _plan_of_student(run_dir: Path) -> Plan:
    """The recorded plan, refused if the student was not made by it: a later analysis may have put another there."""
    plan = read_result(run_dir, "plan", Plan)
    keys = {record.stage: record.key for record in read_provenance(run_dir).stages}
    recipe = load_recipe(run_dir / RECIPE)
    if not recorded(run_dir, "rewrite", surgery_depends([run_dir], keys["candidates"], keys["plan"], plan, recipe)):
        raise RunFolderError(
            f"the plan in {run_dir} is not the plan that its student was made by",
            found="a plan that was made later, or by another version",
            remedy="run the compress command on this folder again: it puts the plan back that its recipe asks for",
        )
    return plan


def _student_asked_about(run_dir: Path) -> str:
    """Which student a finished run has now; refuses, before any work, a folder that the answer can't go into."""
    read_result(run_dir, "export", Exported)
    if (run_dir / "report.json").exists():
        _report_of(run_dir)
    with _into_the_run(run_dir):
        make_folder(run_dir)
    return student_mark(run_dir)


@contextmanager
def _into_the_run(run_dir: Path) -> Iterator[None]:
    """Errors of a run folder that can't be written, with a remedy for commands that have no --out."""
    try:
        with disk_errors(run_dir):
            yield
    except RunFolderError as error:
        if "--out" not in error.remedy:
            raise
        remedy = "mend its permissions, or copy the folder to where files can be written and name the copy"
        raise RunFolderError(error.what, found=error.found, wanted=error.wanted, remedy=remedy) from error


def _tell(run_dir: Path, extend: Callable[[ReportInput], ReportInput]) -> None:
    """Put what was found after the run into its report, where it has one."""
    if (run_dir / "report.json").exists():
        context = _report_of(run_dir)
        with _into_the_run(run_dir):
            atomic_write_text(run_dir / "report.json", report_json(extend(context)))
        rebuild_report(run_dir)


def _write(path: Path, value: Any, student: str) -> None:
    """Write what was found about a student, and which student it was."""
    from pydantic_core import to_json, to_jsonable_python

    marked = {STUDENT: student, **to_jsonable_python(value)}
    with _into_the_run(path.parent):
        atomic_write_text(path, to_json(marked, indent=1, inf_nan_mode="constants").decode() + "\n")
