"""The recipes that come with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from causal_compress.errors import UsageError


def shipped_recipes() -> dict[str, Path]:
    """Names of the shipped recipes, in alphabetical order, and their files."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """The file that `--recipe` means: a path, or the name of a shipped recipe.

    A bare name that is a file here and also a shipped recipe means the file.

    Raises:
        UsageError: It is neither.
    """
    if Path(text).is_file():
        return Path(text)
    shipped = shipped_recipes()
    if text in shipped:
        return shipped[text]
    close = difflib.get_close_matches(text, shipped, n=1)
    raise UsageError(
        f"no recipe '{text}'",
        found="a folder" if Path(text).is_dir() else "neither a file nor the name of a shipped recipe",
        wanted=f"a YAML file or one of: {', '.join(shipped) or 'none is shipped'}",
        remedy=f"did you mean '{close[0]}'?" if close else "check the path; 'causal-compress recipes list' names them",
    )


def headline(path: Path) -> str:
    """The first line of a recipe's header comment, or an empty text."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
