"""Ranges of activations: what a histogram counts, and what each method keeps of it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_compress.deploy.calibration import Histogram, activation_range, entropy_threshold
from causal_compress.errors import NumericalError


def test_a_histogram_counts_by_hand():
    histogram = Histogram()
    histogram.add(np.zeros((2, 3), np.float32))
    assert (histogram.low, histogram.high, histogram.counts.sum()) == (0, 0, 0)
    histogram.add(np.array([-1.0, 0.5, 1.0], np.float32))
    assert (histogram.low, histogram.high, histogram.limit) == (-1, 1, 1)
    assert np.flatnonzero(histogram.counts).tolist() == [0, 3072, 4095]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), min_size=1, max_size=4))
def test_growing_bins_count_as_if_the_limit_had_been_known(batches):
    grown = Histogram()
    for batch in batches:
        grown.add(np.array(batch, np.float32))
    known = Histogram(limit=grown.limit)
    for batch in batches:
        known.add(np.array(batch, np.float32))
    if grown.limit > 0 and np.any(np.array(batches[0], np.float32)):
        # a value on the edge of a bin may fall to either side of it
        assert np.abs(np.cumsum(grown.counts - known.counts)).sum() <= sum(map(len, batches))
        assert grown.counts.sum() == known.counts.sum()


@pytest.mark.parametrize("width", [32, 49])
def test_the_histogram_samples_every_column_of_a_map(width):
    values = np.tile(
        np.arange(1, width + 1, dtype=np.float32), 2**17
    )  # so many rows that every width-th value is taken
    histogram = Histogram()
    histogram.add(values)
    counts = histogram.counts[histogram.counts > 0]
    assert len(counts) == width
    assert counts.max() < 1.1 * counts.min()


def test_nan_in_an_activation_is_refused():
    with pytest.raises(NumericalError, match="not finite"):
        Histogram().add(np.array([1.0, np.nan], np.float32))


@pytest.fixture(scope="module")
def skewed() -> Histogram:
    """Half-normal values, half of them zero, and one outlier."""
    values = np.maximum(np.random.default_rng(0).normal(size=200_000), 0).astype(np.float32)
    values[0] = 10.0
    histogram = Histogram()
    histogram.add(values)
    return histogram


def test_minmax_keeps_the_outlier_percentile_and_entropy_clip_it(skewed):
    kept = {m: activation_range(skewed, m, percentile=99.99, levels=256) for m in ("minmax", "percentile", "entropy")}
    assert kept["minmax"] == (0.0, 10.0)
    assert kept["percentile"][0] == kept["entropy"][0] == 0.0
    assert 3.0 < kept["percentile"][1] < 5.0
    assert 3.0 < kept["entropy"][1] < 7.0


def test_entropy_is_not_led_by_zeros(skewed):
    few = dataclasses.replace(skewed, counts=skewed.counts.copy())
    few.counts[2048] = few.counts[2049]
    assert skewed.counts[2048] > 20 * few.counts[2048]
    ranges = [activation_range(one, "entropy", percentile=99, levels=256) for one in (skewed, few)]
    assert ranges[0] == ranges[1]


def test_entropy_keeps_all_of_what_fits_and_of_what_is_flat():
    assert entropy_threshold(np.ones(100, np.int64), 128) == 100
    assert entropy_threshold(np.full(2048, 100), 128) == 2048
    assert entropy_threshold(np.zeros(2048, np.int64), 128) == 0
