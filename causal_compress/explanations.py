"""Explaining a finished run's teacher and student, or any checkpoint, and writing it down as a page or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from causal_compress.errors import DataError, UsageError
from causal_compress.explain.explaining import Question, Subject, ask, ask_about_file, explain, find_nodes
from causal_compress.explain.page import Pictures, explanation_page, pictures_of
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Data, Split, load_data
from causal_compress.inputs.images import ImageArray, ImageRows, image_array
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Explanation, Exported, Groups, Surgery
from causal_compress.runs import read_result
from causal_compress.shrink.surgery import replay
from causal_compress.stages import SURGERY, WEIGHTS, numerics
from causal_compress.understand.algebra import folded
from causal_compress.understand.network import open_network
from causal_compress.understand.trace import trace


@dataclass(frozen=True)
class Explained:
    """Explanations of one or two networks, and for an image the pictures that belong to them."""

    title: str
    explanations: tuple[Explanation, ...]
    pictures: tuple[Pictures | None, ...]


def recipe_of_run(folder: Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a finished run, with overrides.

    Raises:
        RunFolderError: no finished run.
    """
    read_result(folder, "export", Exported)
    return load_recipe(folder / "recipe.resolved.yaml", settings)


def explain_run_or_checkpoint(
    folder: Path | None,
    recipe: Recipe,
    *,
    split: str = "validation",
    index: int | None = None,
    file: Path | None = None,
    of_class: str | None = None,
) -> Explained:
    """Explain teacher and student of a run, or the network that a recipe names.

    Args:
        folder: A finished run, left unchanged; None: the recipe's network alone.
        recipe: The run's, or of a checkpoint.
        split: validation, calibration or test.
        index: An input of the split.
        file: An image, or an .npy file with one input as it is stored in the data source; instead of an index.
        of_class: Name or number of a class; only inputs that get it count.
    """
    data = load_data(recipe.data, seed=recipe.seed)
    chosen: Split = getattr(data, split)
    question = ask(data, chosen, index=index, of_class=of_class)
    if file is not None:
        question = ask_about_file(data, question, read_input(file, data), file.name)
    with numerics(recipe):
        subjects = _subjects(folder, recipe, data)
        found = tuple(explain(subject, data, recipe.explain, question, seed=recipe.seed) for subject in subjects)
    pictures = tuple(_pictures(explanation, data, recipe, question) for explanation in found)
    return Explained(recipe.report.title or (recipe.model.arch or "Network").rpartition("/")[2], found, pictures)


def _subjects(folder: Path | None, recipe: Recipe, data: Data) -> tuple[Subject, ...]:
    network = open_network(recipe, data)
    if folder is None:
        nodes = find_nodes(network, data, recipe.intervene, recipe.group, recipe.seed)
        return (Subject("network", network, nodes),)
    surgery = _surgery(folder)
    network = folded(network, surgery.folds)
    student = replay(network, surgery, load_file(folder / WEIGHTS))
    smaller = trace(student.graph, data.example_input)
    nodes = find_nodes(smaller, data, recipe.intervene, recipe.group, recipe.seed)
    known = read_result(folder, "group", Groups).chosen.nodes
    return Subject("teacher", network, known), Subject("student", smaller, nodes)


def _surgery(folder: Path) -> Surgery:
    from pydantic import TypeAdapter

    record: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json((folder / SURGERY).read_bytes())
    return TypeAdapter(Surgery).validate_python(record["surgery"])


def _pictures(explanation: Explanation, data: Data, recipe: Recipe, question: Question) -> Pictures | None:
    if explanation.local is None or data.kind != "image" or question.x is None:
        return None
    return pictures_of(explanation.local, question.x, data, recipe.explain, seed=recipe.seed)


def read_input(file: Path, data: Data) -> Tensor:
    """One input from a file, prepared as the data source's own inputs are.

    Args:
        file: An image of any size (short side resized, centre cropped), or an .npy array: an image H x W x C, or a
            table's row in encoded form.
        data: Says how inputs are prepared.

    Raises:
        DataError: a file that can't be read as an input.
    """
    rows = data.validation.rows
    try:
        if file.suffix == ".npy":
            values = np.load(file, allow_pickle=False)
            if not isinstance(rows, ImageRows):
                return torch.from_numpy(values.astype(np.float32)).reshape(1, -1)
            values = _as_stored(values, rows, file.name)
        elif isinstance(rows, ImageRows):
            values = _open_image(file, rows.store.shape)[None]
        else:
            raise UsageError(
                "a table's input can't be read from this file",
                found=str(file),
                wanted=".npy with the encoded row",
                remedy="explain a row of the data with --index instead",
            )
    except (OSError, ValueError, EOFError, SyntaxError) as error:  # Pillow: SyntaxError on broken PNG headers
        raise DataError(
            f"{file} can't be read as an input",
            found=str(error),
            wanted="an image, or an .npy array",
            remedy="check the path and the file",
        ) from error
    return rows.preparation.normalized(rows.preparation.scaled(values, None))


def _as_stored(values: NDArray[Any], rows: ImageRows, name: str) -> NDArray[Any]:
    """One image of an array, 1 x H x W x C, in the numbers of the data source."""
    if values.ndim not in (2, 3) or values.dtype.kind not in "uifb":
        raise DataError(
            f"{name} is not one image",
            found=f"shape {values.shape}, dtype {values.dtype}",
            wanted="H x W or H x W x C numbers",
            remedy="save one image, channels last",
        )
    stored = image_array(values[None], name).values
    if isinstance(rows.store, ImageArray) and rows.store.values.dtype.kind == "f":
        return values[None].reshape(stored.shape).astype(np.float32)  # a source of floats is taken as it stands
    return stored


def _open_image(file: Path, shape: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    from PIL import Image, ImageOps

    height, width, channels = shape
    with Image.open(file) as opened:
        image = ImageOps.fit(
            opened.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BILINEAR
        )
    return np.array(image, dtype=np.uint8).reshape(height, width, channels)


def write_explanations(explained: Explained, path: Path) -> None:
    """Write a self-contained page (.html) or JSON (.json); the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        atomic_write_text(path, explanation_page(explained.title, explained.explanations, explained.pictures))
        return
    import json

    from pydantic_core import to_jsonable_python

    plain = to_jsonable_python(explained.explanations, inf_nan_mode="strings")
    content = {"schema": 1, "title": explained.title, "explanations": plain}
    atomic_write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
