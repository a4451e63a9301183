"""Peak memory of analysing ResNet-56, with few and with many calibration inputs, each in a process of its own.

    python benchmarks/memory.py --checkpoint resnet56-4bfd9763.th --data cifar10.npz

`causal-compress analyze` goes through teacher, intervene, group, candidates and plan. The first two rows differ in
nothing but the number of calibration inputs that are observed; one mask and one baseline, and few candidates, keep
them short, and are the same in both. The third row is the shipped recipe as it is, on 2,048 inputs.
`peak_bytes` is the largest resident set of the whole process, torch and the data set's arrays included;
`ratio_to_first` is what the first row's is multiplied by.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from causal_compress.provenance import machine

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "budget.macs=0.95",
    "intervene.masks=1",
    "intervene.baselines=[mean]",
    "plan.widths=[0.5]",
    "plan.max_span=1",
    "plan.inputs=128",
    "plan.heldout=64",
]


def peak_of(command: list[str]) -> int:
    """Peak resident set of a command [bytes].

    Args:
        command: Must end without an error.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)  # unlike RUSAGE_CHILDREN, this one child's
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the analysis ended with exit code {process.returncode}")
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024  # macOS counts bytes, Linux KiB


def analyse(what: str, inputs: int, settings: list[str], given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One row.

    Args:
        what: The row's name.
        inputs: Calibration inputs, all of which are observed.
        settings: More of --set.
        given: Checkpoint, data and threads.
        out: Run folder.
    """
    settings = [f"data.calibration={inputs}", f"intervene.inputs={inputs}", f"threads={given.threads}", *settings]
    command = [sys.executable, "-m", "causal_compress", "analyze", "-q", "--recipe", "cifar-resnet"]
    command += ["--arch", f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet56", "--weights", str(given.checkpoint)]
    command += ["--data", f"npz:{given.data}", "--out", str(out)]
    started = time.perf_counter()
    peak = peak_of([*command, *(word for text in settings for word in ("--set", text))])
    stages = json.loads((out / "run.json").read_text(encoding="utf-8"))["stages"]
    by_stage = {stage["stage"]: stage["peak_memory_bytes"] for stage in stages}
    return {
        "what": what,
        "inputs": inputs,
        "peak_bytes": peak,
        "ratio_to_first": 1.0,
        "intervene_peak_bytes": by_stage["intervene"],
        "candidates_peak_bytes": by_stage["candidates"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="public ResNet-56 for CIFAR-10")
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--inputs", type=int, nargs=2, default=[1000, 10000], metavar="N", help="few and many")
    parser.add_argument("--default", type=int, default=2048, help="inputs for the recipe as it is; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, inputs in enumerate(arguments.inputs):
            rows.append(analyse("short analysis", inputs, SHORT, arguments, Path(temporary) / str(number)))
            print(rows[-1], flush=True)
        if arguments.default:
            rows.append(analyse("the recipe as it is", arguments.default, [], arguments, Path(temporary) / "default"))
            print(rows[-1], flush=True)
    for row in rows:
        row["ratio_to_first"] = round(row["peak_bytes"] / rows[0]["peak_bytes"], 3)
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join(["python benchmarks/memory.py", *shown])}
    beside = arguments.out.with_suffix(".tmp")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    beside.replace(arguments.out)


if __name__ == "__main__":
    main()
