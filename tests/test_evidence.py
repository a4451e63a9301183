"""What targets are measured on: labels of given data in the order of the targets' classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from report_sample import sample

from causal_compress.deploy.evidence import given_evidence
from causal_compress.deploy.targets import Entry, ModelFile
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import recipe_yaml
from causal_compress.results import Exported


def entry_of(folder: Path, classes: tuple[str, ...] | None, recipe: Recipe) -> Entry:
    """A student of a run whose outputs stand for these classes."""
    folder.mkdir()
    exported = dataclasses.replace(sample().exported, classes=classes)
    (folder / "export.json").write_bytes(TypeAdapter(Exported).dump_json(exported))
    (folder / "recipe.resolved.yaml").write_text(recipe_yaml(recipe))
    return Entry(ModelFile(f"{folder.name} student", "onnx", "fp32", folder / "model.onnx"), "onnxruntime")


def given(tmp_path: Path, names: list[str]) -> Recipe:
    """Forty images of two classes."""
    file = tmp_path / "new.npz"
    labels = np.arange(40) % 2
    np.savez(file, x=np.zeros((40, 4, 4), np.uint8), y=labels, classes=np.array(names))
    return Recipe.model_validate({"data": {"source": f"npz:{file}"}})


def test_classes_that_new_data_lack_keep_their_place(tmp_path: Path) -> None:
    recipe = given(tmp_path, ["bee", "cat"])
    entry = entry_of(tmp_path / "run", ("ant", "bee", "cat"), recipe)
    evidence = given_evidence([entry], 4, recipe)
    assert evidence.own == {}
    assert evidence.batches is not None
    assert {int(label) for _, labels in evidence.batches() for label in labels} == {1, 2}


def test_classes_of_another_network_are_no_measure(tmp_path: Path) -> None:
    recipe = given(tmp_path, ["bee", "dog"])
    known = entry_of(tmp_path / "known", ("bee", "dog"), recipe)
    stranger = entry_of(tmp_path / "stranger", tuple(f"c{index}" for index in range(99)), recipe)
    evidence = given_evidence([known, stranger], 4, recipe)
    assert evidence.of(known).batches is not None
    assert evidence.of(stranger).batches is None
    told = "classes ('bee', 'dog') here, ('c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6', 'c7', 'c8', 'c9', ... 99 in all)"
    assert told in evidence.notes[-1]


def test_a_run_from_before_classes_were_recorded_is_measured(tmp_path: Path) -> None:
    recipe = given(tmp_path, ["bee", "cat"])
    evidence = given_evidence([entry_of(tmp_path / "old", None, recipe)], 4, recipe)
    assert evidence.batches is not None
    assert {int(label) for _, labels in evidence.batches() for label in labels} == {0, 1}
