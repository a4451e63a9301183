"""Effects whose values are computed by hand."""

import math

import pytest
import torch

from causal_compress.understand.effect import FeatureSums, Moments, effect_terms, units


def test_effect_of_moving_one_of_two_units() -> None:
    # P goes from (1/2, 1/2) to (3/4, 1/4); the mean absolute change over units is ln(3) / 2
    ace, kl = effect_terms(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]))
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl.item() == pytest.approx(wanted, rel=1e-6)
    assert ace.item() == pytest.approx(wanted * math.log(3) / 2, rel=1e-6)


def test_no_change_has_no_effect() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert [term.tolist() for term in effect_terms(x, x)] == [[0.0] * 5] * 2


def test_large_logits_stay_finite() -> None:
    ace, kl = effect_terms(torch.tensor([[0.0, 1e5]]), torch.tensor([[1e5, 0.0]]))
    assert kl.item() == pytest.approx(1e5)
    assert math.isfinite(ace.item())


def test_units_are_channels_wherever_they_fire() -> None:
    maps = torch.arange(8.0).view(1, 2, 2, 2)
    assert units(maps).tolist() == [[1.5, 5.5]]
    assert units(maps.flatten(2).transpose(1, 2)).tolist() == [[1.5, 5.5]]
    assert units(torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]


def test_streamed_moments_equal_those_of_all_inputs() -> None:
    values = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments.zeros(3, torch.device("cpu"))
    for part in values.split(16, dim=1):
        moments.add(part)
    assert moments.mean() == pytest.approx(values.mean(1).tolist())
    assert moments.stderr() == pytest.approx((values.std(1) / math.sqrt(50)).tolist())


def test_feature_mean_is_over_the_masks_that_contain_it() -> None:
    sums = FeatureSums.zeros(3, torch.device("cpu"))
    # two inputs, two interventions each: feature 0 is masked with effects 1, 3 and 5, feature 1 with 7, feature 2 never
    masks = torch.tensor([[[True, False, False], [True, False, False]], [[True, False, False], [False, True, False]]])
    sums.add(masks, torch.tensor([[1.0, 5.0], [3.0, 7.0]], dtype=torch.float64))
    assert sums.mean() == [3.0, 7.0, pytest.approx(math.nan, nan_ok=True)]
    # residuals of the inputs' sums: (1 + 3) - 2 * 3 = -2 and 5 - 1 * 3 = 2, over 3 masks
    assert sums.stderr()[:2] == pytest.approx([math.sqrt(8) / 3, 0.0])
