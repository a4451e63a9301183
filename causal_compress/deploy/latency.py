"""How long networks take on a runtime: exported, run in turn, medians; for plans, not for the scorecard."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.progress import progress
from causal_compress.recipe import BenchmarkSection, LatencySection

_WARM_UP = 5
_FEWEST_ROUNDS, _MOST_ROUNDS = 30, 300
_SECONDS_EACH = 0.5
_OPSET = 18


def time_models(models: Sequence[tuple[nn.Module, Tensor]], section: LatencySection) -> list[float]:
    """Median latency of each network on the runtime [ms].

    Args:
        models: Networks in evaluation mode, each with two or more example inputs; left as they are.
        section: Which runtime, batch size and threads.

    Returns:
        Medians over rounds; in each round every network is called once, so that drift of the machine hits all alike.

    Raises:
        ExportError: a network can't be exported.
    """
    runs: list[tuple[OnnxRuntime, NDArray[np.float32]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (model, x) in enumerate(progress(models, label="exporting parts to be timed", total=len(models))):
            path = Path(folder) / f"{index}.onnx"
            export_onnx(model, x, path, opset=_OPSET)
            inputs = torch.rand(section.batch, *x.shape[1:]).numpy()
            runs.append((OnnxRuntime.load(path, threads=section.threads), inputs))
        return _medians(runs)


def _medians(runs: Sequence[tuple[OnnxRuntime, NDArray[np.float32]]]) -> list[float]:
    for runtime, x in runs:
        for _ in range(_WARM_UP):
            runtime.run(x)
    taken: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + _SECONDS_EACH * len(runs)
    for turn in range(_MOST_ROUNDS):
        for times, (runtime, x) in zip(taken, runs, strict=True):
            start = time.perf_counter_ns()
            runtime.run(x)
            times.append((time.perf_counter_ns() - start) / 1e6)
        if turn + 1 >= _FEWEST_ROUNDS and time.perf_counter() > end:
            break
    return [float(np.median(times)) for times in taken]


def covering(section: BenchmarkSection, limit: LatencySection | None) -> BenchmarkSection:
    """What is measured, and beside it the runtime, batch size and threads that a budget on latency names."""
    if limit is None:
        return section
    named = {"runtimes": limit.runtime, "batches": limit.batch, "threads": limit.threads}
    wider = {key: list(dict.fromkeys([*getattr(section, key), value])) for key, value in named.items()}
    return section.model_copy(update=wider)
