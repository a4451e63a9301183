"""Can the benchmark be trusted: a model against itself must read "no difference", and load must not flip a verdict.

`python benchmarks/selfcheck.py --run RUN [--times 20] [--loaded 1]` -> benchmarks/results/selfcheck.json

1. The teacher's ONNX file is loaded twice and timed against itself, `--times` times: how often "no difference".
2. The student is timed against the teacher `--times` times on the idle machine, and as often beside processes that
   keep `--loaded` cores busy: how often each verdict.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from causal_compress.deploy.runtimes import open_runtime
from causal_compress.deploy.targets import ModelFile, input_shape
from causal_compress.deploy.timing import Ratio, compare_latencies, time_in_turn
from causal_compress.provenance import machine, versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--loaded", type=int, default=1, help="cores kept busy")
    parser.add_argument("--runtime", action="append", choices=("onnxruntime", "openvino"))
    parser.add_argument("--out", type=Path, default=RESULTS / "selfcheck.json")
    given = parser.parse_args()
    rows = [row for runtime in given.runtime or ["onnxruntime"] for row in check(runtime, given)]
    for row in rows:
        print(row)
    content = {
        "schema": 1,
        "machine": {**machine(), "versions": versions()},
        "command": "python benchmarks/selfcheck.py",
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check(runtime: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one runtime: itself and the student, idle and loaded."""
    teacher, student = given.run / "teacher.onnx", given.run / "model.onnx"
    for what, other in (("teacher against itself", teacher), ("student against teacher", student)):
        for cores in (0, given.loaded):
            with busy(cores):
                ratios = [once(runtime, (teacher, other), given, seed) for seed in range(given.times)]
            yield described(runtime, what, cores, ratios)


def once(runtime: str, paths: tuple[Path, Path], given: argparse.Namespace, seed: int) -> Ratio:
    """Load both anew and compare them once."""
    shape = input_shape(ModelFile("", "onnx", "fp32", paths[0]))
    x = np.random.default_rng(seed).standard_normal((given.batch, *shape)).astype(np.float32)
    loaded = [open_runtime(runtime, path, threads=1) for path in paths]  # type: ignore[arg-type]
    taken = time_in_turn([partial(one.run, x) for one in loaded], repeats=given.repeats, seconds=5.0, seed=seed)
    return compare_latencies(*taken)


def described(runtime: str, what: str, cores: int, ratios: list[Ratio]) -> dict[str, Any]:
    """One row: how often each verdict, and how far the ratios spread."""
    verdicts = Counter(ratio.verdict for ratio in ratios)
    values = [ratio.value for ratio in ratios]
    return {
        "runtime": runtime,
        "what": what,
        "busy_cores": cores,
        "times": len(ratios),
        "no_difference": verdicts["no difference"],
        "faster": verdicts["faster"],
        "slower": verdicts["slower"],
        "ratio_median": round(float(np.median(values)), 4),
        "ratio_lowest": round(min(values), 4),
        "ratio_highest": round(max(values), 4),
    }


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """So many cores compute something useless inside the block."""
    context = multiprocessing.get_context("spawn")
    burners = [context.Process(target=burn, daemon=True) for _ in range(cores)]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        for burner in burners:
            burner.terminate()
            burner.join()


def burn() -> None:
    """Matrix products until killed."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((256, 256))
    while True:
        matrix = matrix @ matrix
        matrix /= np.linalg.norm(matrix)


if __name__ == "__main__":
    main()
