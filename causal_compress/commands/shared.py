"""What commands share: options, the recipe they name, how they end."""

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

from causal_compress.console import show_scorecard, speaking, tell, tell_lines
from causal_compress.errors import UsageError
from causal_compress.shipped import find_recipe

if TYPE_CHECKING:
    from causal_compress.recipe import Recipe
    from causal_compress.results import Scorecard

EXIT_CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
FOLDER = click.Path(path_type=Path)

Command = Callable[..., Any]


def talks(command: Command) -> Command:
    """Adds -v and -q to a command, and lets log and progress reach stderr while it runs."""

    @click.option("-v", "--verbose", count=True, help="Details; twice: tracebacks too.")
    @click.option("-q", "--quiet", is_flag=True, help="Only warnings, errors and the result.")
    @click.pass_obj
    @wraps(command)
    def talking(stack: ExitStack, /, *, verbose: int, quiet: bool, **options: Any) -> Any:
        stack.enter_context(speaking(-1 if quiet else verbose))
        return command(**options)

    return talking


def takes_inputs(command: Command) -> Command:
    """Adds what `compress` and `analyze` share: the recipe, what overrides it, and the run folder."""
    options = [
        click.option("--recipe", metavar="FILE|NAME", help="Recipe file, or the name of a shipped recipe."),
        click.option("--arch", help="torchvision:NAME, timm:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE."),
        click.option("--weights", metavar="FILE", help="Checkpoint: .pt, .pth, .th or .safetensors."),
        click.option("--data", metavar="SOURCE", help="npz:FILE, imagefolder:DIR, csv:FILE, sklearn:NAME and others."),
        click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Run folder; an unfinished run resumes."),
        click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Overrides a recipe key."),
        click.option(
            "--undo", multiple=True, metavar="NODE", help="A node of the ledger that stays whole; repeatable."
        ),
        click.option("--seed", type=int, help="Seed of everything random."),
        click.option("--reuse", type=FOLDER, metavar="RUN", help="Take over equal stages from another run folder."),
        click.option("--force", is_flag=True, help="Go on although the teacher is hardly better than chance."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def refuse_several_processes() -> None:
    """Refuses a start by torchrun or `accelerate launch` with several processes, before they fight for the folder.

    Raises:
        UsageError: There are more than one.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1:
        raise UsageError(
            "a run is the work of one process",
            found=f"WORLD_SIZE={count}: started by torchrun or accelerate launch",
            wanted="one process, which uses the cores and the device that the recipe names",
            remedy="start causal-compress by itself",
        )


def chosen_recipe(
    *, recipe: str | None, settings: Sequence[str], seed: int | None, undo: Sequence[str] = (), **inputs: str | None
) -> Recipe:
    """The recipe with `--set`, then the flags, laid over it; refuses one without a network or data."""
    from causal_compress.recipe_file import load_recipe

    keys = {"arch": "model.arch", "weights": "model.weights", "data": "data.source"}
    flags = {keys[flag]: value for flag, value in inputs.items()} | {"seed": seed, "plan.undo": list(undo) or None}
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


def finish(scorecard: Scorecard, folder: Path | None, as_json: bool) -> int:
    """Print what was measured and where the report of it lies, if there is one; returns the verdict's exit code."""
    if as_json:
        tell_lines(as_json_text(scorecard))
    else:
        show_scorecard(scorecard)
        if folder is not None:
            tell(f"report: {folder / 'report.html'}")
    return EXIT_CODES[scorecard.verdict]


def as_json_text(value: Any) -> str:
    """A result as JSON that every parser reads: NaN and infinity stand as text."""
    from pydantic_core import to_jsonable_python

    from causal_compress.explain.formats import strict

    return json.dumps(strict(to_jsonable_python(value)), indent=2, ensure_ascii=False, allow_nan=False)


def command_line() -> list[str]:
    """This process's command, for run.json."""
    return ["causal-compress", *sys.argv[1:]]
