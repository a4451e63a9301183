"""INT8 against FP32, student against teacher, on every CPU runtime that is installed: one table for one finished run.

    python benchmarks/int8.py --run RUN_FOLDER
    python benchmarks/int8.py --run RUN_FOLDER --limit 500 --calls 20 --out tried.json

Quantizes the run's student anew (with the recipe's `quantize` section or the defaults, on calibration and validation
inputs only) in a folder of its own; the run folder is not changed. Accuracies are read on the whole test split; all
models are timed in turn within each round, one thread, so that what disturbs one disturbs all. Speed-ups are ratios of
medians (`ratio_of_medians`), not of 10th percentiles as in scorecards. Rows of another run in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from causal_compress.deploy.package import load
from causal_compress.deploy.quantize import quantize
from causal_compress.deploy.runtimes import Runtime, RuntimeName, TorchRuntime, open_runtime, torch_threads
from causal_compress.errors import MissingPackageError
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Data, load_data
from causal_compress.provenance import machine
from causal_compress.recipe import QuantizeSection
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Exported, Quantized
from causal_compress.runs import read_result
from causal_compress.understand.statistics import paired_drop, ratio_of_medians, wilson

HERE = Path(__file__).parent
RUNTIMES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
EAGER = ("torch", "teacher fp32")
WARM_UP = 5

Key = tuple[str, str]


@dataclass(frozen=True)
class Opened:
    """A model on a runtime."""

    runtime: Runtime
    size_bytes: int


def open_all(run: Path, work: Path, exported: Exported) -> dict[Key, Opened]:
    """Teacher and student FP32 and student INT8 on every runtime, and the teacher on PyTorch.

    Args:
        run: Finished run folder.
        work: Where the INT8 file lies.
        exported: What the run exported.

    Returns:
        (runtime, model) -> opened.
    """
    files = {
        "teacher fp32": run / exported.teacher_onnx,
        "student fp32": run / exported.onnx,
        "student int8": work / "model.int8.onnx",
    }
    pt2 = run / exported.teacher_pt2
    opened = {EAGER: Opened(TorchRuntime(load(pt2)), pt2.stat().st_size)}
    for name in RUNTIMES:
        try:
            for model, path in files.items():
                opened[name, model] = Opened(open_runtime(name, path, threads=1), path.stat().st_size)
        except MissingPackageError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return opened


def right_answers(opened: dict[Key, Opened], data: Data, limit: int | None) -> dict[Key, NDArray[np.bool_]]:
    """Which test inputs each model gets right.

    Args:
        opened: The models.
        data: Its test split.
        limit: At most so many inputs.

    Returns:
        (runtime, model) -> one boolean per input.
    """
    hits: dict[Key, list[NDArray[np.bool_]]] = {key: [] for key in opened}
    for x, y in data.test.batches(100, limit=limit):
        for key, one in opened.items():
            hits[key].append(one.runtime.run(x.numpy()).argmax(1) == y.numpy())
    return {key: np.concatenate(found) for key, found in hits.items()}


def latencies(opened: dict[Key, Opened], x: NDArray[np.float32], calls: int) -> dict[Key, NDArray[np.float64]]:
    """Milliseconds per call, every model once in each round, the first one changing from round to round.

    Args:
        opened: The models.
        x: The batch.
        calls: Rounds.

    Returns:
        (runtime, model) -> milliseconds per round.
    """
    keys = list(opened)
    taken: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in range(-WARM_UP, calls):
        for key in (*keys[turn % len(keys) :], *keys[: turn % len(keys)]):
            start = time.perf_counter_ns()
            opened[key].runtime.run(x)
            if turn >= 0:
                taken[key].append((time.perf_counter_ns() - start) / 1e6)
    return {key: np.asarray(values) for key, values in taken.items()}


def drop(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    """Accuracy lost from one model to another on the same inputs [pp], with its interval."""
    return paired_drop(int((before & ~after).sum()), int((after & ~before).sum()), len(before))


def rows_of(
    opened: dict[Key, Opened], hits: dict[Key, NDArray[np.bool_]], timed: dict[int, dict[Key, NDArray[np.float64]]]
) -> list[dict[str, Any]]:
    """One row per runtime and model."""
    rows = []
    for key, one in opened.items():
        runtime, model = key
        # The PyTorch row has neither a student nor another teacher beside it, and is compared with itself.
        teacher = (runtime, "teacher fp32")
        fp32 = (runtime, "student fp32") if (runtime, "student fp32") in opened else teacher
        of_teacher, of_fp32 = drop(hits[teacher], hits[key]), drop(hits[fp32], hits[key])
        row: dict[str, Any] = {
            "runtime": runtime,
            "model": model,
            "accuracy_pct": wilson(int(hits[key].sum()), len(hits[key])).pct,
            "n": len(hits[key]),
            "drop_pp": of_teacher[0],
            "drop_ci_pp": of_teacher[1],
            "drop_vs_fp32_pp": of_fp32[0] if model == "student int8" else None,
            "drop_vs_fp32_ci_pp": of_fp32[1] if model == "student int8" else None,
            "size_bytes": one.size_bytes,
            "size_ratio": round(one.size_bytes / opened[teacher].size_bytes, 4),
        }
        for batch, times in timed.items():
            row[f"latency_ms_p50_batch_{batch}"] = float(np.median(times[key]))
            for name, base in (("teacher", teacher), ("pytorch", EAGER), ("fp32", fp32)):
                ratio, interval = ratio_of_medians(times[base], times[key])
                row[f"speedup_vs_{name}_batch_{batch}"] = round(ratio, 3)
                row[f"speedup_vs_{name}_ci_batch_{batch}"] = [round(end, 3) for end in interval]
        rows.append(row)
    return rows


def described(name: str, quantized: Quantized) -> dict[str, Any]:
    """What every row of a run tells of how the INT8 file was made."""
    file = next(file for file in quantized.files if file.family == "cpu")
    return {
        "run": name,
        "method": file.method,
        "float_layers": len(file.excluded),
        "layers": file.layers,
        "bias_corrected": bool(file.bias_corrected),
        "size_ratio_vs_fp32": round(file.size_ratio, 4),
        "validation_drop_pp": file.drop_pp,
        "validation_n": file.n,
    }


def measure(run: Path, limit: int | None, calls: int, batches: list[int]) -> list[dict[str, Any]]:
    """All rows of one run.

    Args:
        run: Finished run folder.
        limit: At most so many test inputs.
        calls: Timed rounds at batch 1; a fifth of them at larger batches.
        batches: Batch sizes.
    """
    recipe = load_recipe(run / "recipe.resolved.yaml")
    exported = read_result(run, "export", Exported)
    data = load_data(recipe.data, seed=recipe.seed)
    section = (recipe.quantize or QuantizeSection()).model_copy(update={"families": ["cpu"]})
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        work = Path(folder)
        quantized = quantize(load(run / exported.pt2), run / exported.onnx, data, section, work)
        opened = open_all(run, work, exported)
        inputs = next(iter(data.test.batches(max(batches))))[0].numpy()
        with torch.no_grad():
            hits = right_answers(opened, data, limit)
            timed = {
                batch: latencies(opened, inputs[:batch], calls if batch == 1 else max(10, calls // 5))
                for batch in batches
            }
        rows = rows_of(opened, hits, timed)
    fastest = min(
        (row for row in rows if row["model"] != "teacher fp32"),
        key=lambda row: row[f"latency_ms_p50_batch_{batches[0]}"],
    )
    about = described(run.name, quantized)
    return [{**about, **row, "fastest": row is fastest} for row in rows]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="finished run folder")
    parser.add_argument("--limit", type=int, help="test inputs; all of them by default")
    parser.add_argument("--calls", type=int, default=200, help="timed rounds at batch 1")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8.json")
    arguments = parser.parse_args()
    rows = measure(arguments.run, arguments.limit, arguments.calls, arguments.batch)
    known = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if arguments.out.exists() else []
    kept = [row for row in known if row["run"] != arguments.run.name]
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    command = " ".join(["python benchmarks/int8.py", *shown])
    content = {"schema": 1, "machine": machine(), "command": command, "rows": [*kept, *rows]}
    atomic_write_text(arguments.out, json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
