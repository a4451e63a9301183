"""From a recipe to the network that is understood: built, traced, and folded where that is exact."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import partial

from causal_compress.inputs.data import Data
from causal_compress.inputs.models import build_model
from causal_compress.recipe import PlanSection, Recipe
from causal_compress.understand.algebra import simplify
from causal_compress.understand.trace import HEAVY, Network, Region, trace


def open_network(recipe: Recipe, data: Data) -> Network:
    """The recipe's network with its weights.

    Args:
        recipe: Names architecture and checkpoint.
        data: Says how many classes there are and whether channels are copies.
    """
    network = trace(build_model(recipe.model, classes=len(data.classes)), data.example_input)
    return simplify(network, repeated=data.copied_channels, allowed=partial(is_allowed, section=recipe.plan))


def is_allowed(name: str, section: PlanSection) -> bool:
    """Whether include and exclude patterns let a module change; a pattern also speaks for all inside what it names."""
    return _is_named(name, section.include) and not is_excluded(name, section)


def is_excluded(name: str, section: PlanSection) -> bool:
    """Whether a module has to stay, itself or with what it is inside of."""
    return _is_named(name, section.exclude)


def may_be_merged(region: Region, section: PlanSection) -> bool:
    """Whether all layers of a region may change, and nothing in it has to stay."""
    modules = dict(region.module.named_modules())
    layers = [name for name in region.info.modules if isinstance(modules.get(name), HEAVY)]
    allowed = all(is_allowed(name, section) for name in layers or [region.info.name])
    return allowed and not any(is_excluded(name, section) for name in region.info.modules)


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split(".")
    around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatch(module, pattern) for module in around for pattern in patterns)
