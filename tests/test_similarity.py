"""CKA: known answers, invariances, and agreement with estimators written in another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_compress.errors import DataError, NumericalError
from causal_compress.understand.similarity import (
    HsicSums,
    cka_from_products,
    debiased_cka,
    gram_matrix,
    hsic_products,
    linear_cka,
    u_centre,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    trace = np.trace(k @ m)
    means = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return float((trace + means - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3)))


def reference_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    k, m = (np.asarray(a.double() @ a.double().T) for a in (x, y))
    return reference_hsic(k, m) / np.sqrt(reference_hsic(k, k) * reference_hsic(m, m))


@pytest.mark.parametrize("width", [4096, 16384])
def test_independent_features_read_zero(width: int) -> None:
    # one reading at n = 256 has a standard deviation of 0.0055, whatever the width: 1 / sqrt(256 * 255 / 2)
    readings = [debiased_cka(gaussian(256, width, seed=s), gaussian(256, width, seed=100 + s)) for s in range(8)]
    assert abs(np.mean(readings)) < 0.01
    assert max(map(abs, readings)) < 0.025


def test_equals_the_estimator_of_song_et_al() -> None:
    x = gaussian(40, 12) + 3
    y = x[:, :7] * 2 + gaussian(40, 7, seed=5)
    assert debiased_cka(x, y) == pytest.approx(reference_cka(x, y), abs=1e-6)


def test_hsic_of_four_samples_by_hand() -> None:
    # off the diagonal only 1-2 and 3-4 are 1. U-centring leaves 1/3 * 2 there and -1/3 elsewhere:
    # rows sum to 1, T = 4, so 1 - 1/2 - 1/2 + 4/6 = 2/3 and 0 - 1 + 4/6 = -1/3
    gram = torch.tensor([[9.0, 1, 0, 0], [1, 9, 0, 0], [0, 0, 9, 1], [0, 0, 1, 9]])
    centred = u_centre(gram[None])
    assert centred[0, 0].tolist() == pytest.approx([0, 2 / 3, -1 / 3, -1 / 3])
    assert hsic_products(centred).item() == pytest.approx((4 * 4 / 9 + 8 / 9) / (4 * 1))


def test_same_up_to_rotation_and_scale_reads_one() -> None:
    x = gaussian(64, 10)
    rotation = torch.linalg.qr(gaussian(10, 10, seed=3))[0]
    assert debiased_cka(x, -7 * x @ rotation + 100) == pytest.approx(1, abs=1e-5)


def test_large_mean_does_not_drown_small_spread() -> None:
    x = gaussian(64, 10)
    assert debiased_cka(x, x + 3000) == pytest.approx(1, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(5, 30), st.integers(1, 20), st.integers(1, 20), st.integers(0, 10_000))
def test_symmetric_bounded_and_blind_to_the_order_of_samples(n: int, p: int, q: int, seed: int) -> None:
    x, y = gaussian(n, p, seed=seed), gaussian(n, q, seed=seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    value = debiased_cka(x, y)
    assert value == pytest.approx(debiased_cka(y, x), abs=1e-5)
    assert value == pytest.approx(debiased_cka(x[order], y[order]), abs=1e-4)
    assert -1.00001 <= value <= 1.00001


def test_flattens_maps_and_leaves_its_input_alone() -> None:
    x = gaussian(20, 3, 4, 4)
    before = x.clone()
    assert linear_cka(x, x.flatten(1)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mean", [1, 1000])
def test_gram_of_many_rows_is_that_of_a_plain_product(mean: float) -> None:
    x = gaussian(300, 900) + mean  # more rows than are multiplied at a time; with and without the mean taken off
    gram = gram_matrix(x)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(u_centre(gram), u_centre(x.double() @ x.double().T), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (gaussian(3, 2), gaussian(3, 2), DataError, "more samples"),
        (gaussian(8, 2), gaussian(9, 2), DataError, "8 and 9 rows"),
        (gaussian(8, 2), torch.full((8, 2), 0.1), DataError, "constant"),
        (gaussian(8, 2), torch.full((8, 2), torch.nan), NumericalError, "NaN"),
        (gaussian(8, 2), torch.full((8, 2), torch.inf), NumericalError, "infinity"),
    ],
)
def test_refuses(x: torch.Tensor, y: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        debiased_cka(x, y)


def test_a_constant_site_counts_as_unrelated() -> None:
    products = hsic_products(u_centre(torch.stack([gram_matrix(torch.ones(8, 3)), gram_matrix(gaussian(8, 3))])))
    assert cka_from_products(products).tolist() == [[0, 0], [0, pytest.approx(1)]]


def test_sums_over_batches_are_divided_once() -> None:
    batches = [(gaussian(n, 6, seed=n), gaussian(n, 6, seed=n) + gaussian(n, 6, seed=n + 1)) for n in (40, 24)]
    sums = HsicSums.zeros(2, torch.device("cpu"))
    for x, y in batches:
        sums.add([torch.stack([gram_matrix(x), gram_matrix(y)])], torch.Generator())
    grams = [[np.asarray(a.double() @ a.double().T) for a in pair] for pair in batches]
    cross, first, second = (
        sum(len(pair[0]) * reference_hsic(pair[i], pair[j]) for pair in grams) for i, j in ((0, 1), (0, 0), (1, 1))
    )
    assert sums.cka()[0, 1].item() == pytest.approx(cross / np.sqrt(first * second), abs=1e-6)


def test_bins_are_blocks_of_inputs_and_their_number_is_bounded() -> None:
    x = gaussian(256, 5)
    sums = HsicSums.zeros(1, torch.device("cpu"))
    sums.add([gram_matrix(x)[None]], torch.Generator())
    k = np.asarray(x.double() @ x.double().T)
    wanted = [64 * reference_hsic(k[s : s + 64, s : s + 64], k[s : s + 64, s : s + 64]) for s in (0, 64, 128, 192)]
    assert sums.used_bins().flatten().tolist() == pytest.approx(wanted, rel=1e-5)
    for _ in range(9):
        sums.add([gram_matrix(x)[None]], torch.Generator())
    assert sums.used_bins().shape == (32, 1, 1)


def test_null_of_equal_sites_is_about_zero() -> None:
    x = gaussian(256, 20)
    sums = HsicSums.zeros(2, torch.device("cpu"))
    sums.add([gram_matrix(x).expand(2, -1, -1)], torch.Generator().manual_seed(0))
    assert sums.cka()[0, 1].item() == pytest.approx(1)
    assert sums.null_cka().abs().max().item() < 0.05
