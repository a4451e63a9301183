"""compress, analyze and demo: from a checkpoint to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from causal_compress.commands.shared import (
    FOLDER,
    as_json_text,
    chosen_recipe,
    command_line,
    finish,
    refuse_several_processes,
    takes_inputs,
    talks,
)
from causal_compress.console import show_plan, tell_lines


@click.command()
@takes_inputs
@talks
def compress(*, out: Path, reuse: Path | None, force: bool, as_json: bool, **inputs: Any) -> int:
    """Compresses a checkpoint, verifies and reports it."""
    refuse_several_processes()
    recipe = chosen_recipe(**inputs)  # before torch is loaded: a wrong recipe is refused at once

    from causal_compress.pipeline import compress as carry_out

    outcome = carry_out(recipe, out, command=command_line(), reuse=reuse, force=force)
    return finish(outcome.scorecard, outcome.folder, as_json)


@click.command()
@takes_inputs
@talks
def analyze(*, out: Path, reuse: Path | None, force: bool, as_json: bool, **inputs: Any) -> None:
    """Shows what would be done, its size and its harm; trains nothing."""
    refuse_several_processes()
    recipe = chosen_recipe(**inputs)

    from causal_compress.pipeline import analyze as look_ahead

    plan = look_ahead(recipe, out, command=command_line(), reuse=reuse, force=force)
    if as_json:
        tell_lines(as_json_text(plan))
    else:
        show_plan(plan)


@click.command()
@click.option(
    "--out",
    type=FOLDER,
    default=Path("runs/demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for the teacher; the run is in DIR/run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard as JSON.")
@talks
def demo(*, out: Path, as_json: bool) -> int:
    """Trains a small network on digits, and compresses it."""
    from causal_compress.demo import demo as show

    outcome = show(out)
    return finish(outcome.scorecard, outcome.folder, as_json)
