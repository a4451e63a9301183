"""Whether a folder was made with the recipe that is given now, and what differs if it was not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from causal_compress.errors import RecipeError, RunFolderError
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe

_MAX_SHOWN = 12
_MEANS = ("device", "threads")  # by what is computed, not what: a run may go on elsewhere, as run.json tells
_BEFORE = {"distill": {"optimizer": "sgd"}}  # what was done before a key existed, if not what is its default


def refuse_another(folder: Path, file: Path, recipe: Recipe) -> None:
    """Refuse a run folder of another recipe; keys that did not exist when it was made count as what was done then.

    A recipe with another device or number of threads is the same one.

    Args:
        folder: The run folder.
        file: The recipe it was made with.
        recipe: What is asked for now.

    Raises:
        RunFolderError: They differ, or the file can't be read; says where they differ.
    """
    there, here = _read(file), recipe.model_dump(mode="json")
    for key in _MEANS:
        if isinstance(there, dict) and key in there:
            there[key] = here[key]
    if there == here:
        return
    told = list(_differences(there, here)) if isinstance(there, dict) else []
    shown, more = told[:_MAX_SHOWN], [f"and {len(told) - _MAX_SHOWN} more"] if len(told) > _MAX_SHOWN else []
    raise RunFolderError(
        f"{folder} belongs to a run of another recipe",
        found="; ".join([*shown, *more]) or "another fingerprint in run.json",
        remedy=f"give another --out (with --reuse {folder} the stages that both share are taken over), "
        "or the recipe that this folder was made with",
    )


def _read(file: Path) -> Any:
    """The recipe with what absent keys stood for; as it stands if it is none any more; None if it can't be read."""
    written = None
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    with suppress(RecipeError):
        return load_recipe(file, list(_unsaid(written))).model_dump(mode="json")
    return written


def _unsaid(written: Any) -> Iterator[str]:
    """Overrides for keys that the recipe was written without, where what was done then is not the default now."""
    for section, keys in _BEFORE.items():
        said = written.get(section) if isinstance(written, dict) else None
        if isinstance(said, dict):
            yield from (f"{section}.{key}={value}" for key, value in keys.items() if key not in said)


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Where two recipes differ; a section that only one of them has is one difference."""
    for key in sorted({*there, *here}, key=str):
        old, new, name = there.get(key), here.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name}.")
        elif old != new:
            yield f"{name} is {_said(old)} there, {_said(new)} now"


def _said(value: Any) -> str:
    return "given" if isinstance(value, dict) and value else repr(value)
