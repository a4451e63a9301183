"""SIGKILL at random moments, then the same command: the result is compared bit for bit with an undisturbed run.

    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --kills 4 --networks perceptron

Two small networks that come with scikit-learn's data: a residual one on digits (depth and width shrink, distilled), and
a perceptron on a table whose layers of unlike shapes merge. Each is compressed once undisturbed by `causal-compress
compress`, as a user calls it. Then, for each kill, a run in a new folder is killed while a stage is at work, after a
random part of the time that this stage took undisturbed, and started again with the same command. The stages take
turns, the longest first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from causal_compress.files import sha256_of_file
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.provenance import machine
from causal_compress.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
COMPARED = (
    "plan.json",
    "rewrite.safetensors",
    "prune.safetensors",
    "distill.safetensors",
    "student.safetensors",
    "surgery.json",
)
EPOCHS = 6
VERDICTS = (0, 3, 4)
SHARED = ["benchmark.seconds=0.2", "benchmark.repeats=10", "benchmark.batches=[1]", "budget.max_accuracy_drop=5"]
NETWORKS = {
    "residual": [
        "model.arch=causal_compress.demo:digits_net",
        "model.args={width: 16, blocks: 3}",
        "data.source=sklearn:digits",
        "data.normalize={mean: [0.305], std: [0.376]}",
        "data.augment.crop_padding=1",
        "budget.macs=0.4",
        "intervene.batch_size=128",
        "distill.epochs=6",
    ],
    "perceptron": [
        f"model.arch={ROOT / 'examples' / 'mlp.py'}:mlp",
        "model.args={inputs: 30, hidden: [64, 48, 32, 24]}",
        "data.source=sklearn:breast_cancer",
        "budget.params=0.7",
        "plan.width=false",
        "plan.max_epsilon=1.0",
        "distill.epochs=20",
        "distill.batch_size=64",
    ],
}


def settings_of(network: str, weights: Path, threads: int) -> list[str]:
    """What is given with --set."""
    return [*SHARED, *NETWORKS[network], f"model.weights={weights}", f"threads={threads}"]


def train_teacher(network: str, weights: Path) -> None:
    """A quick teacher (AdamW, a few epochs)."""
    recipe = load_recipe(None, settings_of(network, weights, 1))
    data = load_data(recipe.data, seed=0)
    torch.manual_seed(0)
    model = build_model(recipe.model.model_copy(update={"weights": None})).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for epoch in range(EPOCHS):
        for x, y in data.train.batches(32, shuffle_seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    save_file(model.state_dict(), weights)


def start(network: str, weights: Path, out: Path, threads: int) -> subprocess.Popen[bytes]:
    """The command, begun."""
    sets = [word for text in settings_of(network, weights, threads) for word in ("--set", text)]
    command = [sys.executable, "-m", "causal_compress", "compress", "-q", *sets, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=out.parent)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the end; a run that fails must not look like one that was resumed."""
    if process.wait() not in VERDICTS:
        raise SystemExit((out.parent / f"{out.name}.log").read_text(encoding="utf-8"))


def stage_seconds(out: Path) -> dict[str, float]:
    """What each stage took, the longest first."""
    stages = json.loads((out / "run.json").read_text(encoding="utf-8"))["stages"]
    return {s["stage"]: s["seconds"] for s in sorted(stages, key=lambda s: -s["seconds"])}


def kill_in(process: subprocess.Popen[bytes], out: Path, stage: str, delay: float) -> str:
    """Wait until a stage has begun, a little longer, and kill; returns the stage that was hit."""
    mark = out / f".partial-{stage}"
    while not (mark.exists() or (out / f"{stage}.json").exists()):
        if process.poll() is not None:
            raise SystemExit(f"the run ended before {stage} began: {out}.log")
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()
    hit = [path.name.removeprefix(".partial-") for path in out.glob(".partial-*")]
    return hit[0] if hit else "between stages"


def fingerprints(out: Path) -> dict[str, str]:
    """Of all files whose bits must not depend on kills."""
    return {name: sha256_of_file(out / name) for name in COMPARED}


def torment(network: str, kills: int, work: Path, threads: int, rng: random.Random) -> list[dict[str, Any]]:
    """One row for each kill of a network.

    Args:
        network: Key of NETWORKS.
        kills: How many.
        work: Folders are made here.
        threads: Of the compression.
        rng: Draws the moments.
    """
    weights = work / f"{network}.safetensors"
    train_teacher(network, weights)
    undisturbed = work / network
    finish(start(network, weights, undisturbed, threads), undisturbed)
    wanted, seconds = fingerprints(undisturbed), stage_seconds(undisturbed)
    rows = []
    for number in range(kills):
        stage = list(seconds)[number % len(seconds)]
        part = rng.random()
        out = work / f"{network}-{number}"
        hit = kill_in(start(network, weights, out, threads), out, stage, part * seconds[stage])
        begun = time.perf_counter()
        finish(start(network, weights, out, threads), out)
        found = fingerprints(out)
        rows.append(
            {
                "network": network,
                "stage_aimed_at": stage,
                "part_of_stage": round(part, 3),
                "stage_hit": hit,
                "resumed_s": round(time.perf_counter() - begun, 1),
                "files_compared": len(wanted),
                "files_that_differ": ", ".join(name for name in wanted if found[name] != wanted[name]) or "none",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    """Kill, resume, compare; exit code 1 if any bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="in all, shared among the networks")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="keep the run folders here; must be empty or absent")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_resume.json")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for network, kills in zip(arguments.networks, shares(arguments.kills, len(arguments.networks)), strict=True):
            rows += torment(network, kills, work, arguments.threads, rng)
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    content = {"schema": 1, "machine": machine(), "command": " ".join(["python benchmarks/kill_resume.py", *shown])}
    beside = arguments.out.with_suffix(".tmp")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    beside.replace(arguments.out)
    return int(any(row["files_that_differ"] != "none" for row in rows))


def shares(total: int, parts: int) -> Sequence[int]:
    """A number as nearly equal parts, the larger ones first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


if __name__ == "__main__":
    sys.exit(main())
