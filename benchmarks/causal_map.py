"""Does a node's causal effect say what ablating it costs? ResNet-56: ACE against measured harm, beside its rivals.

    python benchmarks/causal_map.py --weights resnet56-4bfd9763.th --data cifar10.npz

Every site is a node of its own here; the first, which has none before it, is left out of the scores. ACE comes from
calibration images, harm (KL of the answers when a block's own
computation is set to its mean, or bypassed) from validation images. Rivals: 1 - CKA of the block's two ends, the mean
absolute weight of the block's layers, the relative size of what it adds, random ranks. Intervals: bootstrap over sites.
Then: the partition's stability (median adjusted Rand index over bootstraps), the ranks' stability over seeds, baselines
and patch sizes (Spearman with the first setting), and the nulls.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from causal_compress.explain.ablation import ablation_harm, part_network, run_parted
from causal_compress.explain.causal_map import causal_map
from causal_compress.explain.engine import open_engine, open_scene
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Data, load_data
from causal_compress.inputs.models import build_model
from causal_compress.provenance import machine
from causal_compress.recipe import DataSection, GroupSection, InterveneSection, ModelSection, NormalizeSection
from causal_compress.results import CausalMap, Effects
from causal_compress.understand.group import group
from causal_compress.understand.intervene import intervene
from causal_compress.understand.trace import Network, trace

ROOT = Path(__file__).resolve().parents[1]
DONORS = 256
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FIRST: dict[str, Any] = {"baselines": ["marginal"], "grid": 8, "seed": 0, "estimator": "output"}
VARIED: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 2},
    {"grid": 4},
    {"grid": 16},
    {"baselines": ["mean"]},
    {"baselines": ["blur"]},
    {"baselines": ["mean", "blur", "marginal"]},
    {"estimator": "units"},
]


def map_of(network: Network, data: Data, args: Any, setting: dict[str, Any]) -> CausalMap:
    """ACE of every site under one setting; another seed takes other images too."""
    x, _ = data.calibration.take(range(setting["seed"] * args.inputs, (setting["seed"] + 1) * args.inputs))
    donors, _ = data.calibration.take(range(len(data.calibration) - DONORS, len(data.calibration)))
    scene = open_scene(
        x, data.features, setting["baselines"], grid=setting["grid"], donors=donors, seed=setting["seed"]
    )
    nodes = tuple((site,) for site in range(len(network.regions)))
    engine = open_engine(network, precision="fp32", batch_size=64)
    masks = max(args.masks, 2 * len(setting["baselines"]))
    return causal_map(engine, nodes, scene, estimator=setting["estimator"], masks=masks, seed=setting["seed"])


def rivals(network: Network, data: Data, effects: Effects) -> dict[str, list[float]]:
    """What else could predict the harm, for each site."""
    cka = np.asarray(effects.cka)
    parts = part_network(network)
    with torch.inference_mode():
        plain = run_parted(parts, data.calibration.take(range(128))[0])
        added = [
            float(own.abs().mean() / plain.exit_of(site).abs().mean().clamp_min(1e-12))
            for site, own in enumerate(plain.owns)
        ]
    weights = [
        torch.cat([p.detach().abs().flatten() for p in region.module.parameters() if p.ndim > 1]).mean()
        for region in network.regions
    ]
    return {
        "CKA only": [math.nan, *(1 - float(cka[site - 1, site]) for site in range(1, len(cka)))],  # no site before it
        "weight magnitude": [float(weight) for weight in weights],
        "activation magnitude": added,
    }


def correlated(scores: list[float], harm: dict[int, float], sites: list[int]) -> dict[str, Any]:
    """Spearman over sites with a bootstrap interval over sites."""
    a, b = np.array([scores[site] for site in sites]), np.array([harm[site] for site in sites])
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(sites), len(sites)) for _ in range(2000)]
    drawn = [spearmanr(a[d], b[d]).statistic for d in draws if len(set(d)) > 3]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    rho = float(spearmanr(a, b).statistic)
    return {"rho": round(rho, 4), "rho_ci": [round(float(low), 4), round(float(high), 4)], "sites": len(sites)}


def random_rho(sites: int) -> dict[str, Any]:
    """What random ranks reach."""
    generator = np.random.default_rng(1)
    drawn = [spearmanr(generator.random(sites), np.arange(sites)).statistic for _ in range(2000)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {
        "rho": round(float(np.mean(drawn)), 4),
        "rho_ci": [round(float(low), 4), round(float(high), 4)],
        "sites": sites,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--arch", default="resnet56", choices=("resnet20", "resnet56"))
    parser.add_argument("--inputs", type=int, default=256, help="images for the ACE of each setting")
    parser.add_argument("--masks", type=int, default=2)
    parser.add_argument("--harm-inputs", type=int, default=1024)
    parser.add_argument("--cka-inputs", type=int, default=1024)
    parser.add_argument("--bootstraps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "causal_map.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_data(DataSection(source=f"npz:{args.data}", normalize=NormalizeSection(mean=MEAN, std=STD)), seed=0)
    seeds = 1 + max(change.get("seed", 0) for change in VARIED)
    if seeds * args.inputs + DONORS > len(data.calibration):
        most = (len(data.calibration) - DONORS) // seeds
        parser.error(f"--inputs {args.inputs} x {seeds} seeds and {DONORS} donors overlap; at most --inputs {most}")
    arch = f"{ROOT / 'examples' / 'cifar_resnet.py'}:{args.arch}"
    network = trace(build_model(ModelSection(arch=arch, weights=args.weights)), data.example_input)
    effects = intervene(network, data.calibration, data.features, InterveneSection(inputs=args.cka_inputs), seed=0)
    rows = validity_rows(network, data, effects, args)
    groups = group(effects, GroupSection(bootstraps=args.bootstraps), seed=0)
    rows.append(
        {
            "what": "partition",
            "nodes": len(groups.chosen.nodes),
            "median_ari": groups.chosen.stability_ari,
            "ari_p5": groups.chosen.stability_low,
            "bootstraps": args.bootstraps,
            "null_cka_mean": round(groups.null_cka_mean, 5),
            "null_cka_max": round(groups.null_cka_max, 5),
        }
    )
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/causal_map.py", *shown])
    content = {"schema": 1, "machine": machine(), "command": command, "rows": rows}
    atomic_write_text(args.out, json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(row)


def validity_rows(network: Network, data: Data, effects: Effects, args: Any) -> list[dict[str, Any]]:
    """ACE and its rivals against both kinds of harm; then the ranks' stability."""
    nodes = tuple((site,) for site in range(len(network.regions)))
    first = map_of(network, data, args, FIRST)
    scores = {"ACE (output)": [node.ace for node in first.nodes], **rivals(network, data, effects)}
    others = [(change, map_of(network, data, args, {**FIRST, **change})) for change in VARIED]
    scores["ACE (units)"] = [node.ace for node in others[-1][1].nodes]
    rows: list[dict[str, Any]] = []
    for how in ("mean", "bypass"):
        found = ablation_harm(network, nodes, data.validation, how=how, inputs=args.harm_inputs)
        harm = {node.index: node.kl for node in found.nodes if node.index > 0}  # CKA knows nothing of the first site
        for name, values in scores.items():
            rows.append(
                {"what": f"harm: {how}", "score": name, **correlated(values, harm, list(harm)), "n": found.inputs}
            )
        rows.append({"what": f"harm: {how}", "score": "random", **random_rho(len(harm)), "n": found.inputs})
    reference = [node.ace for node in first.nodes]
    for change, other in others:
        rho = spearmanr(reference, [node.ace for node in other.nodes]).statistic
        rows.append(
            {"what": "rank stability", "changed": json.dumps(change), "rho": round(float(rho), 4), "n": other.inputs}
        )
    nulls = [node.null for node in first.nodes]
    rows.append({"what": "null ACE", "largest": max(nulls), "smallest_ace": min(reference), "n": first.inputs})
    rows.append(
        {"what": "cost of a map", "forwards": first.forwards, "seconds": round(first.seconds, 1), "n": first.inputs}
    )
    return rows


if __name__ == "__main__":
    main()
