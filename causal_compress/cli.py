"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.console import complain, confess, show_diagnosis, show_plan, show_scorecard, speaking, tell
from causal_compress.errors import CausalCompressError, UsageError
from causal_compress.runfolder import UNUSABLE, folder_error
from causal_compress.shipped import find_recipe, headline, shipped_recipes

if TYPE_CHECKING:
    from causal_compress.recipe import BenchmarkSection, Recipe
    from causal_compress.results import Scorecard

_EXIT_CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
_FOLDER = click.Path(path_type=Path)

Command = Callable[..., Any]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and turns every outcome into an exit code.

    Args:
        args: The arguments without the program's name; None: those of this process.

    Returns:
        0 PASS or done, 1 error, 2 wrong usage or recipe, 3 budget missed, 4 inconclusive, 130 interrupted.
    """
    # Threads of torch that wait by spinning slow each other down many times over once another process wants the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with ExitStack() as stack:  # closed after the error is printed, so that -v still counts then
        try:
            return cli.main(args, prog_name="causal-compress", standalone_mode=False, obj=stack) or 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (click.Abort, KeyboardInterrupt) as stop:
            return _interrupted(stop)
        except CausalCompressError as error:
            return complain(error)
        except Exception as error:
            return _unexpected(error)


def _interrupted(stop: BaseException) -> int:
    if isinstance(stop.__cause__, EOFError):  # click takes a truncated file for the end of typed input
        return confess(stop.__cause__)
    click.echo("interrupted; the same command goes on after the last finished stage", err=True)
    return 130


def _unexpected(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return complain(folder_error(Path(error.filename or "the output"), error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        what = "memory ran out"
        remedy = (
            "lower intervene.batch_size, the stages' `inputs` or distill.batch_size with --set, or use another device"
        )
        return complain(CausalCompressError(what, found=str(error), remedy=remedy))
    return confess(error)


def _talks(command: Command) -> Command:
    """Adds -v and -q to a command, and lets log and progress reach stderr while it runs."""

    @click.option("-v", "--verbose", count=True, help="Details; twice: tracebacks too.")
    @click.option("-q", "--quiet", is_flag=True, help="Only warnings, errors and the result.")
    @click.pass_obj
    @wraps(command)
    def talking(stack: ExitStack, /, *, verbose: int, quiet: bool, **options: Any) -> Any:
        stack.enter_context(speaking(-1 if quiet else verbose))
        return command(**options)

    return talking


def _takes_inputs(command: Command) -> Command:
    """Adds what `compress` and `analyze` share: the recipe, what overrides it, and the run folder."""
    options = [
        click.option("--recipe", metavar="FILE|NAME", help="Recipe file, or the name of a shipped recipe."),
        click.option("--arch", help="torchvision:NAME, timm:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE."),
        click.option("--weights", metavar="FILE", help="Checkpoint: .pt, .pth, .th or .safetensors."),
        click.option("--data", metavar="SOURCE", help="npz:FILE, imagefolder:DIR, csv:FILE, sklearn:NAME and others."),
        click.option(
            "--out", required=True, type=_FOLDER, metavar="DIR", help="Run folder; an unfinished run resumes."
        ),
        click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Overrides a recipe key."),
        click.option("--seed", type=int, help="Seed of everything random."),
        click.option("--reuse", type=_FOLDER, metavar="RUN", help="Take over equal stages from another run folder."),
        click.option("--force", is_flag=True, help="Go on although the teacher is hardly better than chance."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=lambda *given: _show_version(*given)
)
def cli() -> None:
    """Makes a trained PyTorch classifier smaller and faster by understanding it first.

    Exit codes: 0 PASS, 1 error, 2 wrong usage or recipe, 3 budget missed, 4 inconclusive.
    """


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from causal_compress.provenance import package_version

        tell(f"causal-compress {package_version()}")
        context.exit()


@cli.command()
@_takes_inputs
@_talks
def compress(*, out: Path, reuse: Path | None, force: bool, as_json: bool, **inputs: Any) -> int:
    """Compresses a checkpoint, verifies and reports it."""
    recipe = _recipe(**inputs)  # before torch is loaded: a wrong recipe is refused at once

    from causal_compress.pipeline import compress as carry_out

    outcome = carry_out(recipe, out, command=_command(), reuse=reuse, force=force)
    return _finish(outcome.scorecard, outcome.folder, as_json)


@cli.command()
@_takes_inputs
@_talks
def analyze(*, out: Path, reuse: Path | None, force: bool, as_json: bool, **inputs: Any) -> None:
    """Shows what would be done, its size and its harm; trains nothing."""
    recipe = _recipe(**inputs)

    from causal_compress.pipeline import analyze as look_ahead

    plan = look_ahead(recipe, out, command=_command(), reuse=reuse, force=force)
    if as_json:
        tell(_as_json(plan))
    else:
        show_plan(plan)


@cli.command()
@click.argument("run", type=_FOLDER)
@click.option("--batch", "batches", metavar="N,N,...", help="Batch sizes.")
@click.option("--threads", metavar="N,N,...", help="Numbers of CPU threads.")
@click.option("--runtime", "runtimes", multiple=True, help="torch or onnxruntime; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON.")
@_talks
def benchmark(*, run: Path, as_json: bool, **measured: Any) -> int:
    """Measures teacher and student of a RUN again, here."""
    section = _benchmark_section(**measured)

    from causal_compress.afterwards import rebenchmark

    return _finish(rebenchmark(run, section), run, as_json)


@cli.command()
@click.argument("run", type=_FOLDER)
@_talks
def report(*, run: Path) -> None:
    """Builds report.html of a finished RUN anew."""
    from causal_compress.afterwards import rebuild_report

    tell(str(rebuild_report(run)))


@cli.command()
@click.option("--out", type=_FOLDER, default=Path("runs/demo"), show_default=True, metavar="DIR", help="Run folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON.")
@_talks
def demo(*, out: Path, as_json: bool) -> int:
    """Trains a small network on digits, and compresses it."""
    from causal_compress.demo import demo as show

    outcome = show(out)
    return _finish(outcome.scorecard, outcome.folder, as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@_talks
def doctor(*, as_json: bool) -> None:
    """Says what is installed and what of it works here."""
    from causal_compress.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        tell(_as_json(diagnosis))
    else:
        show_diagnosis(diagnosis)


@cli.group()
def recipes() -> None:
    """Lists and shows shipped recipes; checks your own."""


@recipes.command("list")
def list_recipes() -> None:
    """Names the shipped recipes."""
    for name, path in shipped_recipes().items():
        tell(f"{name:<12} {headline(path)}")


@recipes.command("show")
@click.argument("name")
def show_recipe(*, name: str) -> None:
    """Prints a shipped recipe, to be saved and changed."""
    tell(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


@recipes.command("check")
@click.argument("file")
def check_recipe(*, file: str) -> None:
    """Says all that is wrong with a recipe FILE, with line numbers."""
    from causal_compress.recipe_file import load_recipe

    load_recipe(find_recipe(file))
    tell(f"{file}: no fault found")


def _recipe(*, recipe: str | None, settings: Sequence[str], seed: int | None, **inputs: str | None) -> Recipe:
    """The recipe with `--set`, then the flags, laid over it; refuses one without a network or data."""
    from causal_compress.recipe_file import load_recipe

    keys = {"arch": "model.arch", "weights": "model.weights", "data": "data.source"}
    flags = {keys[flag]: value for flag, value in inputs.items()} | {"seed": seed}
    # JSON is YAML too: quoted, a path such as 2024 or null stays text.
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    loaded = load_recipe(find_recipe(recipe) if recipe else None, [*settings, *given])
    if loaded.model.arch is None:
        raise _not_given("architecture", "model.arch", "--arch torchvision:resnet18 or --arch my_model.py:build")
    if loaded.data.source is None:
        raise _not_given("data", "data.source", "--data npz:my_data.npz")
    return loaded


def _not_given(what: str, key: str, flag: str) -> UsageError:
    return UsageError(
        f"no {what} was given",
        found=f"neither {flag.split()[0]} nor the key {key} in the recipe",
        remedy=f"add a flag, such as {flag}, or set {key} in the recipe",
    )


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


def _finish(scorecard: Scorecard, folder: Path, as_json: bool) -> int:
    if as_json:
        tell(_as_json(scorecard))
    else:
        show_scorecard(scorecard)
        tell(f"report: {folder / 'report.html'}")
    return _EXIT_CODES[scorecard.verdict]


def _as_json(value: Any) -> str:
    from pydantic_core import to_json

    return to_json(value, indent=2, inf_nan_mode="constants").decode()


def _command() -> list[str]:
    return ["causal-compress", *sys.argv[1:]]
