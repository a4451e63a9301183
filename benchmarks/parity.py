"""Do the runtimes answer as PyTorch: agreement and largest difference of logits on real inputs.

`python benchmarks/parity.py --run RUN [--inputs 10000]` -> benchmarks/results/parity.json

Teacher and student of a finished run, its test split (or as many inputs of it as asked), batches of 1 (fewer inputs),
7 and 256.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from causal_compress.deploy.absent import absence
from causal_compress.deploy.runtimes import Runtime, RuntimeName, TorchRuntime, open_runtime
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Split, load_data
from causal_compress.provenance import machine, versions
from causal_compress.recipe_file import load_recipe

RESULTS = Path(__file__).parent / "results"
RUNTIMES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino", "torch-compiled")
STEMS = {"student": "model", "teacher": "teacher"}


@dataclass
class Tally:
    """What one runtime answered so far."""

    seen: int = 0
    agreed: int = 0
    largest: float = 0.0

    def add(self, got: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
        """Count one batch."""
        self.seen += len(got)
        self.agreed += int((got.argmax(1) == wanted.argmax(1)).sum())
        self.largest = max(self.largest, float(np.abs(got - wanted).max()))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--single", type=int, default=2000, help="inputs at batch 1, which takes the longest")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "parity.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = load_recipe(given.run / "recipe.resolved.yaml")
    split = load_data(recipe.data, seed=recipe.seed).test
    rows: list[dict[str, Any]] = []
    for role, stem in STEMS.items():
        for row in compare(given, stem, split):
            rows.append({"model": role, **row})
            print(rows[-1], flush=True)
            write(given, rows)


def write(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far; a batch size takes minutes."""
    content = {
        "schema": 1,
        "machine": {**machine(), "versions": versions()},
        "command": f"python benchmarks/parity.py --run {given.run.name} --inputs {given.inputs}",
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(given.out, json.dumps(content, indent=2) + "\n")


def compare(given: argparse.Namespace, stem: str, split: Split) -> Iterator[dict[str, Any]]:
    """Rows of one model: each runtime at each batch size."""
    eager = TorchRuntime.load(given.run / f"{stem}.pt2")
    here: dict[RuntimeName, Runtime] = {}
    for name in RUNTIMES:
        if (error := absence(name)) is not None:
            yield {"runtime": name, "not_measured": f"{error.what} ({error.remedy})"}
            continue
        kind = "pt2" if name == "torch-compiled" else "onnx"
        here[name] = open_runtime(name, given.run / f"{stem}.{kind}", threads=given.threads)
    for batch in given.batch or (256, 7, 1):
        tallies = {name: Tally() for name in here}
        limit = min(given.inputs, given.single) if batch == 1 else given.inputs
        for x, _ in split.batches(batch, limit=limit):
            array = x.numpy()
            wanted = eager.run(array)
            for name, runtime in here.items():
                tallies[name].add(runtime.run(array), wanted)
        for name, tally in tallies.items():
            yield {
                "runtime": name,
                "batch": batch,
                "n": tally.seen,
                "agreement_pct": 100.0 * tally.agreed / tally.seen,
                "max_abs_diff": tally.largest,
            }


if __name__ == "__main__":
    main()
