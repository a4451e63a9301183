"""From a recipe to the network that is understood: built, traced, and folded where that is exact."""

from __future__ import annotations

import fnmatch
from functools import partial

from causal_compress.inputs.data import Data
from causal_compress.inputs.models import build_model
from causal_compress.recipe import PlanSection, Recipe
from causal_compress.understand.algebra import simplify
from causal_compress.understand.trace import Network, trace


def open_network(recipe: Recipe, data: Data) -> Network:
    """The recipe's network with its weights.

    Args:
        recipe: Names architecture and checkpoint.
        data: Says how many classes there are and whether channels are copies.
    """
    network = trace(build_model(recipe.model, classes=len(data.classes)), data.example_input)
    return simplify(network, repeated=data.copied_channels, allowed=partial(is_allowed, section=recipe.plan))


def is_allowed(name: str, section: PlanSection) -> bool:
    """Whether include and exclude patterns let a module change."""
    included = any(fnmatch.fnmatch(name, pattern) for pattern in section.include)
    return included and not any(fnmatch.fnmatch(name, pattern) for pattern in section.exclude)
