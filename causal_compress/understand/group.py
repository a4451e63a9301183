"""Causal nodes: which neighbouring sites are equivalent, at which epsilon, and how sure that is.

Join rule: a run of neighbouring sites is one node when *all* its pairs have CKA >= 1 - epsilon. Several partitions of
the chain can satisfy that, so runs are merged one after the other, always the two neighbours whose union has the
highest smallest CKA. A run's smallest CKA only falls as it grows, so the merges are ordered by epsilon: partitions are
nested, and each one persists on an interval [low, high).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from causal_compress.recipe import GroupSection
from causal_compress.results import Effects, Groups, Partition

Nodes = tuple[tuple[int, ...], ...]
Array = NDArray[np.float64]
Path = list[tuple[float, Nodes]]

_STABLE_ARI = 0.8
_LARGEST_CHOICE = 0.5  # sites that share less than half are not called equivalent, however long a partition persists


def group(effects: Effects, section: GroupSection, *, seed: int) -> Groups:
    """Join neighbouring sites into causal nodes.

    Args:
        effects: What `intervene` observed.
        section: epsilon and resamples. None: of the partitions that are not trivial (all apart, all together), the one
            that persists longest below epsilon = 0.5, and the middle of that interval.
        seed: Of the bootstrap.

    Returns:
        The chosen partition and the whole path with stability: median and 5th percentile over resamples of the adjusted
        Rand index between the partition and that of the resample, at the middle of its interval (the chosen one: at
        epsilon). `stable`: median >= 0.8. Stability is None, and `stable` False, without resamples or with fewer than
        two sets of inputs to draw from. Nulls are means and maxima of absolute values.

    Source: Hubert & Arabie 1985 (adjusted Rand index).
    Limits: epsilon above 1 is not searched, so sites with CKA <= 0 are never joined.
    """
    cka = np.asarray(effects.cka)
    path = epsilon_path(cka)
    resampled = [epsilon_path(sample) for sample in resampled_ckas(effects, section.bootstraps, seed)]
    partitions = _with_intervals(path, resampled)
    chosen = _choose(partitions, section.epsilon)
    epsilon = section.epsilon or chosen.epsilon_low + _persistence(chosen) / 2
    chosen = _partition(chosen.epsilon_low, chosen.epsilon_high, chosen.nodes, epsilon, resampled)
    null = np.abs(np.asarray(effects.cka_null))
    return Groups(
        sites=tuple(node.site for node in effects.nodes),
        epsilon=epsilon,
        chosen=chosen,
        path=partitions,
        fisher=fisher_segments(cka, len(chosen.nodes)),
        null_cka_mean=float(null.mean()),
        null_cka_max=float(null.max()),
        inputs=effects.inputs,
        stable=chosen.stability_ari is not None and chosen.stability_ari >= _STABLE_ARI,
    )


def epsilon_path(cka: Float[NDArray[np.float64], "sites sites"]) -> Path:
    """All partitions that epsilon in [0, 1] runs through, from all sites apart to few nodes.

    Args:
        cka: Symmetric.

    Returns:
        (smallest epsilon, nodes) of each partition; epsilon rises and starts with 0. Partitions that persist on no
        interval are left out.
    """
    spread = run_spreads(cka)
    starts = list(range(len(cka)))
    path: Path = [(0.0, _nodes(starts, len(cka)))]
    while len(starts) > 1:
        ends = [*starts[2:], len(cka)]
        spreads = [spread[first, end - 1] for first, end in zip(starts[:-1], ends, strict=True)]
        best = int(np.argmin(spreads))
        epsilon = max(float(spreads[best]), 0.0)
        if epsilon >= 1:
            break
        del starts[best + 1]
        if path[-1][0] == epsilon:
            path.pop()
        path.append((epsilon, _nodes(starts, len(cka))))
    return path


def run_spreads(cka: Float[NDArray[np.float64], "sites sites"]) -> Float[NDArray[np.float64], "sites sites"]:
    """The smallest epsilon at which sites i..j can be one node: 1 - their pairs' smallest CKA, at [i, j], i <= j."""
    spread = 1 - cka
    np.fill_diagonal(spread, 0)
    for length in range(1, len(cka)):
        for first in range(len(cka) - length):
            last = first + length
            inner = max(spread[first, last - 1], spread[first + 1, last])
            spread[first, last] = max(spread[first, last], inner)
    return spread


def _nodes(starts: Sequence[int], sites: int) -> Nodes:
    return tuple(tuple(range(first, end)) for first, end in zip(starts, [*starts[1:], sites], strict=True))


def nodes_at(path: Path, epsilon: float) -> Nodes:
    """The partition of a path that holds at an epsilon."""
    return [nodes for low, nodes in path if low <= epsilon][-1]


def _with_intervals(path: Path, resampled: list[Path]) -> tuple[Partition, ...]:
    highs = [*(low for low, _ in path[1:]), 1.0]
    return tuple(
        _partition(low, high, nodes, (low + high) / 2, resampled)
        for (low, nodes), high in zip(path, highs, strict=True)
    )


def _partition(low: float, high: float, nodes: Nodes, epsilon: float, resampled: list[Path]) -> Partition:
    from sklearn.metrics import adjusted_rand_score  # loads slowly, and only this function wants it

    labels = _labels(nodes)
    scores = [adjusted_rand_score(labels, _labels(nodes_at(path, epsilon))) for path in resampled]
    return Partition(
        epsilon_low=low,
        epsilon_high=high,
        nodes=nodes,
        stability_ari=float(np.median(scores)) if scores else None,
        stability_low=float(np.percentile(scores, 5)) if scores else None,
    )


def _labels(nodes: Nodes) -> list[int]:
    return [number for number, node in enumerate(nodes) for _ in node]


def _choose(partitions: tuple[Partition, ...], epsilon: float | None) -> Partition:
    if epsilon is not None:
        return next(p for p in reversed(partitions) if p.epsilon_low <= epsilon)
    sites = sum(len(node) for node in partitions[0].nodes)
    useful = [p for p in partitions if 1 < len(p.nodes) < sites and _persistence(p) > 0]
    return max(useful or partitions, key=_persistence)


def _persistence(partition: Partition) -> float:
    """Length of the partition's interval below the largest epsilon that may be chosen."""
    return min(partition.epsilon_high, _LARGEST_CHOICE) - partition.epsilon_low


def resampled_ckas(effects: Effects, bootstraps: int, seed: int) -> list[Array]:
    """CKA matrices of bootstrap resamples over inputs.

    Args:
        effects: Its HSIC sums over disjoint sets of inputs are drawn with replacement.
        bootstraps: Number of resamples.
        seed: Of the draws.

    Returns:
        One matrix for each resample; none where there are fewer than two sets to draw from.

    Limits: the sets hold 64 inputs or more each, so with few inputs the resamples are few different ones.
    """
    bins = np.asarray(effects.hsic_bins)
    if len(bins) < 2:
        return []
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(bins), np.full(len(bins), 1 / len(bins)), size=bootstraps)
    return [_cka(np.tensordot(count, bins, axes=1)) for count in counts]


def _cka(products: Array) -> Array:
    roots = np.sqrt(np.clip(products.diagonal(), 0, None))
    scale = np.outer(roots, roots)
    cka: Array = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return cka


def same_node_shares(effects: Effects, epsilon: float, *, bootstraps: int = 50, seed: int = 0) -> Array | None:
    """For all runs of sites i..j, the share of bootstrap resamples in which they are in one causal node.

    Args:
        effects: What `intervene` observed.
        epsilon: At which resamples are partitioned.
        bootstraps: Number of resamples.
        seed: Of the bootstrap.

    Returns:
        Shares at [i, j], i <= j (and mirrored); None where there is nothing to resample.
    """
    samples = resampled_ckas(effects, bootstraps, seed)
    if not samples:
        return None
    labels = np.array([_labels(nodes_at(epsilon_path(sample), epsilon)) for sample in samples])
    shares: Array = (labels[:, :, None] == labels[:, None, :]).mean(0)
    return shares


def same_node_share(effects: Effects, epsilon: float, i: int, j: int) -> float | None:
    """Share of 50 bootstrap resamples in which sites i..j are in one causal node; None: nothing to resample.

    Args:
        effects: What `intervene` observed.
        epsilon: At which resamples are partitioned.
        i: First site, from 0.
        j: Last site, included.
    """
    shares = same_node_shares(effects, epsilon)
    return None if shares is None else float(shares[i, j])


def fisher_segments(cka: Float[NDArray[np.float64], "sites sites"], count: int) -> Nodes:
    """Cut the chain into segments with the least sum of squares within, exactly, by dynamic programming.

    With each site a unit vector whose inner products are the CKA, a segment's sum of squared distances from its mean is
    the sum over its pairs of 2 (1 - CKA), divided by its length.

    Args:
        cka: Symmetric.
        count: Number of segments, 1 to the number of sites.

    Source: Fisher 1958, "On grouping for maximum homogeneity", JASA 53.
    """
    sites = len(cka)
    cost = _segment_costs(cka)
    best = np.full((count + 1, sites + 1), np.inf)
    best[0, 0] = 0
    cut = np.zeros((count + 1, sites + 1), dtype=int)
    for segments in range(1, count + 1):
        for end in range(segments, sites + 1):
            totals = best[segments - 1, :end] + cost[:end, end - 1]
            cut[segments, end] = int(np.argmin(totals))
            best[segments, end] = totals[cut[segments, end]]
    starts, end = [], sites
    for segments in range(count, 0, -1):
        end = int(cut[segments, end])
        starts.append(end)
    return _nodes(starts[::-1], sites)


def _segment_costs(cka: Array) -> Array:
    """Within-segment sum of squares of sites i..j at [i, j], i <= j."""
    sites = len(cka)
    distance = 1 - cka
    np.fill_diagonal(distance, 0)
    pairs = np.zeros((sites, sites))
    for first in range(sites):
        inside = np.triu(distance[first:, first:], 1).sum(0).cumsum()
        pairs[first, first:] = 2 * inside / np.arange(1, sites - first + 1)
    return pairs
