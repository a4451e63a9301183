"""Energy of a call, from the counters that the machine offers: RAPL for processors, NVML for NVIDIA GPUs."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
NO_ENERGY = (
    "energy was not measured: no counter can be read here (processors: energy_uj below /sys/class/powercap, mostly "
    "readable by root alone and seldom present in virtual machines; GPUs: pip install nvidia-ml-py)"
)
_SECONDS = 0.5
_BLOCK = 8


@dataclass(frozen=True)
class Counter:
    """A counter of joules that begins anew after `range_j`; None: it does not."""

    read: Callable[[], float]
    range_j: float | None = None

    def since(self, before: float) -> float:
        """Joules since an earlier reading, at most one round ago."""
        rise = self.read() - before
        return rise + self.range_j if rise < 0 and self.range_j is not None else rise


def counters(*, gpu: bool, powercap: Path = POWERCAP) -> tuple[Counter, ...]:
    """The counters of all processor packages, or of the first GPU, that can be read.

    Args:
        gpu: Whether the work runs on a GPU.
        powercap: Where Linux lists its RAPL zones (those of AMD have the same names).
    """
    if gpu:
        found = _nvml()
        return () if found is None else (found,)
    zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
    return tuple(counter for counter in map(_rapl, zones) if counter is not None)


def _rapl(zone: Path) -> Counter | None:
    try:
        read = partial(_microjoules, zone / "energy_uj")
        read()
        return Counter(read, _microjoules(zone / "max_energy_range_uj"))
    except (OSError, ValueError):
        return None


def _microjoules(path: Path) -> float:
    return int(path.read_text(encoding="ascii")) / 1e6


def _nvml() -> Counter | None:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        device = nvml.nvmlDeviceGetHandleByIndex(0)
        read = partial(_millijoules, nvml.nvmlDeviceGetTotalEnergyConsumption, device)
        read()
    except Exception:  # pynvml has a class of error for each reason; all mean that there is no counter
        return None
    return Counter(read)


def _millijoules(total: Callable[[object], int], device: object) -> float:
    return total(device) / 1e3


def energy_per_call(call: Callable[[], object], found: tuple[Counter, ...], seconds: float = _SECONDS) -> float | None:
    """Joules per call, of the whole package or GPU: idle power and the neighbours' work are in it.

    Args:
        call: What is measured; repeated for the given time.
        found: The counters; none: nothing is measured.
        seconds: How long; RAPL counts about once in a millisecond.

    Returns:
        The mean, or None where no counter moved.
    """
    if not found:
        return None
    call()
    before = [counter.read() for counter in found]
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(_BLOCK):
            call()
        calls += _BLOCK
    spent = sum(counter.since(start) for counter, start in zip(found, before, strict=True))
    return spent / calls if spent > 0 else None
