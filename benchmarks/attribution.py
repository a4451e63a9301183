"""Attributions on the public ResNet-20 against Captum's: equal patches, at most as many forward passes for anyone.

    python benchmarks/attribution.py --weights resnet20-12fca82f.th --data cifar10.npz --split test

Insertion: features come in by rank from the substrate; deletion: they go. Area under the probability of the network's
own answer. Metrics are per image, intervals from a paired bootstrap over images. Substrates mean and blur are also the
baselines of all perturbing and integrating methods; zero (black) is one that nobody was given. IG and GradientSHAP take
one step for each forward that the others get, though a step costs a backward pass as well. Occlusion and Grad-CAM can't
use as many: the column `forwards` says what each took for an image. Ours was settled on validation images.

Controls: random scores, the centre of the picture, the same score everywhere. Beside them: normalised infidelity (Yeh
et al. 2019, optimal scale), faithfulness correlation (Bhatt et al. 2020), sensitivity-max, and the rank correlation
with attributions to a network of random weights, which should be near 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from causal_compress.explain.attribution import Draws, attribute, log_odds
from causal_compress.explain.engine import Engine, Scene, open_engine, open_scene, respond
from causal_compress.explain.minimal import minimal_sets
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Data, load_data
from causal_compress.inputs.models import build_model
from causal_compress.provenance import machine
from causal_compress.recipe import DataSection, ModelSection, NormalizeSection
from causal_compress.understand.intervene import Baseline
from causal_compress.understand.trace import trace

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SUBSTRATES: tuple[Baseline, ...] = ("mean", "blur", "zero")
GIVEN: tuple[Baseline, ...] = ("mean", "blur")  # the baselines that methods work with
PEERS = ("captum occlusion", "captum integrated gradients", "captum gradientshap", "captum grad-cam")
Method = Callable[[nn.Module, Engine, Scene, Tensor, int, int], Tensor]


def ours(estimator: str) -> Method:
    """Our estimators, by name."""

    def work(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
        found = attribute(engine, scene, masks=budget, estimator=estimator, draws=Draws(0, seed)).output.values
        return found[torch.arange(len(classes)), classes]

    return work


def pooled(scene: Scene, pixels: Tensor) -> Tensor:
    """Sum of pixel attributions in each patch."""
    flat = pixels.detach().sum(1).flatten(1).float()
    return torch.zeros(len(flat), len(scene.names)).index_add_(1, scene.layout.flatten(), flat)


def occlusion(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """Windows of 2 x 2 patches at the finest stride that the budget allows, both baselines."""
    from captum.attr import Occlusion

    window, stride, _ = windows(scene, budget)
    total = torch.zeros(len(classes), len(scene.names))
    for name in GIVEN:
        found = Occlusion(model).attribute(
            scene.x,
            sliding_window_shapes=(scene.x.shape[1], window, window),
            strides=(scene.x.shape[1], stride, stride),
            baselines=scene.baselines[name].contiguous(),
            target=classes,
        )
        total += pooled(scene, found)
    return total


def windows(scene: Scene, budget: int) -> tuple[int, int, int]:
    """Side and stride of occluding windows, and the forwards that they take with both baselines and as they are."""
    size = scene.x.shape[-1]
    window = 2 * size // round(len(scene.names) ** 0.5)
    places = {s: (-(-(size - window) // s) + 1) ** 2 for s in range(1, window + 1)}
    stride = next(s for s, count in places.items() if 2 * (count + 1) <= budget)
    return window, stride, 2 * (places[stride] + 1)


def forwards(name: str, scene: Scene, budget: int) -> int:
    """Forward passes that a method takes for one image; for gradients each with a backward pass."""
    match name:
        case "random" | "centre" | "uniform":
            return 0
        case "captum grad-cam":
            return 1
        case "single patches":
            return 2 * len(scene.names) + 1
        case "captum occlusion":
            return windows(scene, budget)[2]
        case "surrogate" | "difference":
            return budget + 1  # the image as it is
        case _:
            return budget


def integrated(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """Half of the steps from each baseline."""
    from captum.attr import IntegratedGradients

    total = torch.zeros(len(classes), len(scene.names))
    for name in GIVEN:
        found = IntegratedGradients(model).attribute(
            scene.x,
            baselines=scene.baselines[name].contiguous(),
            target=classes,
            n_steps=max(2, budget // 2),
            internal_batch_size=max(256, len(classes)),
        )
        total += pooled(scene, found.float())
    return total


def gradient_shap(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """Both baselines of each image as its distribution."""
    from captum.attr import GradientShap

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  captum draws from the global generator
    rows = []
    for row in range(len(classes)):
        baselines = torch.cat([scene.baselines[name][row : row + 1] for name in GIVEN])
        found = GradientShap(model).attribute(
            scene.x[row : row + 1], baselines=baselines, target=int(classes[row]), n_samples=budget
        )
        rows.append(found)
    return pooled(scene, torch.cat(rows))


def grad_cam(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """The last stage's maps, brought to the grid; one forward is all it can use."""
    from captum.attr import LayerGradCam

    found = LayerGradCam(model, model.layer3).attribute(scene.x, target=classes, relu_attributions=True)
    side = round(len(scene.names) ** 0.5)
    return nn.functional.interpolate(found.detach(), size=(side, side), mode="bilinear").flatten(1)


def random_scores(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """Control."""
    return torch.rand(len(classes), len(scene.names), generator=torch.Generator().manual_seed(seed))


def centre(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """Control: nearer the middle is better."""
    side = round(len(scene.names) ** 0.5)
    place = torch.arange(side) - (side - 1) / 2
    return -(place[:, None].square() + place.square()).flatten().expand(len(classes), -1)


def uniform(model: nn.Module, engine: Engine, scene: Scene, classes: Tensor, budget: int, seed: int) -> Tensor:
    """Control: ties, so the order is that of reading."""
    return torch.zeros(len(classes), len(scene.names))


METHODS: dict[str, Method] = {
    "surrogate": ours("surrogate"),
    "difference": ours("difference"),
    "single patches": ours("occlusion"),
    "captum occlusion": occlusion,
    "captum integrated gradients": integrated,
    "captum gradientshap": gradient_shap,
    "captum grad-cam": grad_cam,
    "random": random_scores,
    "centre": centre,
    "uniform": uniform,
}
SEEDED = ("surrogate", "difference", "captum gradientshap", "random")


def curve_areas(engine: Engine, scene: Scene, scores: Tensor, classes: Tensor, points: int) -> dict[str, Tensor]:
    """Insertion and deletion of each image on each substrate."""
    features = scores.shape[1]
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = torch.linspace(0, features, points).round().long()
    gone = rank[:, None] < counts[None, :, None]
    areas = {}
    for substrate in scene.baselines:
        for what, masks in (("insertion", ~gone), ("deletion", gone)):
            logits = respond(engine, scene, masks, [substrate] * points).logits
            share = logits.softmax(-1)[torch.arange(len(classes)), :, classes]
            areas[f"{what} {substrate}"] = torch.trapezoid(share, dim=1) / (points - 1)
    return areas


def faithfulness(engine: Engine, scene: Scene, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation of summed scores with what masking the same random patches costs; infidelity at the best scale."""
    masks = torch.rand(len(scores), 64, scores.shape[1], generator=torch.Generator().manual_seed(99)) < 0.25
    logits = respond(engine, scene, masks, ["mean"] * 64).logits
    before = log_odds(engine.answer(scene.x, exact=True).cpu())
    rows = torch.arange(len(classes))
    cost = (before[rows, classes][:, None] - log_odds(logits)[rows, :, classes]).double()
    told = (masks.double() * scores[:, None].double()).sum(2)
    told_c, cost_c = told - told.mean(1, keepdim=True), cost - cost.mean(1, keepdim=True)
    spread = told_c.norm(dim=1) * cost_c.norm(dim=1)
    correlation = torch.where(spread > 0, (told_c * cost_c).sum(1) / spread.clamp_min(1e-12), torch.zeros(()))
    scale = (told * cost).sum(1) / told.square().sum(1).clamp_min(1e-12)
    infidelity = (scale[:, None] * told - cost).square().mean(1) / cost.square().mean(1).clamp_min(1e-12)
    return correlation, infidelity


def sensitivity(
    method: Method, setting: tuple[nn.Module, Engine, Data], x: Tensor, classes: Tensor, args: Any
) -> float:
    """Largest relative change of the scores over 3 inputs that differ by at most 0.02, mean over images."""
    model, engine, data = setting
    generator = torch.Generator().manual_seed(5)
    plain = method(model, engine, scene_of(data, x, args.grid), classes, args.masks, 0)
    worst = torch.zeros(len(x))
    for _ in range(3):
        near = x + 0.02 * (2 * torch.rand(x.shape, generator=generator) - 1)
        other = method(model, engine, scene_of(data, near, args.grid), classes, args.masks, 0)
        worst = worst.maximum((other - plain).norm(dim=1) / plain.norm(dim=1).clamp_min(1e-12))
    return float(worst.mean())


def randomised(model: nn.Module) -> nn.Module:
    """The same architecture with weights drawn anew."""
    fresh = copy.deepcopy(model)
    torch.manual_seed(11)
    for module in fresh.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return fresh.eval()


def scene_of(data: Data, x: Tensor, grid: int) -> Scene:
    """With every substrate."""
    return open_scene(x, data.features, SUBSTRATES, grid=grid)


def given(scene: Scene) -> Scene:
    """What the methods get: zero is kept from them."""
    baselines = {name: scene.baselines[name] for name in GIVEN}
    return Scene(scene.x, scene.layout, scene.names, baselines)


def interval(values: np.ndarray) -> list[float]:
    """95 % bootstrap interval of a mean over images."""
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    return [round(float(v), 4) for v in np.percentile(values[draws].mean(1), (2.5, 97.5))]


def minimal_row(engine: Engine, scene: Scene, order: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Sufficient and necessary sets of all images."""
    row: dict[str, Any] = {"what": "minimal sets", "n": len(order)}
    for kind in ("sufficient", "necessary"):
        found = minimal_sets(engine, scene, order, kind=kind, baseline="mean", classes=classes)
        there = [one for one in found if one.found]
        row |= {
            f"{kind}_found": len(there),
            f"{kind}_verified_pct": 100 * sum(one.verified for one in there) / max(1, len(there)),
            f"{kind}_minimal_pct": 100 * sum(one.minimal for one in there) / max(1, len(there)),
            f"{kind}_median_size": float(np.median([len(one.features) for one in there])) if there else None,
            f"{kind}_median_forwards": float(np.median([one.forwards for one in found])),
        }
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--masks", type=int, default=512, help="forwards of each method for an image")
    parser.add_argument("--grid", type=int, default=8)
    parser.add_argument("--points", type=int, default=17, help="points of insertion and deletion curves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--probes", type=int, default=20, help="images for sensitivity and weight randomisation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "attribution.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="captum")
    data = load_data(DataSection(source=f"npz:{args.data}", normalize=NormalizeSection(mean=MEAN, std=STD)), seed=0)
    arch = f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet20"
    model = build_model(ModelSection(arch=arch, weights=args.weights))
    engine = open_engine(trace(model, data.example_input))
    judge = open_engine(trace(model, data.example_input), precision="fp32")
    x, _ = getattr(data, args.split).take(range(args.images))
    classes = engine.answer(x, exact=True).argmax(1).cpu()
    rows, per_image = measure(args, (model, engine, data), judge, x, classes)
    rows += [row for substrate in (*GIVEN, "both") for row in compare(per_image[substrate], substrate)]
    scene = scene_of(data, x[:200], args.grid)
    order = METHODS["surrogate"](model, engine, given(scene), classes[:200], args.masks, 0)
    rows.append(minimal_row(engine, scene, order, data.classes))
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/attribution.py", *shown])
    content = {"schema": 1, "machine": machine(), "command": command, "split": args.split, "rows": rows}
    atomic_write_text(args.out, json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(row, flush=True)


def measure(
    args: Any, setting: tuple[nn.Module, Engine, Data], judge: Engine, x: Tensor, classes: Tensor
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """One row for each method; insertion minus deletion of each image by substrate (`both`: mean of the two)."""
    model, engine, data = setting
    stranger = randomised(model)
    strange_engine = open_engine(trace(stranger, data.example_input))
    rows: list[dict[str, Any]] = []
    per_image: dict[str, dict[str, np.ndarray]] = {substrate: {} for substrate in (*GIVEN, "both")}
    for name in args.methods:
        method, seeds = METHODS[name], args.seeds if name in SEEDED else args.seeds[:1]
        areas: list[dict[str, Tensor]] = []
        extras, seconds = [], 0.0
        for seed in seeds:
            start, chunks = time.perf_counter(), range(0, len(x), 50)
            scenes = [scene_of(data, x[at : at + 50], args.grid) for at in chunks]
            scores = [
                method(model, engine, given(scene), classes[at : at + 50], args.masks, seed)
                for at, scene in zip(chunks, scenes, strict=True)
            ]
            seconds += time.perf_counter() - start
            parts = [
                curve_areas(judge, scene, score, classes[at : at + 50], args.points)
                for at, scene, score in zip(chunks, scenes, scores, strict=True)
            ]
            areas.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
            faith = [
                faithfulness(judge, s, v, classes[at : at + 50])
                for at, s, v in zip(chunks, scenes, scores, strict=True)
            ]
            extras.append([float(torch.cat([one[i] for one in faith]).mean()) for i in range(2)])
        mean = {key: torch.stack([one[key] for one in areas]).mean(0).double().numpy() for key in areas[0]}
        gain = {s: mean[f"insertion {s}"] - mean[f"deletion {s}"] for s in SUBSTRATES}
        for substrate in GIVEN:
            per_image[substrate][name] = gain[substrate]
        both = per_image["both"][name] = (gain["mean"] + gain["blur"]) / 2
        few, few_classes = x[: args.probes], classes[: args.probes]
        own = method(model, engine, given(scene_of(data, few, args.grid)), few_classes, args.masks, 0)
        other = method(stranger, strange_engine, given(scene_of(data, few, args.grid)), few_classes, args.masks, 0)
        alike = [spearmanr(a, b).statistic for a, b in zip(own, other, strict=True) if a.std() > 0 and b.std() > 0]
        rows.append(
            {
                "method": name,
                "n": len(x),
                "seeds": list(seeds),
                "forwards": forwards(name, scenes[0], args.masks),
                **{key: round(float(value.mean()), 4) for key, value in mean.items()},
                **{f"gain {s}": round(float(value.mean()), 4) for s, value in gain.items()},
                "gain": round(float(both.mean()), 4),
                "gain_ci": interval(both),
                "faithfulness_correlation": round(float(np.mean([e[0] for e in extras])), 4),
                "infidelity": round(float(np.mean([e[1] for e in extras])), 4),
                "sensitivity_max": round(sensitivity(method, setting, few, few_classes, args), 4),
                "weight_randomisation_rho": round(float(np.mean(alike)), 4) if alike else None,
                "probes": len(few),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows, per_image


def compare(gains: dict[str, np.ndarray], substrate: str) -> list[dict[str, Any]]:
    """Ours minus each other method on one substrate, paired over images.

    Args:
        gains: Method -> insertion minus deletion of each image.
        substrate: What is written beside it.
    """
    rows = []
    for name, values in gains.items():
        if name != "surrogate" and "surrogate" in gains:
            gap = gains["surrogate"] - values
            row = {
                "what": "surrogate minus",
                "method": name,
                "substrate": substrate,
                "n": len(gap),
                "gain_difference": round(float(gap.mean()), 4),
            }
            rows.append({**row, "gain_difference_ci": interval(gap), "peer": name in PEERS})
    return rows


if __name__ == "__main__":
    main()
