"""Memory that training frees (recover/allocator.py): kept inside, given back afterwards, and nothing lost elsewhere."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distill_sample import network, run, section
from torch import nn

from causal_compress.recover import allocator, distill
from causal_compress.recover.training import train_epoch

GLIBC = pytest.mark.skipif(allocator._glibc() is None, reason="the C library is not glibc")

# Each round frees all that it took, 64 MiB, as a training step does with its activations.
ROUNDS = """
import json, resource
import psutil
import torch
from causal_compress.recover.allocator import freed_memory_kept

def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        kept = [torch.ones(2**20) for _ in range(16)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

with freed_memory_kept():
    rounds(2)
    faults, inside = rounds(20), resident()
print(json.dumps({"faults": faults, "inside": inside, "after": resident()}))
"""


@GLIBC
def test_freed_memory_is_used_again_inside_and_given_back_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True)
    kept = json.loads(done.stdout)
    assert kept["faults"] < 16_384  # the pages of one round; twenty rounds took 286,080 without it
    assert kept["inside"] - kept["after"] > 48 * 2**20


@GLIBC
def test_it_is_given_back_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> int:
            called.append((parameter, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            called.append((0, pad))
            return 1

    monkeypatch.setattr(allocator, "_glibc", Library)

    def stop() -> None:
        with allocator.freed_memory_kept():
            assert [parameter for parameter, _ in called] == [-1, -3]
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert called[2:] == [(-1, 2**26), (-3, 2**25), (0, 0)]


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def absent(name: object) -> None:
        raise error("no such library")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with allocator.freed_memory_kept():
        assert nn.Linear(3, 2)(torch.ones(1, 3)).shape == (1, 2)


def test_a_library_without_its_functions_is_not_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator._glibc() is None


def test_a_student_is_trained_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def told() -> Iterator[None]:
        events.append("kept")
        yield
        events.append("given back")

    def epoch(*arguments: Any) -> Any:
        events.append("epoch")
        return train_epoch(*arguments)

    monkeypatch.setattr(distill, "freed_memory_kept", told)
    monkeypatch.setattr(distill, "train_epoch", epoch)
    run(network(6, 1), network(12, 0), section(epochs=2))
    assert events == ["kept", "epoch", "epoch", "given back"]
