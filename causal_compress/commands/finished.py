"""benchmark and report: what can be done with a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.commands.shared import FOLDER, finish, talks
from causal_compress.console import tell
from causal_compress.errors import UsageError

if TYPE_CHECKING:
    from causal_compress.recipe import BenchmarkSection


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--batch", "batches", metavar="N,N,...", help="Batch sizes.")
@click.option("--threads", metavar="N,N,...", help="Numbers of CPU threads.")
@click.option("--runtime", "runtimes", multiple=True, help="torch or onnxruntime; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON.")
@talks
def benchmark(*, run: Path, as_json: bool, **measured: Any) -> int:
    """Measures teacher and student of a RUN again, here."""
    section = _benchmark_section(**measured)

    from causal_compress.afterwards import rebenchmark

    return finish(rebenchmark(run, section), run, as_json)


@click.command()
@click.argument("run", type=FOLDER)
@talks
def report(*, run: Path) -> None:
    """Builds report.html of a finished RUN anew."""
    from causal_compress.afterwards import rebuild_report

    tell(str(rebuild_report(run)))


def _benchmark_section(*, batches: str | None, threads: str | None, runtimes: Sequence[str]) -> BenchmarkSection:
    """Only what was given is set, so that the run's own recipe answers for the rest (`model_fields_set`)."""
    from pydantic import ValidationError

    from causal_compress.recipe import BenchmarkSection

    given = {
        "batches": batches.split(",") if batches is not None else None,
        "threads": threads.split(",") if threads is not None else None,
        "runtimes": list(runtimes) or None,
    }
    try:
        return BenchmarkSection.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise UsageError(
            "the benchmark can't be run like that",
            found="; ".join(faults),
            remedy="give whole numbers such as --batch 1,64 --threads 1,2, and --runtime torch or onnxruntime",
        ) from error
