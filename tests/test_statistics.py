"""Intervals and tests, by hand and against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_compress.errors import DataError
from causal_compress.understand.statistics import paired_drop, ratio_of_medians, wilson


def test_wilson_by_hand():
    # 8 of 10: centre (0.8 + z^2/20) / (1 + z^2/10), z = 1.959964
    accuracy = wilson(8, 10)
    assert accuracy.pct == 80.0
    assert accuracy.n == 10
    assert accuracy.low_pct == pytest.approx(49.016, abs=1e-3)
    assert accuracy.high_pct == pytest.approx(94.332, abs=1e-3)


def test_wilson_refuses_what_is_no_share():
    for correct, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError):
            wilson(correct, n)


def test_paired_drop_by_hand():
    # 8 and 3 discordant of 100: centre 5/102 = 4.902 pp, variance (12 - 25/102) / 102^2, half width 6.588 pp
    drop, (low, high) = paired_drop(8, 3, 100)
    assert drop == 5.0
    assert low == pytest.approx(-1.686, abs=1e-3)
    assert high == pytest.approx(11.490, abs=1e-3)


def test_no_discordant_pair_still_has_an_interval():
    drop, (low, high) = paired_drop(0, 0, 100)
    assert drop == 0.0
    assert low == pytest.approx(-1.9216, abs=1e-3)  # 1.96 * sqrt(1) / 102
    assert high == -low


@given(st.integers(0, 50), st.integers(0, 50), st.integers(100, 5000))
def test_swapping_the_models_mirrors_the_interval(a, b, n):
    drop, (low, high) = paired_drop(a, b, n)
    mirrored, (mirrored_low, mirrored_high) = paired_drop(b, a, n)
    assert (mirrored, mirrored_low, mirrored_high) == pytest.approx((-drop, -high, -low))
    assert low < high


def test_paired_interval_covers_the_truth_about_95_percent():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(500, [0.05, 0.03, 0.92], size=1000)
    covered = [low <= 2.0 <= high for low, high in (paired_drop(int(a), int(b), 500)[1] for a, b, _ in counts)]
    assert 0.92 < np.mean(covered) < 0.98


def test_paired_drop_refuses_impossible_counts():
    for counts in ((1, 1, 1), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(DataError):
            paired_drop(*counts)


def test_ratio_of_medians_sees_a_real_difference_through_shared_disturbance():
    rng = np.random.default_rng(1)
    disturbance = rng.lognormal(0, 0.5, 100)
    slow, fast = 2 * disturbance * rng.normal(1, 0.02, 100), disturbance * rng.normal(1, 0.02, 100)
    ratio, (low, high) = ratio_of_medians(slow, fast)
    assert ratio == pytest.approx(2.0, rel=0.05)
    assert 1.8 < low < 2.0 < high < 2.2
    assert ratio_of_medians(slow, fast) == (ratio, (low, high))


def test_ratio_of_medians_of_equal_models_contains_one():
    rng = np.random.default_rng(2)
    _, (low, high) = ratio_of_medians(rng.normal(5, 1, 100), rng.normal(5, 1, 100))
    assert low < 1 < high


def test_ratio_of_medians_refuses_unpaired_rounds():
    for a, b in ((3, 4), (1, 1)):
        with pytest.raises(DataError):
            ratio_of_medians(np.ones(a), np.ones(b))
