"""What targets are measured on: inputs that are prepared as each of them wants, and labels or expected answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from causal_compress.deploy.bundle import read_inputs
from causal_compress.deploy.targets import Entry, input_shape, is_package, name_of, read_package
from causal_compress.errors import CausalCompressError, UsageError
from causal_compress.inputs.data import Data, Split, load_data
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Exported, Package

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

_RECIPE, _EXPORT = "recipe.resolved.yaml", "export.json"
_PREPARING = ("normalize", "image_size", "channels", "target_groups", "categorical")
_COMPARED = 256
_MOST_TOLD = 10


@dataclass(frozen=True)
class Evidence:
    """Inputs for timing, and where there are labels or expected answers, what accuracy is measured on.

    Args:
        first: Inputs, N x ..., repeated to make up a batch.
        batches: Goes through all labelled inputs once; None: accuracy is not measured.
        expected: Folder and role -> class that it answered in PyTorch, for the same inputs in the same order.
        own: Model file -> what it is measured on instead, because these inputs are not prepared as it wants.
        notes: Why, for people.
    """

    first: Array
    batches: Callable[[], Iterator[tuple[Array, Labels]]] | None = None
    expected: dict[tuple[Path, str], Labels] = field(default_factory=dict)
    own: dict[Path, Evidence] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, entry: Entry) -> Evidence:
        """What an entry is measured on."""
        return self.own.get(entry.file.path, self)


@dataclass(frozen=True)
class _Brought:
    """What a package or a run brings; one of the two is None."""

    evidence: Evidence
    package: Package | None
    data: Data | None


def random_evidence(entries: Sequence[Entry], batch: int) -> Evidence:
    """Numbers of the shape that each file wants: without data only latency is measured, which hardly hangs on them.

    Args:
        entries: What is measured.
        batch: How many inputs.

    Raises:
        UsageError: the first file does not tell the shape of its inputs.
    """
    usual = input_shape(entries[0].file)
    common = _numbers(usual, batch)
    own: dict[Path, Evidence] = {}
    for entry in entries:
        try:
            shape = input_shape(entry.file)
        except UsageError:  # the file does not tell; it may take what the first one takes
            continue
        if shape != usual:
            own[entry.file.path] = _numbers(shape, batch)
    return replace(common, own=own)


def given_evidence(entries: Sequence[Entry], batch: int, recipe: Recipe) -> Evidence:
    """The same given inputs for all; no accuracy for runs and packages that want them prepared otherwise.

    Args:
        entries: What is measured.
        batch: How many inputs for timing.
        recipe: Names the data, and how they are prepared. Data that lack some of a target's classes get the labels that
            these have there; where one of both has numbers for names, labels are taken as they are.
    """
    data = load_data(recipe.data, seed=recipe.seed)
    folders = _by_folder(entries)
    known = {folder: _classes_of(folder) for folder in folders}
    orders = {folder: _order(data.classes, classes) for folder, classes in known.items()}
    usual = next((order for order in orders.values() if order is not None), _order(data.classes, None))
    given = _of_split(data.test, batch, np.array(usual))
    own: dict[Path, Evidence] = {}
    notes = []
    for folder, theirs in folders.items():
        order, classes = orders[folder], known[folder]
        brought = data if order is None or classes is None else replace(data, classes=classes)
        if found := _otherwise(folder, recipe, brought):
            own |= {entry.file.path: Evidence(given.first) for entry in theirs}
            notes.append(
                f"{_names(theirs)}: no accuracy, because the given data are others or prepared otherwise: {found}"
            )
        elif order != usual:
            own |= {entry.file.path: _of_split(data.test, batch, np.array(order)) for entry in theirs}
            notes.append(
                f"{_names(theirs)}: classes come in another order than in the first target; so no drop is told"
            )
    if data.test.rows is data.train.rows and any(own.get(entry.file.path, given).batches for entry in entries):
        notes.insert(0, f"accuracy: on {len(data.test):,} inputs, the test split of the given data")
    return replace(given, own=own, notes=tuple(notes))


def brought_evidence(first: Path, entries: Sequence[Entry], batch: int, data_of: Callable[[Path], Data]) -> Evidence:
    """What a package or run brings, for all that want such inputs; the others are measured on their own.

    Args:
        first: The package or run.
        entries: What is measured.
        batch: How many inputs for timing.
        data_of: The data of a run, checked to be those that it was made with.

    Returns:
        The evidence; a note for each package and run that is not measured on the first one's inputs.
    """
    shared = _brought(first, batch, data_of)
    own: dict[Path, Evidence] = {}
    expected = dict(shared.evidence.expected)
    notes = [] if shared.package is None else ["accuracy: on the package's own inputs, from the validation split"]
    for folder, theirs in _by_folder(entries).items():
        try:
            found = shared if folder == first else _brought(folder, batch, data_of)
        except CausalCompressError as error:
            own |= {entry.file.path: Evidence(shared.evidence.first) for entry in theirs}
            notes.append(f"{_names(theirs)}: no accuracy: {error.what}: {error.found}")
            continue
        if not _are_alike(shared, found):
            own |= {entry.file.path: found.evidence for entry in theirs}
            notes.append(
                f"{_names(theirs)}: accuracy is on the inputs of {name_of(folder)}, which are others than those of "
                f"{name_of(first)} or prepared otherwise; so no drop is told"
            )
        elif np.array_equal(shared.evidence.first, found.evidence.first):
            expected |= found.evidence.expected
    return replace(shared.evidence, expected=expected, own=own, notes=tuple(notes))


def _numbers(shape: tuple[int, ...], batch: int) -> Evidence:
    return Evidence(np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32))


def _by_folder(entries: Sequence[Entry]) -> dict[Path, list[Entry]]:
    """Entries by the package or run that they lie in; files that lie in none are left out."""
    found: dict[Path, list[Entry]] = {}
    for entry in entries:
        folder = entry.file.path.parent
        if (folder / _RECIPE).is_file() or is_package(folder):
            found.setdefault(folder, []).append(entry)
    return found


def _names(entries: Sequence[Entry]) -> str:
    return ", ".join(dict.fromkeys(entry.file.target for entry in entries))


def _brought(folder: Path, batch: int, data_of: Callable[[Path], Data]) -> _Brought:
    if not is_package(folder):
        data = data_of(folder)
        return _Brought(_of_split(data.test, batch), None, data)
    package = read_package(folder)
    stored = read_inputs(folder, package)
    x, y = stored["inputs"], stored["labels"]
    expected = {(folder, role): stored[f"logits_{role}"].argmax(1) for role in ("teacher", "student")}

    def batches() -> Iterator[tuple[Array, Labels]]:
        return ((x[start : start + 64], y[start : start + 64]) for start in range(0, len(x), 64))

    return _Brought(Evidence(x, batches, expected), package, None)


def _of_split(split: Split, batch: int, labels: Labels | None = None) -> Evidence:
    """A split's inputs and labels; `labels` are what stands for each of its own instead."""
    first = next(split.batches(batch))[0].numpy()
    size = min(256, max(1, 2**20 // first[0].size))

    def batches() -> Iterator[tuple[Array, Labels]]:
        return ((x.numpy(), y.numpy() if labels is None else labels[y.numpy()]) for x, y in split.batches(size))

    return Evidence(first, batches)


def _are_alike(one: _Brought, other: _Brought) -> bool:
    """Whether what is right for one to be measured on is right for the other."""
    if one.data is not None and other.data is not None:
        return one.data.fingerprint == other.data.fingerprint or _same_rows(one.data.test, other.data.test)
    if one.package is not None and other.package is not None:
        same = np.array_equal(one.evidence.first, other.evidence.first)
        return same or (one.package.kind == "image" and _described(one.package) == _described(other.package))
    packaged, run = (one, other) if one.package is not None else (other, one)
    assert run.data is not None
    return _same_inputs(run.data.validation, packaged.evidence.first)  # a package's inputs are its run's first ones


def _described(package: Package) -> tuple[Any, ...]:
    return (package.input_shape, package.mean, package.std, package.preparation, package.classes)


def _same_rows(one: Split, other: Split) -> bool:
    """Whether two splits are the same rows, prepared alike: all labels are compared, and the first inputs."""
    if not torch.equal(one.labels, other.labels):
        return False
    return _same_inputs(other, one.take(range(min(_COMPARED, len(one))))[0].numpy())


def _same_inputs(split: Split, x: Array) -> bool:
    if len(split) < len(x):
        return False
    found = split.take(range(len(x)))[0].numpy()
    return found.shape == x.shape and bool(np.allclose(found, x, rtol=1e-4, atol=1e-5))


def _order(classes: tuple[str, ...], known: tuple[str, ...] | None) -> tuple[int, ...] | None:
    """Position of each class among those of a target; None where they can't be brought together.

    Args:
        classes: Of the given data.
        known: Of the target; None: it doesn't say.
    """
    own = tuple(range(len(classes)))
    if known is None or classes == known:
        return own
    if _are_numbers(classes) and len(classes) <= len(known):
        return own
    if _are_numbers(known):
        return own if len(classes) == len(known) else None
    unique = len(set(known)) == len(known) and len(set(classes)) == len(classes)
    return tuple(map(known.index, classes)) if unique and set(classes) <= set(known) else None


def _are_numbers(classes: tuple[str, ...]) -> bool:
    """Whether these are only the labels themselves, of data without names."""
    return classes == tuple(map(str, range(len(classes))))


def _classes_of(folder: Path) -> tuple[str, ...] | None:
    if is_package(folder):
        return read_package(folder).classes
    exported = _exported(folder)
    return None if exported is None else exported.classes


def _exported(folder: Path) -> Exported | None:
    """What a run says of its outputs and inputs; None where it doesn't: an older run, or parts of one."""
    try:
        return TypeAdapter(Exported).validate_json((folder / _EXPORT).read_bytes())
    except (OSError, ValidationError):
        return None


def _otherwise(folder: Path, recipe: Recipe, data: Data) -> str:
    """In what a run or package wants its inputs prepared otherwise than a recipe says; empty if in nothing."""
    here: dict[str, Any]
    if is_package(folder):
        package, normalize = read_package(folder), recipe.data.normalize
        here = {"kind": data.kind, "input_shape": data.input_shape, "classes": data.classes}
        here |= {name: value and tuple(value) for name, value in (("mean", normalize.mean), ("std", normalize.std))}
        if data.kind == "table":
            here |= {"encoding": data.encoding_sha256}
        there = {name: package.encoding_sha256 if name == "encoding" else getattr(package, name) for name in here}
    else:
        section, exported = load_recipe(folder / _RECIPE).data, _exported(folder)
        here = {name: getattr(recipe.data, name) for name in _PREPARING}
        there = {name: getattr(section, name) for name in _PREPARING}
        if exported is not None and exported.classes is not None:
            here |= {"classes": data.classes, "encoding": data.encoding_sha256}
            there |= {"classes": exported.classes, "encoding": exported.encoding_sha256}
    different = [name for name in here if here[name] != there[name]]
    return "; ".join(_told(name, here[name], there[name], name_of(folder)) for name in different)


def _told(name: str, here: Any, there: Any, where: str) -> str:
    if name == "encoding" and there is None:
        return f"{where} doesn't say how its columns were encoded"
    if name == "encoding":
        return f"means, standard deviations and categories of the columns come from other rows than in {where}"
    return f"{name} {_shortened(here)} here, {_shortened(there)} in {where}"


def _shortened(value: Any) -> str:
    if not isinstance(value, tuple) or len(value) <= _MOST_TOLD:
        return str(value)
    return f"({', '.join(map(repr, value[:_MOST_TOLD]))}, ... {len(value):,} in all)"
