"""A finished run's student, loaded where its architecture's source can't be imported and nothing may be unpickled.

    python benchmarks/load_elsewhere.py --run runs/resnet56 [--run runs/demo/run ...]

For each run: `causal_compress.replay` carries the surgery out on the architecture here, and answers real test inputs.
Then a new process, in an empty folder, is forbidden to import or open the architecture's source and to unpickle
classes; there `causal_compress.load` must give the same answers, its weights must be those of student.safetensors and
pass through `torch.load(weights_only=True)`, and a training step must lower the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress import replay
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.provenance import machine
from causal_compress.recipe import ModelSection
from causal_compress.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RATE = 1e-3
LARGEST_DIFFERENCE = 1e-5

ELSEWHERE = """
import json, sys
from pathlib import Path
import numpy, safetensors.torch, torch, torch.nn.functional as F
import causal_compress

folder, cases, rate, *blocked = sys.argv[1:]

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name in blocked:
            raise ImportError(f"{name} is not here")

def guard(event, arguments):
    if event == "open" and str(arguments[0]) in blocked:
        raise FileNotFoundError(arguments[0])
    if event == "pickle.find_class":
        raise RuntimeError(f"something unpickles {arguments[0]}.{arguments[1]}")

sys.meta_path.insert(0, NotHere())
sys.addaudithook(guard)
model = causal_compress.load(folder)
arrays = numpy.load(cases)
x, y, wanted = (torch.from_numpy(arrays[name]) for name in ("x", "y", "wanted"))
with torch.no_grad():
    difference = (model(x) - wanted).abs().max().item()
stored = safetensors.torch.load_file(Path(folder) / "student.safetensors")
torch.save(model.state_dict(), "weights.pt")
again = torch.load("weights.pt", weights_only=True)
same = stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
before = F.cross_entropy(model(x), y)
before.backward()
torch.optim.SGD(model.parameters(), float(rate)).step()
with torch.no_grad():
    after = F.cross_entropy(model(x), y).item()
here = [name for name in blocked if name in sys.modules]
found = {"difference": difference, "same_weights": same, "before": before.item(), "after": after, "here": here}
print(json.dumps(found))
"""


def load_elsewhere(run: Path, cases: Path, blocked: Sequence[str]) -> dict[str, Any]:
    """What a process without the source makes of a run folder.

    Args:
        run: A finished run.
        cases: .npz with inputs x, labels y and the answers that are wanted.
        blocked: Module names that can't be imported, and files that can't be opened.

    Returns:
        difference (largest, absolute), same_weights, before and after (losses around a training step), and here: the
        blocked modules that got in all the same.
    """
    command = [sys.executable, "-c", ELSEWHERE, str(run.absolute()), str(cases.absolute()), str(RATE), *blocked]
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def sources_of(arch: str) -> list[str]:
    """What an architecture comes from: its file, or its module and that module's file."""
    place, _, _ = arch.rpartition(":")
    if place.endswith(".py"):
        return [str(Path(place).absolute()), Path(place).stem]
    if place in ("torchvision", "timm"):
        return [place]
    module = sys.modules.get(place)
    return [place, *([str(module.__file__)] if module is not None else [])]


def loss_after_step(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Losses before and after one training step, in training mode."""
    optimizer = torch.optim.SGD(model.train().parameters(), RATE)
    before = F.cross_entropy(model(x), y)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return before.item(), F.cross_entropy(model(x), y).item()


def examine(run: Path, count: int) -> dict[str, Any]:
    """One row.

    Args:
        run: A finished run.
        count: Test inputs.
    """
    recipe = load_recipe(run / "recipe.resolved.yaml")
    data = load_data(recipe.data, seed=recipe.seed)
    x, y = data.test.take(np.arange(min(count, len(data.test))))
    bare = ModelSection(arch=recipe.model.arch, args=recipe.model.args)
    student = replay(build_model(bare, classes=len(data.classes)), run).eval()
    with torch.no_grad():
        wanted = student(x)
    with tempfile.TemporaryDirectory() as temporary:
        cases = Path(temporary) / "cases.npz"
        np.savez(cases, x=x.numpy(), y=y.numpy(), wanted=wanted.numpy())
        found = load_elsewhere(run, cases, sources_of(str(recipe.model.arch)))
    before, after = loss_after_step(student, x, y)
    holds = found["difference"] <= LARGEST_DIFFERENCE and found["same_weights"] and not found["here"]
    return {
        "run": run.name,
        "inputs": len(x),
        "max_abs_diff": found["difference"],
        "same_weights": found["same_weights"],
        "loss_before": found["before"],
        "loss_after": found["after"],
        "replayed_loss_before": before,
        "replayed_loss_after": after,
        "holds": holds and found["after"] < found["before"] and after < before,
    }


def main() -> int:
    """Examine, print and write; exit code 1 if anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", required=True, help="a finished run; may be repeated")
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "load_elsewhere.json")
    arguments = parser.parse_args()
    rows = [examine(run, arguments.inputs) for run in arguments.run]
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join(["python benchmarks/load_elsewhere.py", *shown])}
    beside = arguments.out.with_suffix(".tmp")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    beside.replace(arguments.out)
    for row in rows:
        print(row)
    return int(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
