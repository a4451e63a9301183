"""Nine torchvision architectures the whole way: trace, group, plan, rewrite, prune, ONNX.

    python benchmarks/architectures.py
    python benchmarks/architectures.py --only resnet18 mobilenet_v2

Weights are random (but let the input through to the logits, see `write_weights`) and inputs are small: what is shown is
that each architecture comes out valid, smaller, of the same output shape and equal in ONNX, and that whatever was left
whole has a reason; accuracy and harm mean nothing here. The logits of random weights hardly depend on the input, so
`onnx_max_abs_diff` is the measure of parity, beside `logits_spread`, their standard deviation; `agreement_pct` may be
on near ties. Where no plan reaches 0.7 of the MACs the least possible is asked for. Each network runs in a process of
its own; `peak_bytes` is that process's largest resident set, torch included.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.pipeline import analyze, compress
from causal_compress.provenance import machine
from causal_compress.recipe import Recipe
from causal_compress.results import Candidates, Exported, Log, Plan, Skip, TeacherScore
from causal_compress.runs import read_result
from causal_compress.shrink.batch_norms import reestimate_batch_norms
from causal_compress.shrink.plan import front, price
from causal_compress.shrink.surgery import replay
from causal_compress.understand.trace import Network, trace

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 10
WANTED_MACS = 0.7
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {  # side of the input [pixels], arguments
    "alexnet": (64, {}),
    "vgg11_bn": (32, {}),
    "resnet18": (64, {}),
    "densenet121": (64, {}),
    "mobilenet_v2": (64, {}),
    "efficientnet_b0": (64, {}),
    "convnext_tiny": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "vit_b_16": (32, {"image_size": 32}),
}


def write_gratings(path: Path, size: int, count: int = 800) -> None:
    """Noisy gratings whose direction is the class, as an npz of uint8 images.

    Args:
        path: File to write.
        size: Side [pixels].
        count: Images.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    angle = labels * np.pi / CLASSES
    row, column = np.mgrid[:size, :size] / size
    across = np.cos(angle)[:, None, None] * row + np.sin(angle)[:, None, None] * column
    waves = np.sin(2 * np.pi * (4 * across + rng.random((count, 1, 1))))
    tinted = waves[..., None] * rng.uniform(30, 90, (count, 1, 1, 3)) + 127 + rng.normal(0, 20, (count, size, size, 3))
    np.savez(path, x=tinted.clip(0, 255).astype(np.uint8), y=labels)


def recipe_for(name: str, arguments: dict[str, Any], scratch: Path, macs: float) -> Recipe:
    """A small recipe: few inputs, one width, pairs.

    Args:
        name: Of a torchvision classifier.
        arguments: Its keyword arguments.
        scratch: Folder of the data and, once they are written, the weights.
        macs: Share of MACs to keep.
    """
    return Recipe.model_validate(
        {
            "model": {
                "arch": f"torchvision:{name}",
                "args": {"num_classes": CLASSES, **arguments},
                "weights": str(weights) if (weights := scratch / "weights.pt").exists() else None,
            },
            "data": {
                "source": f"npz:{scratch / 'gratings.npz'}",
                "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
                "calibration": 192,
                "validation": 64,
            },
            "budget": {"macs": macs},
            "intervene": {"inputs": 192, "masks": 1, "baselines": ["mean"], "batch_size": 64},
            "group": {"bootstraps": 10},
            "plan": {"widths": [0.5], "max_span": 2, "inputs": 128, "heldout": 64, "align": 4},
            "rewrite": {"inputs": 192},
            "prune": {"inputs": 192},
            "export": {"inputs": 64, "min_agreement_pct": 0.0},
            "distill": None,
            "benchmark": None,
        }
    )


def run_one(name: str, size: int, arguments: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One network the whole way; its row.

    Args:
        name: Of a torchvision classifier.
        size: Side of the input [pixels].
        arguments: Its keyword arguments.
        scratch: Empty folder.
    """
    started = time.perf_counter()
    write_gratings(scratch / "gratings.npz", size)
    write_weights(recipe_for(name, arguments, scratch, 1.0), scratch / "weights.pt")
    analyze(recipe_for(name, arguments, scratch, 1.0), scratch / "analysis", force=True)
    known = read_result(scratch / "analysis", "candidates", Candidates)
    least = front(known, price(known))[0].macs
    recipe = recipe_for(name, arguments, scratch, min(1.0, max(WANTED_MACS, 1.001 * least)))
    compress(recipe, scratch / "run", reuse=scratch / "analysis", force=True)
    return {
        "arch": name,
        "input": [3, size, size],
        **row(scratch / "run", recipe),
        "least_macs_kept": round(least, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def write_weights(recipe: Recipe, path: Path) -> None:
    """Random weights that let the input through to the logits.

    Batch norms get the statistics that they have on the data; layers that torchvision sets to zero (the head of a
    vision transformer), and networks without any norm (AlexNet), begin as He et al. 2015 do.

    Args:
        recipe: Names the architecture and the data.
        path: File to write.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model)
    data = load_data(recipe.data, seed=recipe.seed)
    normed = any(isinstance(module, nn.BatchNorm2d | nn.LayerNorm) for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not (normed and module.weight.any()):
            nn.init.kaiming_normal_(module.weight)
    reestimate_batch_norms(model, [x for x, _ in data.calibration.batches(64)])
    torch.save(model.state_dict(), path)


def row(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What a finished run says, and what a fresh replay of its surgery puts out."""
    teacher = read_result(folder, "teacher", TeacherScore)
    plan, exported = read_result(folder, "plan", Plan), read_result(folder, "export", Exported)
    rewritten, pruned = read_result(folder, "rewrite", Log), read_result(folder, "prune", Log)
    loaded = load_data(recipe.data, seed=recipe.seed)
    network = trace(build_model(recipe.model, classes=CLASSES), loaded.example_input)
    skips = (*plan.skipped, *rewritten.skipped, *pruned.skipped, *network.untraced)
    spread, shape_ok = spread_and_shape(network, folder, pruned, loaded.example_input)
    return {
        "macs_before": teacher.macs,
        "macs_after": pruned.macs,
        "macs_kept": round(pruned.macs / teacher.macs, 4),
        "params_before": teacher.params,
        "params_after": pruned.params,
        "params_kept": round(pruned.params / teacher.params, 4),
        "regions": len(network.regions),
        "merges": sum(decision.kind.startswith("merge") for decision in plan.decisions),
        "narrowed": len(pruned.surgery.keeps),
        "left_whole": len(skips),
        "reasons": reasons_of(skips),
        "unexplained": unexplained(plan, network, read_result(folder, "candidates", Candidates), skips),
        "onnx_max_abs_diff": exported.parity.max_abs_diff,
        "teacher_onnx_max_abs_diff": exported.teacher_parity.max_abs_diff if exported.teacher_parity else None,
        "logits_spread": spread,
        "agreement_pct": exported.parity.agreement_pct,
        "onnx_batches": list(exported.parity.batches),
        "output_shape_ok": shape_ok,
    }


def reasons_of(skips: tuple[Skip, ...]) -> dict[str, int]:
    """Distinct reasons, numbers and indices left out, with how often each was given."""
    numbers, layers = re.compile(r"(?<![\w.])\d+(\.\d+)?(?![\w.])"), re.compile(r"\b[a-z][\w.]*\d[\w.]*")
    return dict(Counter(layers.sub("LAYER", numbers.sub("N", skip.reason)) for skip in skips).most_common())


def unexplained(plan: Plan, network: Network, candidates: Candidates, skips: tuple[Skip, ...]) -> list[str]:
    """Regions that stayed whole though nothing else was measured for them and no reason names one of their layers."""
    named = {word for skip in skips for word in re.split(r"\s+|\.\.", skip.what)}
    measured = {c.first - 1 for c in candidates.rows if c.inputs_kept < 1.0}  # the cut point behind a region narrows
    for candidate in candidates.rows:
        if candidate.first != candidate.last or candidate.widths:
            measured.update(range(candidate.first, candidate.last + 1))
    found = []
    for decision in plan.decisions:
        region = network.regions[decision.candidate.first].info
        last = region.index == len(network.regions) - 1  # the classifier's outputs are the classes
        untouched = decision.kind == "keep" and decision.outputs_kept == 1.0 and not last
        if untouched and region.index not in measured and not named & {region.name, *region.modules}:
            found.append(region.name)
    return found


def spread_and_shape(network: Network, folder: Path, pruned: Log, x: torch.Tensor) -> tuple[float, bool]:
    """Standard deviation of the student's logits, and whether they have the teacher's shape."""
    student = replay(network, pruned.surgery, load_file(folder / "prune.safetensors"))
    with torch.no_grad():
        logits, wanted = student.graph(x), network.graph(x)
    return float(logits.std()), logits.shape == wanted.shape and bool(torch.isfinite(logits).all())


def in_own_process(name: str, threads: int) -> dict[str, Any]:
    """The row of a network, from a fresh process, with that process's peak memory.

    Args:
        name: Of NETWORKS.
        threads: For torch.
    """
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "row.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(answer), "--only", name]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(process.pid, 0)  # unlike RUSAGE_CHILDREN, this one child's
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{name} ended with exit code {process.returncode}")
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return {**json.loads(answer.read_text(encoding="utf-8")), "peak_bytes": usage.ru_maxrss * unit}


def main() -> None:
    """Run, print and write; rows of networks that were not run again stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "architectures.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        name = arguments.only[0]
        with tempfile.TemporaryDirectory() as temporary:
            arguments.child.write_text(json.dumps(run_one(name, *NETWORKS[name], Path(temporary))), encoding="utf-8")
        return
    old = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"] if arguments.out.exists() else []
    rows = {known["arch"]: known for known in old}
    for name in arguments.only:
        rows[name] = in_own_process(name, arguments.threads)
        print(json.dumps(rows[name]), flush=True)
        write(arguments.out, [rows[known] for known in NETWORKS if known in rows])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table at once."""
    content = {"schema": 1, "machine": machine(), "command": "python benchmarks/architectures.py", "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
