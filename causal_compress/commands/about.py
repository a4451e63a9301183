"""doctor and recipes: what is here."""

from __future__ import annotations

import click

from causal_compress.commands.shared import as_json_text, talks
from causal_compress.console import show_diagnosis, tell, tell_lines
from causal_compress.shipped import find_recipe, headline, shipped_recipes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@talks
def doctor(*, as_json: bool) -> None:
    """Says what is installed and what of it works here."""
    from causal_compress.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        tell_lines(as_json_text(diagnosis))
    else:
        show_diagnosis(diagnosis)


@click.group()
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
    tell_lines(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


@recipes.command("check")
@click.argument("file")
def check_recipe(*, file: str) -> None:
    """Says all that is wrong with a recipe FILE, with line numbers."""
    from causal_compress.recipe_file import load_recipe

    load_recipe(find_recipe(file))
    tell(f"{file}: no fault found")
