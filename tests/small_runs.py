"""Quick teachers on scikit-learn's data, and recipes that take them the whole way in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.pipeline import analyze
from causal_compress.recipe import Recipe
from causal_compress.results import Candidates, Effects, Groups
from causal_compress.runs import read_result
from causal_compress.understand.trace import Network, trace

MLP = f"{Path(__file__).resolve().parents[1] / 'examples' / 'mlp.py'}:mlp"

_DIGITS: dict[str, Any] = {
    "model": {"arch": "causal_compress.demo:digits_net", "args": {"width": 8, "blocks": 2}},
    "data": {
        "source": "sklearn:digits",
        "normalize": {"mean": [0.305], "std": [0.376]},
        "calibration": 256,
        "validation": 200,
        "test_share": 0.3,
    },
    "budget": {"macs": 0.5, "max_accuracy_drop": 50.0},
    "intervene": {"inputs": 256, "batch_size": 128, "masks": 1},
    "group": {"bootstraps": 5},
    "plan": {"inputs": 128, "heldout": 64, "max_span": 2, "widths": [0.75, 0.5, 0.25]},
    "distill": {"epochs": 1, "batch_size": 64},
    "benchmark": {"batches": [1], "repeats": 10, "seconds": 0.1},
    "threads": 1,
}
_TABLE: dict[str, Any] = {
    "model": {"arch": MLP, "args": {"inputs": 30, "hidden": [64, 32]}},
    "data": {"source": "sklearn:breast_cancer", "calibration": 150, "validation": 80},
    "budget": {"params": 0.1, "max_accuracy_drop": 20.0},
    "intervene": {"batch_size": 64},
    "group": {"bootstraps": 5},
    "plan": {"inputs": 100, "heldout": 64, "min_channels": 2},
    "distill": {"epochs": 5, "batch_size": 64, "learning_rate": 0.02},
    "benchmark": {"runtimes": ["torch"], "batches": [1], "repeats": 10, "seconds": 0.1},
    "threads": 1,
}


def digits_recipe(weights: Path | None, **sections: Any) -> Recipe:
    """A residual network on digits; given sections are laid over the usual ones, None removes one."""
    return _recipe(_DIGITS, weights, sections)


def table_recipe(weights: Path | None, **sections: Any) -> Recipe:
    """A perceptron on a table."""
    return _recipe(_TABLE, weights, sections)


def _recipe(base: dict[str, Any], weights: Path | None, sections: dict[str, Any]) -> Recipe:
    values = dict(base)
    for name, section in sections.items():
        values[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    values["model"] = {**values["model"], "weights": None if weights is None else str(weights)}
    return Recipe.model_validate(values)


def analysed(weights: Path, folder: Path) -> tuple[Network, Candidates, Effects, Groups]:
    """The network on digits, traced, and what an analysis measures of it."""
    recipe = digits_recipe(weights)
    analyze(recipe, folder)
    network = trace(build_model(recipe.model), load_data(recipe.data, seed=0).example_input)
    found = read_result(folder, "candidates", Candidates), read_result(folder, "intervene", Effects)
    return network, *found, read_result(folder, "group", Groups)


def train(recipe: Recipe, weights: Path, epochs: int = 4) -> Path:
    """Train the recipe's architecture on its data for a moment, and write the weights."""
    data = load_data(recipe.data, seed=recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(recipe.model.model_copy(update={"weights": None})).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(epochs):
        for x, y in data.train.batches(32, shuffle_seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    save_file(model.state_dict(), weights)
    return weights
