"""From a recipe to the network that is understood: built, traced, and folded where that is exact."""

from __future__ import annotations

from causal_compress.inputs.data import Data
from causal_compress.inputs.models import build_model
from causal_compress.recipe import Recipe
from causal_compress.understand.algebra import simplify
from causal_compress.understand.trace import Network, trace


def open_network(recipe: Recipe, data: Data) -> Network:
    """The recipe's network with its weights.

    Args:
        recipe: Names architecture and checkpoint.
        data: Says how many classes there are and whether channels are copies.
    """
    network = trace(build_model(recipe.model, classes=len(data.classes)), data.example_input)
    return simplify(network, repeated=data.copied_channels)
