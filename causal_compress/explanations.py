"""Explaining a finished run's teacher and student, or any checkpoint, and writing it down as a page or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from causal_compress.afterwards import RECIPE, Finished, reopen
from causal_compress.errors import DataError, UsageError
from causal_compress.explain.explaining import Question, Subject, ask, ask_about_file, explain, find_nodes
from causal_compress.explain.formats import strict
from causal_compress.explain.page import Pictures, explanation_page, pictures_of
from causal_compress.files import atomic_write_text, make_room
from causal_compress.inputs.data import Data, Split, load_data
from causal_compress.inputs.images import ImageArray, ImageRows, image_array, opened_image
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Explanation, Exported, Groups
from causal_compress.runs import read_result
from causal_compress.stages import numerics
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
    return load_recipe(folder / RECIPE, settings)


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

    Raises:
        RunFolderError: checkpoint or data are not those of the run any more.
    """
    if folder is None:
        finished, data = None, load_data(recipe.data, seed=recipe.seed)
    else:
        finished = reopen(folder, recipe)
        data = finished.data
    chosen: Split = getattr(data, split)
    question = ask(data, chosen, index=index, of_class=of_class)
    if file is not None:
        question = ask_about_file(data, question, read_input(file, data), file.name)
    with numerics(recipe):
        subjects = _subject(recipe, data) if folder is None or finished is None else _subjects(folder, finished)
        found = tuple(explain(subject, data, recipe.explain, question, seed=recipe.seed) for subject in subjects)
    pictures = tuple(_pictures(explanation, data, recipe, question) for explanation in found)
    return Explained(recipe.report.title or (recipe.model.arch or "Network").rpartition("/")[2], found, pictures)


def _subject(recipe: Recipe, data: Data) -> tuple[Subject, ...]:
    network = open_network(recipe, data)
    return (Subject("network", network, find_nodes(network, data, recipe.intervene, recipe.group, recipe.seed)),)


def _subjects(folder: Path, finished: Finished) -> tuple[Subject, ...]:
    recipe, data = finished.recipe, finished.data
    smaller = trace(finished.student.graph, data.example_input)
    nodes = find_nodes(smaller, data, recipe.intervene, recipe.group, recipe.seed)
    known = read_result(folder, "group", Groups).chosen.nodes
    return Subject("teacher", finished.network, known), Subject("student", smaller, nodes)


def _pictures(explanation: Explanation, data: Data, recipe: Recipe, question: Question) -> Pictures | None:
    if explanation.local is None or data.kind != "image" or question.x is None:
        return None
    return pictures_of(explanation.local, question.x, data, recipe.explain, seed=recipe.seed)


def read_input(file: Path, data: Data) -> Tensor:
    """One input from a file, prepared as the data source's own inputs are.

    Args:
        file: An image of any size (short side resized, centre cropped), or an .npy array: an image H x W x C with the
            channels that are stored in the data source, or a table's row in encoded form.
        data: Says how inputs are prepared.

    Raises:
        DataError: a file that can't be read as an input, or whose numbers are not those of the data source.
    """
    rows = data.validation.rows
    try:
        with file.open("rb") as opened:
            values = _read_array(opened) if file.suffix == ".npy" else None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{file} can't be read as an input",
            found=str(error),
            wanted="an image, or an .npy array",
            remedy="check the path and the file",
        ) from error
    if not isinstance(rows, ImageRows):
        return _as_row(values, file)
    stored = _open_image(file, rows.store.shape)[None] if values is None else _as_stored(values, rows, file.name)
    return rows.preparation.prepared(stored, None)


def _read_array(file: BinaryIO) -> NDArray[Any]:
    values = np.load(file, allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise ValueError("an .npz archive")
    return values


def _as_row(values: NDArray[Any] | None, file: Path) -> Tensor:
    if values is None:
        raise UsageError(
            "a table's input can't be read from this file",
            found=str(file),
            wanted=".npy with the encoded row",
            remedy="explain a row of the data with --index instead",
        )
    if values.dtype.kind not in "uifb" or not np.isfinite(values).all():
        raise DataError(
            f"{file} can't be read as an input",
            found=f"dtype {values.dtype}" if values.dtype.kind not in "uifb" else "NaN or infinity",
            wanted="finite numbers: the encoded row",
            remedy="encode the row as the data source's own, or explain a row of the data with --index instead",
        )
    return torch.from_numpy(values.astype(np.float32)).reshape(1, -1)


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
    channels = rows.store.shape[2]
    if stored.shape[3] != channels:
        raise DataError(
            f"{name} has other channels than the images of the data source",
            found=f"{stored.shape[3]} channel(s)",
            wanted=f"{channels} channel(s), as they are stored there",
            remedy="save it channels last, grey or in colour as the source's images are; data.channels comes later",
        )
    if isinstance(rows.store, ImageArray) and rows.store.values.dtype.kind == "f":
        return values[None].reshape(stored.shape).astype(np.float32)  # a source of floats is taken as it stands
    return stored


def _open_image(file: Path, shape: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    from PIL import Image, ImageOps

    height, width, channels = shape
    with opened_image(lambda: Image.open(file), str(file)) as opened:
        image = ImageOps.fit(
            opened.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BILINEAR
        )
    return np.array(image, dtype=np.uint8).reshape(height, width, channels)


def write_explanations(explained: Explained, path: Path) -> None:
    """Write a self-contained page (.html) or JSON (.json); the folder is made where it is missing.

    Raises:
        RunFolderError: nothing can be written there.
    """
    make_room(path)
    if path.suffix == ".html":
        atomic_write_text(path, explanation_page(explained.title, explained.explanations, explained.pictures))
        return
    import json

    from pydantic_core import to_jsonable_python

    plain = strict(to_jsonable_python(explained.explanations))
    content = {"schema": 1, "title": explained.title, "explanations": plain}
    atomic_write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
