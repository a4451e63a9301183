"""Counterfactuals against their controls: validity, an independent oracle's verdict, realism, distance, diversity.

    python benchmarks/counterfactual.py --mnist mnist.npz --nsl-kdd NSL-KDD-FOLDER
    python benchmarks/counterfactual.py --cifar cifar10.npz --resnet20 resnet20.th --oracle resnet56.th
    python benchmarks/counterfactual.py --mnist mnist.npz --inputs 200 --steps 300 --out quick.json      (a quick look)

For MNIST and NSL-KDD the network explained, an oracle of another architecture and seed, and the autoencoders of IM1 and
IM2 are trained here; for CIFAR-10 both networks are public checkpoints. The GAN learns on the training split; all
figures are of test inputs, drawn at random, with random targets. Rows of other data sets that the result file holds
already are kept; each row says by which command and machine it was made.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counterfactual_parts import autoencoders, cnn, mlp, train_classifier
from torch import Tensor, nn

from causal_compress.counterfactual.constraints import violations
from causal_compress.counterfactual.controls import adversarial, gradient_search, nearest_unlike
from causal_compress.counterfactual.explainer import Explainer, find, train_counterfactuals
from causal_compress.counterfactual.folder import DESCRIPTION, load_explainer, save_explainer
from causal_compress.counterfactual.metrics import (
    answers,
    distances,
    diversity_ratio,
    im1,
    im2,
    label_variation,
    latency_ms,
    neighbour_distances,
    plausible_pct,
)
from causal_compress.counterfactual.readable import pixels
from causal_compress.counterfactual.training import other_classes
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import Data, load_data
from causal_compress.inputs.models import build_model
from causal_compress.provenance import machine
from causal_compress.recipe import CounterfactualSection, DataSection, ModelSection
from causal_compress.understand.statistics import wilson
from causal_compress.understand.trace import trace

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "counterfactual.json"
REAL, HELD, EPOCHS, CODER_STEPS = 20_000, 3000, 3, 1500
INPUTS = {"mnist": 2000, "nsl-kdd": 2000, "cifar10": 250}  # controls by gradients through a ResNet are slow
SECTIONS = {
    "mnist": CounterfactualSection(),
    "nsl-kdd": CounterfactualSection(steps=3000, immutable=["column_1"], rises=["column_0"], width=16),
    "cifar10": CounterfactualSection(steps=2000),  # half an hour on one core
}


@dataclass(frozen=True, eq=False)
class Case:
    """One data set: the network explained, an independent oracle, and autoencoders for realism."""

    name: str
    data: Data
    network: nn.Module
    oracle: nn.Module
    coders: list[nn.Module]
    explainer: Explainer
    real: tuple[Tensor, Tensor]


def mnist(path: Path, seed: int, epochs: int) -> tuple[Data, nn.Module, nn.Module]:
    """Data, network and oracle."""
    data = load_data(DataSection(source=f"npz:{path}"), seed=seed)
    torch.manual_seed(seed)
    network = train_classifier(cnn(8, 5), data, seed=seed, epochs=epochs)
    torch.manual_seed(seed + 1000)
    return data, network, train_classifier(cnn(16, 3), data, seed=seed + 1000, epochs=epochs)


def nsl_kdd(folder: Path, seed: int) -> tuple[Data, nn.Module, nn.Module]:
    """Data, network and oracle: normal against attack; the rows' difficulty is no input."""
    section = DataSection(
        source=f"csv:{folder / 'train.csv'}",
        test_source=f"csv:{folder / 'test.csv'}",
        header=False,
        target=41,
        drop=[42],
        categorical=[1, 2, 3],
        target_groups={"normal": ["normal"], "attack": "*"},
    )
    data = load_data(section, seed=seed)
    inputs = data.input_shape[0]
    torch.manual_seed(seed)
    network = train_classifier(mlp(inputs, [128, 64]), data, seed=seed, epochs=15)
    torch.manual_seed(seed + 1000)
    return data, network, train_classifier(mlp(inputs, [256, 64, 32]), data, seed=seed + 1000, epochs=15)


def cifar(path: Path, resnet20: Path, resnet56: Path, seed: int) -> tuple[Data, nn.Module, nn.Module]:
    """Data, network (ResNet-20) and oracle (ResNet-56)."""
    section = DataSection.model_validate(
        {
            "source": f"npz:{path}",
            "normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        }
    )
    arch = ROOT / "examples" / "cifar_resnet.py"
    networks = [
        build_model(ModelSection(arch=f"{arch}:{name}", weights=str(weights))).requires_grad_(False)
        for name, weights in (("resnet20", resnet20), ("resnet56", resnet56))
    ]
    return load_data(section, seed=seed), networks[0], networks[1]


def prepare(name: str, parts: tuple[Data, nn.Module, nn.Module], given: argparse.Namespace) -> Case:
    """Train the GAN and the autoencoders."""
    data, network, oracle = parts
    section = SECTIONS[name].model_copy(update={"steps": given.steps} if given.steps else {})
    traced = trace(network, data.example_input)
    if given.keep and (given.keep / name / DESCRIPTION).exists():
        explainer = load_explainer(given.keep / name, traced)
    else:
        explainer = train_counterfactuals(traced, data, section, seed=given.seed)
        if given.keep:
            save_explainer(explainer, given.keep / name)
    real = data.train.take(range(min(REAL, len(data.train))))
    coders = autoencoders(*real, len(data.classes), steps=given.coder_steps, seed=given.seed)
    print(name, explainer.trained.checks[-1], explainer.trained.warnings, f"{explainer.trained.seconds} s", flush=True)
    return Case(name, data, network, oracle, coders, explainer, real)


Make = Callable[[Tensor, Tensor], Tensor]


def methods(case: Case) -> dict[str, Make]:
    """Ours and the controls, each from inputs and targets to counterfactuals."""
    explainer, network = case.explainer, case.network
    alone = replace(explainer, section=explainer.section.model_copy(update={"refine_steps": 0}))
    answered = answers(network, case.real[0]).argmax(1)
    return {
        "GAN": lambda x, target: find(explainer, x, target).counterfactual,
        "GAN without refinement": lambda x, target: find(alone, x, target).counterfactual,
        "nearest unlike neighbour": partial(nearest_unlike, train=case.real[0], train_answer=answered),
        "gradient search": partial(gradient_search, network, explainer.domain),
        "PGD adversarial": partial(adversarial, network, explainer.domain),
        "PGD adversarial, full strength": partial(adversarial, network, explainer.domain, confidence=1.0),
    }


def rows(case: Case, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each method."""
    order = np.random.default_rng(given.seed).permutation(len(case.data.test))  # a test part may stand class by class
    x, label = case.data.test.take(order[: given.inputs or INPUTS[case.name]])
    original = answers(case.network, x).argmax(1)
    target = other_classes(original, len(case.data.classes), torch.Generator().manual_seed(given.seed))
    held = case.data.test.take(order[-HELD:])
    floor = neighbour_distances(*held, *case.real)
    shared = {
        "data": case.name,
        "seed": given.seed,
        "network_accuracy_pct": _right(case.network, x, label),
        "oracle_accuracy_pct": _right(case.oracle, x, label),
        "training_s": case.explainer.trained.seconds,
        "steps": case.explainer.trained.steps,
        "warnings": list(case.explainer.trained.warnings),
    }
    found = []
    for name, make in methods(case).items():
        measured = score(case, (x, original, target), make, (held, floor))
        found.append({"method": name, **measured, **(shared if name.startswith("GAN") else _few(shared))})
        print(found[-1], flush=True)
    return found


def score(
    case: Case, asked: tuple[Tensor, Tensor, Tensor], make: Make, real: tuple[tuple[Tensor, Tensor], np.ndarray]
) -> dict[str, Any]:
    """All figures of one method."""
    x, original, target = asked
    made = make(x, target)
    held, floor = real
    valid, oracle = (answers(network, made).argmax(1) == target for network in (case.network, case.oracle))
    near = distances(x, made, case.explainer.domain.least)
    neighbours = neighbour_distances(made, target, *case.real)
    coders = case.coders
    realism = torch.stack([im1(made[i : i + 1], coders[t], coders[o])[0] for i, (t, o) in enumerate(_pairs(asked))])
    spread = torch.stack([im2(made[i : i + 1], coders[t], coders[-1])[0] for i, (t, _) in enumerate(_pairs(asked))])
    variation = label_variation(answers(case.oracle, x), answers(case.oracle, made), original, target)
    broken = violations(case.explainer.domain, x, made).flatten(1).any(1)
    return {
        "n": len(x),
        "validity_pct": _pct(valid),
        "validity_ci_pct": _interval(valid),
        "oracle_pct": _pct(oracle),
        "oracle_ci_pct": _interval(oracle),
        "im1": _mean(realism),
        "im1_median": round(float(realism.median()), 3),
        "im2": round(float(spread.mean()), 5),
        "plausible_pct": round(plausible_pct(neighbours, target, floor, held[1]), 2),
        "knn_ratio": round(float(np.median(neighbours) / np.median(floor)), 3),
        "knn_limit_ratio": round(float(np.quantile(floor, 0.95) / np.median(floor)), 3),
        "diversity": round(diversity_ratio(made, target, *held), 3),
        "label_variation": _mean(variation),
        "l1": _mean(near["l1"]),
        "l2": _mean(near["l2"]),
        "l0": _mean(near["l0"]),
        "violations": int(broken.sum()),
        "latency_ms": round(latency_ms(make, x[:256], target[:256], repeats=1), 3),
    }


def gallery(case: Case, path: Path, per_row: int = 10) -> None:
    """A picture: originals in the first column, then the counterfactual towards each class; the input itself where the
    network gives it that class already. A class without a test input has no line.
    """
    from PIL import Image

    classes = len(case.data.classes)
    labels = case.data.test.labels
    first = (torch.nonzero(labels == klass)[:1, 0].tolist() for klass in range(classes))
    chosen = [index for found in first for index in found][:per_row]
    x, _ = case.data.test.take(chosen)
    lines = []
    for one in x.split(1):
        answered = int(answers(case.network, one).argmax())
        others = torch.tensor([klass for klass in range(classes) if klass != answered])
        made = find(case.explainer, one.expand(len(others), *one.shape[1:]), others).counterfactual
        cells = torch.cat([one, made[:answered], one, made[answered:]])
        lines.append(np.concatenate([pixels(case.explainer.domain, cell) for cell in cells], axis=1))
    sheet = np.concatenate(lines, axis=0)
    picture = Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def _pairs(asked: tuple[Tensor, Tensor, Tensor]) -> list[tuple[int, int]]:
    return list(zip(asked[2].tolist(), asked[1].tolist(), strict=True))


def _few(shared: dict[str, Any]) -> dict[str, Any]:
    return {key: shared[key] for key in ("data", "seed")}


def _right(network: nn.Module, x: Tensor, label: Tensor) -> float:
    return _pct(answers(network, x).argmax(1) == label)


def _pct(right: Tensor) -> float:
    return round(100 * float(right.float().mean()), 2)


def _interval(right: Tensor) -> list[float]:
    known = wilson(int(right.sum()), len(right))
    return [round(known.low_pct, 2), round(known.high_pct, 2)]


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), 3)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="npz file")
    parser.add_argument("--nsl-kdd", type=Path, help="folder with train.csv and test.csv")
    parser.add_argument("--cifar", type=Path, help="npz file")
    parser.add_argument("--resnet20", type=Path, help="checkpoint of the network explained, for --cifar")
    parser.add_argument("--oracle", type=Path, help="checkpoint of a ResNet-56, for --cifar")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, help="test inputs; default: 2,000, and 250 with --cifar")
    parser.add_argument("--steps", type=int, help="training steps of the GAN; default: those of the section")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the networks of MNIST")
    parser.add_argument("--coder-steps", type=int, default=CODER_STEPS, help="training steps of each autoencoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder of trained generators: read from it, or written into it")
    parser.add_argument("--gallery", type=Path, help="folder of the pictures; default: docs, or that of --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.cifar and not (given.resnet20 and given.oracle):
        parser.error("--cifar needs --resnet20 and --oracle")
    if not (given.mnist or given.nsl_kdd or given.cifar):
        parser.error("give at least one of --mnist, --nsl-kdd, --cifar")
    if given.out == RESULTS and is_quick(given):
        parser.error("a quick look must not overwrite the measured rows: name another --out")
    given.gallery = given.gallery or (ROOT / "docs" if given.out == RESULTS else given.out.parent)
    return given


def is_quick(given: argparse.Namespace) -> bool:
    """Whether less is measured than for the rows that are kept."""
    asked = {"mnist": given.mnist, "nsl-kdd": given.nsl_kdd, "cifar10": given.cifar}
    steps = max(SECTIONS[name].steps for name, source in asked.items() if source)
    few = given.steps is not None and given.steps < steps
    few |= given.inputs is not None and any(given.inputs < INPUTS[name] for name, source in asked.items() if source)
    return few or given.epochs < EPOCHS or given.coder_steps < CODER_STEPS


def main() -> None:
    """Measure, print and write."""
    given = arguments()
    torch.set_num_threads(given.threads)
    measured: list[dict[str, Any]] = []
    parts: dict[str, Callable[[], tuple[Data, nn.Module, nn.Module]]] = {}
    if given.mnist:
        parts["mnist"] = partial(mnist, given.mnist, given.seed, given.epochs)
    if given.nsl_kdd:
        parts["nsl-kdd"] = partial(nsl_kdd, given.nsl_kdd, given.seed)
    if given.cifar:
        parts["cifar10"] = partial(cifar, given.cifar, given.resnet20, given.oracle, given.seed)
    for name, load in parts.items():
        case = prepare(name, load(), given)
        measured += rows(case, given)
        if case.data.kind == "image":
            gallery(case, given.gallery / f"counterfactuals-{name}.png")
    write(measured, given.out)


def write(measured: list[dict[str, Any]], out: Path) -> None:
    """Write the rows; those of other data sets or seeds in the file stay."""
    shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # paths of one machine help nobody
    source = {"machine": machine(), "command": " ".join(["python benchmarks/counterfactual.py", *shown])}
    kept = []
    if out.exists():
        new = {(row["data"], row["seed"]) for row in measured}
        before = json.loads(out.read_text(encoding="utf-8"))
        old = {key: before[key] for key in source}  # of files whose rows did not say themselves where they come from
        kept = [{**old, **row} for row in before["rows"] if (row["data"], row["seed"]) not in new]
    rows = [*kept, *({**row, **source} for row in measured)]
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps({"schema": 1, **source, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
