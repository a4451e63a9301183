"""benchmark and report: what can be done with finished models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.commands.shared import FOLDER, as_json_text, finish, talks
from causal_compress.commands.target_table import show_targets, targets_csv
from causal_compress.console import tell, tell_lines
from causal_compress.errors import UsageError
from causal_compress.shipped import find_recipe

if TYPE_CHECKING:
    from causal_compress.recipe import BenchmarkSection, Recipe


_PACKAGE, _RECIPE, _MEASURED = "package.json", "recipe.resolved.yaml", "benchmark."
# The words of recipe.RuntimeName, which would bring pydantic into every --help.
_RUNTIMES = (
    "torch, torch-compiled, onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, openvino, tensorrt or tensorrt-rtx"
)
_WANTED = {
    "batches": "whole numbers such as --batch 1,64",
    "threads": "whole numbers such as --threads 1,2",
    "runtimes": f"as --runtime {_RUNTIMES}",
    "repeats": "a whole number such as --repeats 100",
}


@click.command()
@click.argument("targets", type=FOLDER, nargs=-1, required=True, metavar="TARGET...")
@click.option("--batch", "batches", metavar="N,N,...", help="Batch sizes.")
@click.option("--threads", metavar="N,N,...", help="Numbers of CPU threads.")
@click.option("--runtime", "runtimes", multiple=True, metavar="R", help=f"Repeatable: {_RUNTIMES}.")
@click.option("--precision", "precisions", multiple=True, help="fp32, fp16 or int8; repeatable.")
@click.option("--repeats", type=int, metavar="N", help="Timed calls of each model.")
@click.option("--recipe", metavar="FILE|NAME", help="Recipe that says how --data is read.")
@click.option("--data", metavar="SOURCE", help="Labelled inputs, for targets that bring none.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Overrides a recipe key.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV.")
@talks
def benchmark(*, targets: Sequence[Path], as_json: bool, as_csv: bool, **asked: Any) -> int:
    """Measures runs, packages, engines and model files here."""
    settings = asked.pop("settings")
    measured = [setting for setting in settings if setting.startswith(_MEASURED)]
    others = [setting for setting in settings if setting not in measured]
    data = _data_recipe(targets, asked.pop("recipe"), asked.pop("data"), others)
    precisions = asked.pop("precisions")
    section = _benchmark_section(measured, **asked)
    if len(targets) == 1 and _is_plain_run(targets[0]) and not (precisions or data or as_csv):
        from causal_compress.afterwards import rebenchmark

        return finish(rebenchmark(targets[0], section), None, as_json)

    from causal_compress.afterwards import benchmark_targets

    runtimes = section.runtimes if "runtimes" in section.model_fields_set else ()
    table = benchmark_targets(targets, section, runtimes=runtimes, precisions=precisions, data=data)
    if as_csv:
        tell_lines(targets_csv(table).rstrip("\n"))
    elif as_json:
        tell_lines(as_json_text(table))
    else:
        show_targets(table)
    return 0


@click.command()
@click.argument("run", type=FOLDER)
@talks
def report(*, run: Path) -> None:
    """Builds report.html of a finished RUN anew."""
    from causal_compress.afterwards import rebuild_report

    tell(str(rebuild_report(run)))


def _is_plain_run(target: Path) -> bool:
    folder = target.is_dir() or not (target.exists() or target.suffix)  # what is not there is told by its name
    return folder and not (target / _PACKAGE).is_file()


def _data_recipe(
    targets: Sequence[Path], recipe: str | None, data: str | None, settings: Sequence[str]
) -> Recipe | None:
    """How labelled inputs are prepared: as --recipe says, else as for the first run or package among the targets."""
    if recipe is None and data is None and not settings:
        return None
    from causal_compress.recipe_file import load_recipe

    runs = [target / _RECIPE for target in targets if (target / _RECIPE).is_file()]
    packages = [target for target in targets if (target / _PACKAGE).is_file()]
    base = find_recipe(recipe) if recipe else runs[0] if runs else None
    given = [*settings, *([f"data.source={json.dumps(data)}"] if data is not None else [])]
    named = any(setting.startswith("data.source=") for setting in given)
    packaged = _as_packaged(packages[0]) if base is None and named and packages else []
    loaded = load_recipe(base, [*packaged, *given])
    if loaded.data.source is None:
        raise UsageError("no data was given", found="no data.source", remedy="add --data npz:FILE or another source")
    return loaded


def _as_packaged(folder: Path) -> list[str]:
    """Settings that prepare images as a package wants them; refuses what package.json does not tell."""
    from causal_compress.deploy.targets import read_package

    package = read_package(folder)
    if package.kind != "image" or "resized" in package.preparation:
        raise UsageError(
            f"{folder} does not say how --data is to be prepared",
            found=package.preparation,
            remedy="give the --recipe that the run was made with, or leave --data out to use the package's own inputs",
        )
    found = {"mean": package.mean, "std": package.std}
    return [f"data.normalize.{key}={json.dumps(value)}" for key, value in found.items() if value is not None]


def _benchmark_section(
    settings: Sequence[str], *, batches: str | None, threads: str | None, runtimes: Sequence[str], repeats: int | None
) -> BenchmarkSection:
    """Only what was given is set, so that the run's own recipe answers for the rest (`model_fields_set`)."""
    from pydantic import ValidationError

    from causal_compress.recipe import BenchmarkSection
    from causal_compress.recipe_file import load_recipe

    asked = load_recipe(None, settings).benchmark if settings else None
    given = {} if asked is None else asked.model_dump(exclude_unset=True)
    flags = {
        "batches": batches.split(",") if batches is not None else None,
        "threads": threads.split(",") if threads is not None else None,
        "runtimes": list(runtimes) or None,
        "repeats": repeats,
    }
    try:
        chosen = given | {key: value for key, value in flags.items() if value is not None}
        return BenchmarkSection.model_validate(chosen)
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        wrong = {fault["loc"][0] for fault in error.errors()}
        raise UsageError(
            "the benchmark can't be run like that",
            found="; ".join(faults),
            remedy="give " + ", and ".join(words for key, words in _WANTED.items() if key in wrong),
        ) from error
