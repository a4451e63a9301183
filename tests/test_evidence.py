"""What targets are measured on: labels of given data in the order of the targets' classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from report_sample import sample

from causal_compress.deploy.evidence import Evidence, given_evidence
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


def given(tmp_path: Path, names: list[str] | None, classes: int = 2) -> Recipe:
    """Images of some classes."""
    file = tmp_path / "new.npz"
    named = {} if names is None else {"classes": np.array(names)}
    np.savez(file, x=np.zeros((60, 4, 4), np.uint8), y=np.arange(60) % classes, **named)
    return Recipe.model_validate({"data": {"source": f"npz:{file}"}})


def labels_of(evidence: Evidence, entry: Entry) -> set[int]:
    """The labels that an entry is measured with; none where it is not."""
    batches = evidence.of(entry).batches
    return set() if batches is None else {int(label) for _, labels in batches() for label in labels}


def test_classes_that_new_data_lack_keep_their_place(tmp_path: Path) -> None:
    recipe = given(tmp_path, ["bee", "cat"])
    entries = [entry_of(tmp_path / name, ("ant", "bee", "cat"), recipe) for name in ("one", "two")]
    evidence = given_evidence(entries, 4, recipe)
    assert [labels_of(evidence, entry) for entry in entries] == [{1, 2}, {1, 2}]
    assert evidence.own == {}  # so that drops are told


def test_each_target_has_its_own_order(tmp_path: Path) -> None:
    recipe = given(tmp_path, ["bee", "cat"])
    orders = {"first": ("ant", "bee", "cat"), "second": ("bee", "dog", "cat"), "old": None}
    entries = [entry_of(tmp_path / name, classes, recipe) for name, classes in orders.items()]
    evidence = given_evidence(entries, 4, recipe)
    assert [labels_of(evidence, entry) for entry in entries] == [{1, 2}, {0, 2}, {0, 1}]
    assert ["another order" in note for note in evidence.notes] == [False, True, True]


def test_classes_of_another_network_are_no_measure(tmp_path: Path) -> None:
    recipe = given(tmp_path, ["bee", "dog"])
    known = entry_of(tmp_path / "known", ("bee", "dog"), recipe)
    stranger = entry_of(tmp_path / "stranger", tuple(f"c{index}" for index in range(99)), recipe)
    evidence = given_evidence([known, stranger], 4, recipe)
    assert [labels_of(evidence, entry) for entry in (known, stranger)] == [{0, 1}, set()]
    told = "classes ('bee', 'dog') here, ('c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6', 'c7', 'c8', 'c9', ... 99 in all)"
    assert told in evidence.notes[-1]
    alone = given_evidence([stranger], 4, recipe)
    assert not any("the test split of the given data" in note for note in alone.notes)  # nothing is measured


def test_names_that_two_classes_share_are_not_looked_up(tmp_path: Path) -> None:
    """ImageNet has two cranes."""
    recipe = given(tmp_path, ["crane", "tench", "crane"], classes=3)
    entry = entry_of(tmp_path / "run", ("crane", "tench", "crane"), recipe)
    assert labels_of(given_evidence([entry], 4, recipe), entry) == {0, 1, 2}
    other = entry_of(tmp_path / "other", ("crane", "tench", "crane", "ant"), recipe)
    assert labels_of(given_evidence([other], 4, recipe), other) == set()


@pytest.mark.parametrize(
    ("names", "known", "wanted"),
    [
        (None, ("cat", "dog"), {0, 1}),
        (None, ("ant", "cat", "dog"), {0, 1}),
        (None, ("0", "1", "2"), {0, 1}),
        (["cat", "dog"], ("0", "1"), {0, 1}),
        (["cat", "dog"], ("0", "1", "2"), set()),
        (["cat", "dog"], None, {0, 1}),
    ],
)
def test_labels_without_names_are_taken_as_they_are(
    names: list[str] | None, known: tuple[str, ...] | None, wanted: set[int], tmp_path: Path
) -> None:
    recipe = given(tmp_path, names)
    entry = entry_of(tmp_path / "run", known, recipe)
    assert labels_of(given_evidence([entry], 4, recipe), entry) == wanted
