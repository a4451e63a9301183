"""The same 256 masks on the same 64 images, all sites of ResNet-20 recorded: ours against Captum's FeatureAblation.

    python benchmarks/intervention_speed.py --weights resnet20-12fca82f.th --data cifar10.npz

Masks: each of 256 patches (a 16 x 16 grid) alone, at the mean baseline, because that is what FeatureAblation does. With
Captum, a forward hook on the module that ends each site keeps the mean of each channel, as our engine does. Every
measurement is a process of its own, in turns; the throughput of a second of processor time stands beside that of the
clock, because other processes don't disturb it; memory is what the work adds to the peak of the process. Captum gets
batch sizes (`perturbations_per_eval`) of 1 and 4, and its network in float32 and under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from causal_compress.explain.engine import open_engine, open_scene, respond
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.provenance import machine, peak_memory
from causal_compress.recipe import DataSection, ModelSection, NormalizeSection
from causal_compress.understand.trace import trace

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VARIANTS = ("ours auto", "ours fp32", "captum fp32 x1", "captum fp32 x4", "captum bf16 x1", "captum bf16 x4")


def ours(model: nn.Module, scene: Any, masks: int, precision: str, example: Tensor) -> tuple[Any, int]:
    """Our engine; returns what was recorded and the number of sites."""
    network = trace(model, example)
    engine = open_engine(network, precision=precision)
    sites = range(len(network.regions))
    drawn = torch.eye(len(scene.names), dtype=torch.bool)[:masks].expand(len(scene.x), -1, -1)

    def work() -> Tensor:
        return respond(engine, scene, drawn, ["mean"] * drawn.shape[1], sites=sites).logits

    return work, len(sites)


def captum(model: nn.Module, scene: Any, masks: int, bf16: bool, at_once: int) -> tuple[Any, int]:
    """FeatureAblation with a hook on each block, stem and classifier."""
    from captum.attr import FeatureAblation

    kept: list[Tensor] = []
    places = [model.bn1, *model.layer1, *model.layer2, *model.layer3, model.linear]
    for place in places:
        place.register_forward_hook(lambda _m, _i, y: kept.append(y.flatten(2).mean(2) if y.ndim > 2 else y))
    layout = scene.layout.clamp_max(masks - 1)[None, None].expand(1, *scene.x.shape[1:])
    answers: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(x).float()
        answers.append(logits)
        return logits.max(1).values

    def work() -> Tensor:
        kept.clear()
        answers.clear()
        with torch.inference_mode():
            FeatureAblation(forward).attribute(
                scene.x,
                baselines=scene.baselines["mean"].contiguous(),
                feature_mask=layout,
                perturbations_per_eval=at_once,
            )
        return torch.cat(answers[1:])

    return work, len(places)


def measure(name: str, args: Any) -> dict[str, Any]:
    """One variant in this process."""
    warnings.filterwarnings("ignore", module="captum")
    torch.set_num_threads(args.threads)
    data = load_data(DataSection(source=f"npz:{args.data}", normalize=NormalizeSection(mean=MEAN, std=STD)), seed=0)
    model = build_model(ModelSection(arch=f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet20", weights=args.weights))
    x, _ = data.validation.take(range(args.images))
    scene = open_scene(x, data.features, ["mean"], grid=16)
    match name.split():
        case ["ours", precision]:
            work, sites = ours(model, scene, args.masks, precision, data.example_input)
        case ["captum", precision, at_once]:
            work, sites = captum(model, scene, args.masks, precision == "bf16", int(at_once[1:]))
    import psutil

    model(x[:2])
    before = psutil.Process().memory_info().rss
    with peak_memory() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        answers = work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    forwards = args.masks * args.images
    return {
        "variant": name,
        "sites": sites,
        "interventions": forwards,
        "recorded": answers.numel() // answers.shape[-1],
        "seconds": seconds,
        "throughput_per_s": forwards / seconds,
        "throughput_per_cpu_s": forwards / cpu,
        "added_memory_bytes": max(0, peak.size_bytes - before),
    }


def main() -> None:
    """Measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--masks", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant here and print it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "intervention_speed.json")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed ({done.returncode}):\n{done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    fastest = max(
        float(np.median([r["throughput_per_s"] for r in found[name]])) for name in VARIANTS if "captum fp32" in name
    )
    rows = []
    for rounds in found.values():
        speed = float(np.median([r["throughput_per_s"] for r in rounds]))
        rows.append(
            {
                **rounds[0],
                "seconds": round(float(np.median([r["seconds"] for r in rounds])), 2),
                "throughput_per_s": round(speed, 1),
                "throughput_range": [round(f(r["throughput_per_s"] for r in rounds), 1) for f in (min, max)],
                "throughput_per_cpu_s": round(float(np.median([r["throughput_per_cpu_s"] for r in rounds])), 1),
                "times_captum_fp32": round(speed / fastest, 2),
                "added_memory_bytes": int(np.median([r["added_memory_bytes"] for r in rounds])),
                "rounds": len(rounds),
            }
        )
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/intervention_speed.py", *shown])
    content = {"schema": 1, "machine": machine(), "command": command, "rows": rows}
    atomic_write_text(args.out, json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
