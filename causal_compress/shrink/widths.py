"""What can be narrowed, and to how many channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from causal_compress.recipe import PlanSection
from causal_compress.results import Skip
from causal_compress.shrink.channels import ChannelGroup, find_groups
from causal_compress.shrink.repair import inner_groups, too_large
from causal_compress.understand.graph import fetch
from causal_compress.understand.network import is_allowed, is_excluded
from causal_compress.understand.tail import find_tail
from causal_compress.understand.trace import Network


@dataclass(frozen=True)
class Widths:
    """What can be narrowed: groups inside regions by region, and the group of a cut point by the region before it."""

    inner: dict[int, list[ChannelGroup]]
    cuts: dict[int, ChannelGroup]
    skipped: tuple[Skip, ...]


def find_widths(network: Network, section: PlanSection) -> Widths:
    """Which channel groups each region can lose, and which cut points can be narrowed.

    Args:
        network: The teacher.
        section: Include and exclude patterns on module names.
    """
    found, skips = find_groups(network.graph, network.example_input)
    groups, vast = readable(network.graph, found)
    allowed = [group for group in groups if _may_shrink(group, section)]
    refused = [
        Skip(what=f"width of {g.producer}", reason="excluded by plan.include/exclude")
        for g in groups
        if g not in allowed
    ]
    inner = {region.info.index: inner_groups(allowed, region.info.modules) for region in network.regions}
    placed = {group.producer for inside in inner.values() for group in inside}
    cuts: dict[int, ChannelGroup] = {}
    for group in allowed:
        if group.producer in placed:
            continue
        index = _cut_of(network, group)
        if isinstance(index, str):
            refused.append(Skip(what=f"width of {group.producer}", reason=index))
        else:
            cuts[index] = group
    return Widths(inner, cuts, (*skips, *vast, *refused))


def _may_shrink(group: ChannelGroup, section: PlanSection) -> bool:
    written = all(is_allowed(layer, section) for layer in group.writers)
    return written and not any(is_excluded(layer, section) for layer in group.passing)


def readable(graph: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[Skip]]:
    """The groups of which every reader can be refitted, and refusals of the others."""
    fine: list[ChannelGroup] = []
    skips: list[Skip] = []
    for group in groups:
        reasons = {reader.layer: too_large(fetch(graph, reader.layer)) for reader in group.readers}
        refused = [f"it is read by {layer}, whose {reason}" for layer, reason in reasons.items() if reason is not None]
        if refused:
            skips.append(Skip(what=f"width of {group.producer}", reason=refused[0]))
        else:
            fine.append(group)
    return fine, skips


def _cut_of(network: Network, group: ChannelGroup) -> int | str:
    """The region whose output has exactly this group as channels, read by the next region's last layer alone."""
    for before, after in pairwise(network.regions):
        if group.producer not in before.info.modules:
            continue
        tail, next_tail = find_tail(before.module), find_tail(after.module)
        if isinstance(tail, str) or isinstance(next_tail, str):
            break
        inside = {*before.info.modules, *after.info.modules}.issuperset(group.passing)
        alone = group.writers == (tail.affine,) and [reader.layer for reader in group.readers] == [next_tail.affine]
        if alone and inside and tail.skip is None and not tail.undo:
            return before.info.index
        break
    return (
        f"its channels are shared along the chain ({len(group.writers)} writers, "
        f"{len({reader.layer for reader in group.readers})} readers); only groups of one region are narrowed"
    )


def level_counts(channels: Sequence[int], section: PlanSection) -> list[tuple[int, ...]]:
    """Channel counts of some groups at each width of the recipe, aligned; full width is left out."""
    if not channels:
        return []
    levels = [tuple(aligned(count, share, section) for count in channels) for share in section.widths]
    return [counts for counts in dict.fromkeys(levels) if counts != tuple(channels)]


def aligned(channels: int, share: float, section: PlanSection) -> int:
    """The multiple of `align` nearest to a share of channels, at least `min_channels` and at most all."""
    count = max(section.align, round(channels * share / section.align) * section.align)
    least = -(-section.min_channels // section.align) * section.align
    return min(channels, max(count, least))
