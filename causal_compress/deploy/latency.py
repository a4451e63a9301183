"""How long networks take on a runtime: exported and run in turn; for plans, not for the scorecard."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.deploy.timing import time_in_turn, undisturbed
from causal_compress.progress import progress
from causal_compress.recipe import BenchmarkSection, BudgetSection, LatencySection

_ROUNDS = 400
_SECONDS_EACH = 0.5
_OPSET = 18


def time_models(models: Sequence[tuple[nn.Module, Tensor]], section: LatencySection) -> list[float]:
    """Latency of each network on the runtime [ms], of calls that nothing interrupted, as the scorecard compares them.

    Args:
        models: Networks in evaluation mode, each with two or more example inputs; left as they are. One that is there
            several times is exported once and read as often.
        section: Which runtime, batch size and threads.

    Returns:
        10th percentiles over rounds of all networks in turn, so that drift of the machine hits all alike.

    Raises:
        ExportError: a network can't be exported.
    """
    runs: list[tuple[OnnxRuntime, NDArray[np.float32]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, x in progress(models, label="exporting parts to be timed", total=len(models)):
            path = Path(folder) / f"{id(model)}-{id(x)}.onnx"
            if not path.exists():
                export_onnx(model, x, path, opset=_OPSET)
            inputs = torch.rand(section.batch, *x.shape[1:]).numpy()
            runs.append((OnnxRuntime.load(path, threads=section.threads), inputs))
        calls = [partial(runtime.run, inputs) for runtime, inputs in runs]
        return [undisturbed(taken) for taken in time_in_turn(calls, repeats=_ROUNDS, seconds=_SECONDS_EACH)]


def covering(section: BenchmarkSection, budget: BudgetSection) -> BenchmarkSection:
    """What is measured, and beside it what the budget asks about: the runtime, batch size and threads that a limit on
    latency names, and an ONNX file where its size is limited.
    """
    limit = budget.latency_ms
    named: dict[str, str | int] = {} if budget.size_bytes is None else {"runtimes": "onnxruntime"}
    if limit is not None:
        named |= {"runtimes": limit.runtime, "batches": limit.batch, "threads": limit.threads}
    wider = {key: list(dict.fromkeys([*getattr(section, key), value])) for key, value in named.items()}
    return section.model_copy(update=wider)
