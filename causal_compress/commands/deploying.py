"""export and gate: from a finished run to what ships, and whether it may."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.commands.shared import EXIT_CODES, FOLDER, as_json_text, talks
from causal_compress.console import show_table, tell, tell_lines
from causal_compress.errors import UsageError

if TYPE_CHECKING:
    from causal_compress.deploy.bundle import Wish
    from causal_compress.results import Package, PackagedModel

_GOALS = ("onnx", "int8", "tensorrt", "tensorrt-rtx", "openvino", "pt2")
_PRECISIONS = ("fp32", "fp16", "int8")
_MIB = 2**20


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--to", "goal", type=click.Choice(_GOALS), required=True, help="Kind of runtime.")
@click.option("--out", type=FOLDER, metavar="DIR", help="Folder of the package; default: RUN-KIND.")
@click.option("--precision", "precisions", metavar="P,P,...", help="fp32, fp16, int8; default: what fits the kind.")
@click.option("--capability", "capabilities", multiple=True, metavar="SM89", help="TensorRT-RTX: GPU generation.")
@click.option(
    "--batch", "batches", default="1,8,64", show_default=True, metavar="N,N,...", help="Engines: batch sizes."
)
@click.option("--workspace", type=int, default=1024, show_default=True, metavar="MIB", help="Engines: scratch memory.")
@click.option("--timing-cache", type=FOLDER, metavar="FILE", help="TensorRT: timings kept between builds.")
@click.option(
    "--compatible", type=click.Choice(("hardware", "version")), multiple=True, help="TensorRT: run elsewhere."
)
@click.option("--teacher/--no-teacher", default=True, help="Whether the package holds the teacher too.")
@click.option("--json", "as_json", is_flag=True, help="Print package.json.")
@talks
def export(*, run: Path, goal: str, out: Path | None, as_json: bool, **asked: Any) -> None:
    """Writes a RUN's models as a folder for one kind of runtime."""
    wish = _wish(goal, **asked)

    from causal_compress.afterwards import export_run

    folder = out or run.resolve().with_name(f"{run.resolve().name}-{goal}")
    package = export_run(run, wish, folder)
    if as_json:
        tell_lines(as_json_text(package))
    else:
        _show_package(package, folder)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--max-drop", "max_drop_pp", type=float, metavar="PP", help="Largest drop of accuracy [pp].")
@click.option("--min-speedup", type=float, metavar="X", help="Smallest speed-up over the teacher.")
@click.option("--runtime", default="onnxruntime", show_default=True, help="Runtime whose measurement is judged.")
@click.option(
    "--precision", type=click.Choice(_PRECISIONS), help="Of the student; default: int8 where it was chosen, else fp32."
)
@click.option("--batch", type=int, default=1, show_default=True, help="Batch size.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@talks
def gate(*, run: Path, as_json: bool, **limits: Any) -> int:
    """Judges a RUN (or its scorecard) by limits, for CI."""
    from causal_compress.afterwards import gate_run
    from causal_compress.deploy.gate import Limits

    gated = gate_run(run, Limits(**limits))
    if as_json:
        tell_lines(as_json_text(gated))
    else:
        tell(gated.text)
    return EXIT_CODES[gated.verdict]


def _wish(goal: str, *, precisions: str | None, batches: str, workspace: int, **rest: Any) -> Wish:
    from causal_compress.deploy.bundle import GOALS, Wish
    from causal_compress.deploy.precision import PRECISIONS
    from causal_compress.deploy.tensorrt import EngineOptions

    chosen = [part.strip() for part in precisions.split(",")] if precisions is not None else []
    if unknown := [part for part in chosen if part not in PRECISIONS]:
        raise UsageError(
            f"no precision {unknown[0]!r}", wanted=", ".join(_PRECISIONS), remedy="give --precision fp32,fp16,int8"
        )
    options = EngineOptions(
        batches=_numbers(batches),
        workspace_bytes=workspace * _MIB,
        timing_cache=rest["timing_cache"],
        hardware_compatible="hardware" in rest["compatible"],
        version_compatible="version" in rest["compatible"],
    )
    return Wish(
        goal=next(known for known in GOALS if known == goal),
        precisions=tuple(known for known in PRECISIONS if known in chosen),
        capabilities=tuple(rest["capabilities"]),
        engine=options,
        teacher=rest["teacher"],
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError("batch sizes are whole numbers", found=text, remedy="give --batch 1,8,64") from error


def _show_package(package: Package, folder: Path) -> None:
    header = ("model", "file", "precision", "for", "size", "agreement", "largest difference", "inputs", "on")
    show_table(header, [_cells(model) for model in package.models])
    for told in dict.fromkeys(model.note for model in package.models if model.note):
        tell(f"  note: {told}")
    for skip in package.skipped:
        tell(f"  left out: {skip.what}: {skip.reason}")
    tell(f"package: {folder}")


def _cells(model: PackagedModel) -> Sequence[str]:
    parity = model.parity
    figures = (
        ("", "not run", "", "") if parity is None else (f"{parity.agreement_pct:.2f} %", f"{parity.max_abs_diff:.2g}")
    )
    if parity is not None:
        figures = (*figures, str(parity.inputs), model.parity_on or "")
    name = next(iter(model.files))
    return (model.role, name, model.precision, model.capability or "", f"{model.size_bytes / 1e6:.2f} MB", *figures)
