"""Debiased CKA of all pairs of ResNet-56's sites against ckatorch: same inputs, sites and threads, one run.

    pip install ckatorch
    python benchmarks/cka_speed.py --checkpoint resnet56-4bfd9763.th --data cifar10.npz

Sites are the outputs of the stem, of the 27 blocks and of the classifier. ckatorch takes activations of three
dimensions, (sets, samples, features), from forward hooks on modules. So each site gets an identity module that is
called with the flattened activation as one set of the whole batch; both libraries then estimate the same quantity.
`max_abs_difference` compares what they say, batch by batch: over several, `ckatorch.CKA` keeps only the last.

Rows: `ckatorch.CKA` as a user calls it (two forward passes a batch), and its `cka_batch` on activations that are there
already; ours the same two ways. The last row is the analysis stage on the same inputs, with interventions, null,
blocks for the bootstrap, and effects: what it adds to the forward passes it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from causal_compress.inputs.data import Features
from causal_compress.inputs.models import build_model
from causal_compress.recipe import InterveneSection, ModelSection
from causal_compress.understand.intervene import intervene
from causal_compress.understand.similarity import cka_from_products, gram_matrix, hsic_products, u_centre
from causal_compress.understand.trace import Network, site_activations, trace

BATCH = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROOT = Path(__file__).resolve().parents[1]


class Probed(nn.Module):
    """The chain with an identity module at each site, which sees the flattened activation as one set of samples."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.regions = nn.ModuleList(region.module for region in network.regions)
        self.probes = nn.ModuleList(nn.Identity() for _ in network.regions)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        for region, probe in zip(self.regions, self.probes, strict=True):
            x = region(x)
            probe(x.flatten(1)[None])
        return x


class Inputs:
    """Inputs as the analysis stage reads them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int, *, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Inputs and empty labels."""
        return [(part, torch.empty(0)) for part in self.x[:limit].split(batch_size)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall time, and what came out."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def load_inputs(path: str, count: int) -> Tensor:
    """The first test images, normalised."""
    with np.load(path) as archive:
        pixels = torch.from_numpy(archive["x_test"][:count]).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def products(sites: Iterable[Tensor]) -> Tensor:
    """One batch's HSIC of all pairs; the activations may be computed on the way."""
    return hsic_products(u_centre(torch.stack([gram_matrix(site) for site in sites])))


def walk(network: Network, x: Tensor) -> Iterator[Tensor]:
    """The sites' activations, one after the other."""
    for region in network.regions:
        x = region.module(x)
        yield x


def theirs(network: Network, x: Tensor) -> Tensor:
    """All of ckatorch.CKA, forward passes included."""
    from ckatorch import CKA

    model = Probed(network)
    layers = [f"probes.{number}" for number in range(len(network.regions))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about shuffling, which would change the inputs between libraries
        cka: Tensor = CKA(model, model, layers)(DataLoader(TensorDataset(x), batch_size=BATCH), epochs=1)
    return cka


def theirs_on_activations(sites: list[Tensor]) -> Tensor:
    """The estimator of ckatorch on every pair of activations that are there already."""
    from ckatorch import cka_batch

    sets = [site.flatten(1)[None] for site in sites]
    return torch.stack([torch.stack([cka_batch(x, y) for y in sets]) for x in sets])


def compare(network: Network, x: Tensor) -> list[dict[str, Any]]:
    """Both rows; the libraries take turns batch by batch, because the load of the machine may change."""
    products(walk(network, x[:BATCH]))  # warm up
    seconds, difference = np.zeros(4), 0.0
    for part in x.split(BATCH):
        sites = site_activations(network, part)
        runs = [
            timed(lambda sites=sites: products(sites)),
            timed(lambda sites=sites: theirs_on_activations(sites)),
            timed(lambda part=part: products(walk(network, part))),
            timed(lambda part=part: theirs(network, part)),
        ]
        seconds += [run[0] for run in runs]
        difference = max(difference, (cka_from_products(runs[0][1]) - runs[1][1]).abs().max().item())
    shared = {"sites": len(network.regions), "inputs": len(x), "batch": BATCH, "max_abs_difference": difference}
    return [
        row("forward passes excluded", seconds[0], seconds[1], shared),
        row("forward passes included", seconds[2], seconds[3], shared),
    ]


def row(what: str, our_seconds: float, their_seconds: float, shared: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    return {
        "what": what,
        "ours_s": round(float(our_seconds), 3),
        "ckatorch_s": round(float(their_seconds), 3),
        "speedup": round(float(their_seconds / our_seconds), 1),
        **shared,
    }


def stage_row(network: Network, x: Tensor) -> dict[str, Any]:
    """What the analysis stage adds to the forward passes it needs."""
    features = Features("image", (), (), zero=x.mean((0, 2, 3))[:, None, None], mean=x.mean(0))
    effects = intervene(network, Inputs(x), features, InterveneSection(inputs=len(x), batch_size=BATCH), seed=0)  # type: ignore[arg-type]
    return {
        "what": "analysis stage: plain and intervened inputs, CKA, null, blocks, effects",
        "inputs": effects.inputs,
        "forwards": effects.forwards,
        "forward_s": round(effects.forward_seconds, 3),
        "analysis_s": round(effects.analysis_seconds, 3),
        "analysis_per_forward": round(effects.analysis_seconds / effects.forward_seconds, 3),
    }


def machine(threads: int) -> dict[str, Any]:
    """Where the numbers come from."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ckatorch")},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(path: Path, content: dict[str, Any]) -> None:
    """Write beside, then rename, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="public ResNet-56 for CIFAR-10")
    parser.add_argument("--data", required=True, help="cifar10.npz")
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cka_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine(arguments.threads)
    x = load_inputs(arguments.data, arguments.inputs)
    arch = f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet56"
    network = trace(build_model(ModelSection(arch=arch, weights=arguments.checkpoint)), x[:2])
    with torch.inference_mode():
        rows = [*compare(network, x), stage_row(network, x)]
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    command = " ".join(["python benchmarks/cka_speed.py", *shown])
    write(arguments.out, {"schema": 1, "machine": where, "command": command, "rows": rows})
    for line in rows:
        print(line)


if __name__ == "__main__":
    main()
