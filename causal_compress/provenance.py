"""Where numbers come from: package versions, the machine, and the memory that a piece of work took."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "causal-compress",
    "torch",
    "torchvision",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "networkx",
    "pydantic",
    "accelerate",
    "safetensors",
    "timm",
    "pyarrow",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
)
_SAMPLE_SECONDS = 0.05


def package_version() -> str:
    """The version of causal-compress, or "0+source" where it runs from a source tree that was never installed."""
    try:
        return importlib.metadata.version("causal-compress")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a number; nothing is imported for it."""
    found = {"python": platform.python_version(), "causal-compress": package_version()}
    for name in PACKAGES[1:]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """The machine, as plain data for run.json and benchmark files.

    Returns:
        platform, python, cpu (model name), cores (those that this process may use), memory_bytes, and gpus: their
        names, or an empty list as long as torch is not loaded.
    """
    import psutil

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": _gpus(),
    }


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place() -> dict[str, Any]:
    """The machine as far as latencies depend on it; what was timed on another one is timed again."""
    here = machine()
    return {"cpu": here["cpu"], "gpus": here["gpus"]}


@dataclass
class Peak:
    """Peak resident memory of this process [bytes]; final when the `with` of `peak_memory` has ended."""

    size_bytes: int = 0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures the largest resident set of this process while the block runs.

    A daemon thread samples the resident set every 50 ms; where the kernel's own high-water mark (ru_maxrss) rose
    during the block, that exact value is taken instead.

    Limits: memory of child processes and of GPUs is not counted; without a rise of the high-water mark, peaks shorter
    than 50 ms can be missed.
    """
    import psutil

    process, peak, done = psutil.Process(), Peak(), threading.Event()

    def sample() -> None:
        peak.size_bytes = max(peak.size_bytes, int(process.memory_info().rss))

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            sample()

    before = _high_water_bytes()
    sample()
    watcher = threading.Thread(target=watch, name="peak-memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        sample()
        after = _high_water_bytes()
        if after > before:
            peak.size_bytes = max(peak.size_bytes, after)


def _high_water_bytes() -> int:
    """Largest resident set since the process began; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
