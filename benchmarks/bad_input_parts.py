"""What bad inputs are made of: a place to make them in, ways to change one thing, and disks that refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from causal_compress.demo import digits_net

RECIPE = """\
model:
  arch: causal_compress.demo:digits_net
  args: {width: 8, blocks: 1}
  weights: teacher.pt
data:
  source: sklearn:digits
  normalize: {mean: [0.305], std: [0.376]}
  calibration: 256
  validation: 100
  test_share: 0.2
budget: {macs: 0.7}
intervene: {inputs: 64, batch_size: 32, masks: 1}
group: {bootstraps: 4}
plan: {inputs: 128, heldout: 64, widths: [0.75, 0.5]}
rewrite: {inputs: 64}
prune: {inputs: 64}
distill: null
export: {inputs: 64}
benchmark: null
threads: 1
"""


@dataclass(frozen=True)
class Place:
    """Where a case is made.

    Attributes:
        folder: Holds teacher.pt and recipe.yaml; the current folder of the command.
        undo: Closed after the command; what it has to undo, it leaves there.
        finished: A finished run of recipe.yaml; to be copied, not to be changed.
        may_mount: Whether small file systems may be mounted.
    """

    folder: Path
    undo: ExitStack
    finished: Path
    may_mount: bool

    def write(self, name: str, content: str | bytes) -> str:
        """A file in the folder."""
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def teacher(self) -> bytes:
        """The sound checkpoint's bytes."""
        return (self.folder / "teacher.pt").read_bytes()

    def save(self, name: str, value: Any) -> str:
        """A file written by torch.save."""
        torch.save(value, self.folder / name)
        return name

    def npz(self, **arrays: Any) -> str:
        """The source of an npz file; images and labels are sound where they are not given."""
        sound = {"x": np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), dtype=np.uint8), "y": np.arange(60) % 10}
        np.savez(
            self.folder / "data.npz", **{key: value for key, value in (sound | arrays).items() if value is not None}
        )
        return "npz:data.npz"

    def run(self) -> Path:
        """A copy of the finished run."""
        return Path(shutil.copytree(self.finished, self.folder / "run"))


Make = Callable[[Place], list[str]]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        title: What is wrong with it.
        make: Makes it and returns the command's arguments.
        says: Words that the message must hold.
        code: The exit code that it must end with.
        child: Whether the command is run as a process of its own.
        absent: Packages that the command must not find.
    """

    title: str
    make: Make
    says: tuple[str, ...]
    code: int = 1
    child: bool = False
    absent: tuple[str, ...] = ()


def start(folder: Path) -> None:
    """Fill a case's folder with what is sound."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    model, digits = digits_net(width=8, blocks=1).train(), load_digits()
    x = (torch.tensor(digits.images[:, None] / 16, dtype=torch.float32) - 0.305) / 0.376
    y, optimizer = torch.tensor(digits.target), torch.optim.Adam(model.parameters(), 1e-2)
    for part in torch.randperm(len(x)).repeat(2).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "teacher.pt")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def compress(*more: str, recipe: str = "recipe.yaml", out: str = "run") -> list[str]:
    """The command, with what a case adds to it."""
    return ["compress", "--recipe", recipe, "--out", out, *more]


def with_set(*settings: str) -> Make:
    """Only settings differ."""
    return lambda _: compress(*(word for setting in settings for word in ("--set", setting)))


def with_weights(name: str, content: Callable[[Place], bytes]) -> Make:
    """Another checkpoint file, given by its bytes."""
    return lambda place: compress("--weights", place.write(name, content(place)))


def with_saved(value: Callable[[], Any], *more: str) -> Make:
    """Another checkpoint, written by torch.save."""
    return lambda place: compress("--weights", place.save("bad.pt", value()), *more)


def with_code(text: str, *more: str) -> Make:
    """An architecture in a file."""
    unset = ("--set", "model.weights=null", "--set", "model.args={}")
    return lambda place: compress("--arch", place.write("net.py", text) + ":build", *unset, *more)


def with_npz(**arrays: Any) -> Make:
    """Other arrays; None leaves one out."""
    return lambda place: compress("--data", place.npz(**arrays))


def with_table(content: str, *settings: str) -> Make:
    """A table with the column `label`; the network does not matter, the data is read first."""
    words = [word for setting in settings for word in ("--set", setting)]
    return lambda place: compress("--data", f"csv:{place.write('table.csv', content)}", *words)


def with_recipe(change: Callable[[str], str | bytes]) -> Make:
    """The recipe's text, changed."""
    return lambda place: compress(recipe=place.write("bad.yaml", change(RECIPE)))


class Exploit:
    """Pickled, it makes a file when it is loaded by a reader that trusts it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a trusting reader calls."""
        return (os.system, ("touch PICKLE-WAS-RUN",))


def flipped(content: bytes) -> bytes:
    """One byte in the middle is wrong."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def state(**changed: int) -> dict[str, Any]:
    """Weights of the small network, or of one with other arguments."""
    return digits_net(**({"width": 8, "blocks": 1} | changed)).state_dict()


def state_with(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Weights of which one tensor is changed."""
    changed = state()
    changed[key] = value(changed[key])
    return changed


def whole_module() -> nn.Module:
    """The network itself; saved, it is pickled with its code."""
    return digits_net(width=8, blocks=1)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@contextmanager
def failing_writes(number: int, after: int) -> Iterator[None]:
    """The system refuses to bring files to the disk, after so many that it took."""
    taken, sync = [0], os.fsync

    def refuse(descriptor: int) -> None:
        taken[0] += 1
        if taken[0] > after:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    with mock.patch("os.fsync", refuse):
        yield


def disk(number: int, options: str, *, after: int = 0) -> Make:
    """A run folder on a disk that refuses: one that is mounted so, or by an error number of the system."""

    def make(place: Place) -> list[str]:
        if place.may_mount:
            place.undo.enter_context(mounted(place.folder / "disk", options))
        else:
            (place.folder / "disk").mkdir()
            place.undo.enter_context(failing_writes(number, after))
        return compress(out="disk/run")

    return make
