"""Causal nodes of chains whose similarity is written down by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_compress.recipe import GroupSection
from causal_compress.results import Chain, Effects, NodeEffect
from causal_compress.understand.group import (
    epsilon_path,
    fisher_segments,
    group,
    nodes_at,
    run_spreads,
    same_node_share,
    same_node_shares,
)

# sites 0 and 1 are nearly equal, so are 2 and 3; the two pairs share little
TWO_PAIRS = np.array([[1, 0.95, 0.3, 0.2], [0.95, 1, 0.4, 0.3], [0.3, 0.4, 1, 0.9], [0.2, 0.3, 0.9, 1]])


def make_effects(cka: np.ndarray, bins: list[np.ndarray]) -> Effects:
    def nested(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, matrix.tolist()))

    return Effects(
        chain=Chain(regions=(), untraced=()),
        nodes=tuple(NodeEffect(site=f"s{i}", ace=0, ace_stderr=0, kl=0, kl_stderr=0) for i in range(len(cka))),
        features=(),
        feature_ace=(),
        feature_ace_stderr=(),
        baselines=("mean",),
        inputs=256,
        interventions=256,
        forwards=512,
        forward_seconds=1,
        analysis_seconds=0.1,
        cka=nested(cka),
        cka_null=nested(np.full_like(cka, -0.01)),
        hsic_bins=tuple(map(nested, bins)),
    )


def random_cka(sites: int, seed: int) -> np.ndarray:
    factors = np.random.default_rng(seed).normal(size=(sites, sites)) * 0.5
    factors = factors.cumsum(0)  # neighbours resemble each other, as in a chain
    factors /= np.linalg.norm(factors, axis=1, keepdims=True)
    return (factors @ factors.T) ** 2


def test_path_of_two_pairs() -> None:
    path = epsilon_path(TWO_PAIRS)
    assert [nodes for _, nodes in path] == [
        ((0,), (1,), (2,), (3,)),
        ((0, 1), (2,), (3,)),
        ((0, 1), (2, 3)),
        ((0, 1, 2, 3),),
    ]
    assert [low for low, _ in path] == pytest.approx([0, 0.05, 0.1, 0.8])


def test_equal_neighbours_are_one_node_from_epsilon_zero() -> None:
    cka = np.array([[1, 1, 0.2], [1, 1, 0.2], [0.2, 0.2, 1]])
    assert epsilon_path(cka)[0] == (0.0, ((0, 1), (2,)))


def test_unrelated_sites_are_never_joined() -> None:
    assert epsilon_path(np.eye(3) - 0.01 * (1 - np.eye(3))) == [(0.0, ((0,), (1,), (2,)))]


def test_sites_apart_on_the_chain_do_not_join_over_an_unlike_one() -> None:
    cka = np.array([[1, 0.1, 0.99], [0.1, 1, 0.1], [0.99, 0.1, 1]])
    assert nodes_at(epsilon_path(cka), 0.5) == ((0,), (1,), (2,))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_partitions_are_nested_contiguous_and_keep_the_join_rule(sites: int, seed: int) -> None:
    cka = random_cka(sites, seed)
    path = epsilon_path(cka)
    lows = [low for low, _ in path]
    assert lows == sorted(set(lows))
    for (_, finer), (low, coarser) in itertools.pairwise([(0.0, tuple((i,) for i in range(sites))), *path]):
        assert list(itertools.chain(*coarser)) == list(range(sites))
        assert all(any(set(node) <= set(other) for other in coarser) for node in finer)
        assert all(cka[i, j] >= 1 - low - 1e-12 for node in coarser for i in node for j in node)


def test_run_spread_is_that_of_the_worst_pair() -> None:
    cka = random_cka(7, 3)
    spread = run_spreads(cka)
    for i, j in itertools.combinations(range(7), 2):
        assert spread[i, j] == pytest.approx(1 - cka[i : j + 1, i : j + 1].min())


def test_chosen_persists_longest_and_is_stable_when_all_inputs_agree() -> None:
    groups = group(make_effects(TWO_PAIRS, [TWO_PAIRS] * 4), GroupSection(), seed=0)
    assert groups.chosen.nodes == ((0, 1), (2, 3))
    assert groups.epsilon == pytest.approx(0.3)  # between 0.1 and the largest that may be chosen, 0.5
    assert (groups.chosen.epsilon_low, groups.chosen.epsilon_high) == pytest.approx((0.1, 0.8))
    assert (groups.chosen.stability_ari, groups.chosen.stability_low, groups.stable) == (1.0, 1.0, True)
    assert groups.fisher == ((0, 1), (2, 3))
    assert groups.sites == ("s0", "s1", "s2", "s3")
    assert (groups.null_cka_mean, groups.null_cka_max) == pytest.approx((0.01, 0.01))


def test_inputs_that_disagree_are_said_to_be_unstable() -> None:
    # one set of inputs sees the pairs 01|23, the other one 0|12|3, as strongly
    other = np.array([[1, 0.1, 0.1, 0.1], [0.1, 1, 0.99, 0.1], [0.1, 0.99, 1, 0.1], [0.1, 0.1, 0.1, 1]])
    pairs = np.array([[1, 0.99, 0.1, 0.1], [0.99, 1, 0.1, 0.1], [0.1, 0.1, 1, 0.99], [0.1, 0.1, 0.99, 1]])
    groups = group(make_effects(pairs, [pairs, other]), GroupSection(epsilon=0.3), seed=0)
    assert groups.chosen.nodes == ((0, 1), (2, 3))
    assert not groups.stable


@pytest.mark.parametrize(("bins", "bootstraps"), [([TWO_PAIRS], 50), ([TWO_PAIRS] * 4, 0)])
def test_stability_is_unknown_where_nothing_can_be_resampled(bins: list[np.ndarray], bootstraps: int) -> None:
    groups = group(make_effects(TWO_PAIRS, bins), GroupSection(bootstraps=bootstraps), seed=0)
    assert (groups.chosen.stability_ari, groups.stable) == (None, False)


def test_given_epsilon_is_used() -> None:
    groups = group(make_effects(TWO_PAIRS, [TWO_PAIRS] * 2), GroupSection(epsilon=0.07), seed=0)
    assert groups.epsilon == 0.07
    assert groups.chosen.nodes == ((0, 1), (2,), (3,))


@pytest.mark.parametrize("sites", [1, 2])
def test_short_chains_have_only_trivial_partitions(sites: int) -> None:
    cka = TWO_PAIRS[:sites, :sites]
    groups = group(make_effects(cka, [cka] * 2), GroupSection(), seed=0)
    assert groups.chosen.nodes == (tuple(range(sites)),)


def test_share_of_resamples_in_one_node() -> None:
    effects = make_effects(TWO_PAIRS, [TWO_PAIRS] * 3)
    assert same_node_share(effects, 0.2, 0, 1) == 1.0
    assert same_node_share(effects, 0.2, 1, 2) == 0.0
    assert same_node_share(make_effects(TWO_PAIRS, [TWO_PAIRS]), 0.2, 0, 1) is None


def test_share_follows_how_many_inputs_agree() -> None:
    # sites are alike on one of two sets of inputs: alike in all of a resample in 1/4 of cases, CKA 0.5 in 1/2
    alike, apart = np.ones((2, 2)), np.eye(2)
    effects = make_effects(np.array([[1, 0.5], [0.5, 1]]), [alike, apart])
    shares = same_node_shares(effects, 0.3, bootstraps=2000, seed=1)
    assert shares is not None
    assert shares[0, 1] == pytest.approx(0.25, abs=0.03)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.data())
def test_fisher_is_the_best_of_all_segmentations(sites: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sites))
    cka = random_cka(sites, data.draw(st.integers(0, 1000)))

    def cost(nodes: tuple[tuple[int, ...], ...]) -> float:
        return sum(2 * (1 - cka[i, j]) / len(n) for n in nodes for i, j in itertools.combinations(n, 2))

    def segments(cuts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise((0, *cuts, sites)))

    best = min(cost(segments(cuts)) for cuts in itertools.combinations(range(1, sites), count - 1))
    found = fisher_segments(cka, count)
    assert len(found) == count
    assert cost(found) == pytest.approx(best)
