"""Metrics and controls of counterfactuals on inputs whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from causal_compress.counterfactual.constraints import Domain
from causal_compress.counterfactual.controls import adversarial, gradient_search, nearest_unlike
from causal_compress.counterfactual.metrics import (
    agreement_pct,
    distances,
    diversity_ratio,
    im1,
    im2,
    label_variation,
    latency_ms,
    neighbour_distances,
    plausible_pct,
)
from causal_compress.errors import DataError


def noise(count, width=4, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_distances_of_a_known_change():
    x = torch.zeros(1, 1, 2, 2)
    near = distances(x, torch.tensor([[[[3.0, 0.0], [-4.0, 0.01]]]]), least=0.02)
    assert near["l1"].item() == pytest.approx(7.01)
    assert near["l2"].item() == pytest.approx(5.00001)
    assert near["l0"].item() == 2


def test_diversity_is_0_for_one_answer_and_1_for_real_inputs():
    real, label = noise(40), torch.arange(40) % 2
    assert diversity_ratio(torch.ones(40, 4), label, real, label) == 0
    assert diversity_ratio(real, label, real, label) == pytest.approx(1)
    assert diversity_ratio(real / 2, label, real, label) == pytest.approx(0.5)


def test_agreement_counts_answers():
    assert agreement_pct(lambda x: x, torch.eye(4), torch.tensor([0, 1, 2, 0])) == 75


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def test_im1_and_im2_by_hand():
    x = torch.ones(2, 4)
    # errors per position: 0.5 ** 2 by the target's, 1 ** 2 by the original's
    assert im1(x, Constant(0.5), Constant(0.0)).tolist() == pytest.approx([0.25, 0.25])
    assert im2(x, Constant(0.5), Constant(0.0)).tolist() == pytest.approx([0.25, 0.25])


def test_neighbours_and_plausibility():
    train, label = noise(200, seed=1), torch.zeros(200, dtype=torch.long)
    real = neighbour_distances(noise(100, seed=2), label[:100], train, label)
    by_hand = torch.cdist(noise(100, seed=2), train).topk(5, largest=False).values.mean(1).numpy()
    assert np.allclose(real, by_hand, atol=1e-5)
    assert plausible_pct(real, label[:100], real, label[:100]) == pytest.approx(95, abs=1)
    far = neighbour_distances(noise(10, seed=3) + 50, label[:10], train, label)
    assert plausible_pct(far, label[:10], real, label[:100]) == 0
    with pytest.raises(DataError, match="too few"):
        neighbour_distances(noise(3), label[:3], train[:4], label[:4])


def test_label_variation_ignores_what_flows_between_original_and_target():
    original, target = torch.tensor([0]), torch.tensor([1])
    before = torch.tensor([[0.9, 0.05, 0.05]])
    assert label_variation(before, torch.tensor([[0.05, 0.9, 0.05]]), original, target).item() == pytest.approx(0)
    assert label_variation(torch.eye(3)[:1], torch.eye(3)[2:], original, target).item() == pytest.approx(1)


def test_latency_is_per_input():
    calls = []
    assert latency_ms(lambda x, t: calls.append(len(x)), torch.zeros(10, 1), torch.zeros(10), repeats=2) < 1
    assert calls == [10, 10, 10]


def line(width=2):
    blank = torch.zeros(width)
    return Domain(
        low=blank - 1,
        high=blank + 1,
        scale=torch.ones(width, dtype=torch.float64),
        offset=blank.double(),
        step=blank.double(),
        least=blank + 1e-3,
        direction=blank,
        immutable=blank.bool(),
    )


def by_first(x):
    """Class 1 where the first number is above 0.2."""
    return torch.stack([torch.zeros(len(x)), 20 * (x[:, 0] - 0.2)], 1)


def test_gradient_search_turns_the_class_by_the_number_that_counts():
    x = torch.tensor([[-0.3, 0.5], [0.1, -0.5]])
    made = gradient_search(by_first, line(), x, torch.tensor([1, 1]))
    assert by_first(made).argmax(1).tolist() == [1, 1]
    assert made[:, 1].equal(x[:, 1])


def test_adversarial_stays_in_its_ball():
    x = torch.tensor([[0.1, 0.5], [-0.9, 0.95]])
    made = adversarial(by_first, line(), x, torch.tensor([1, 1]), radius=0.15)  # of a range of 2
    assert (made - x).abs().max() <= 0.3 + 1e-6
    assert made.abs().max() <= 1
    assert by_first(made).argmax(1).tolist() == [1, 0]
    sure = by_first(made)[0].softmax(0)[1]
    full = adversarial(by_first, line(), x, torch.tensor([1, 1]), confidence=1.0, radius=0.15)
    assert 0.95 < sure < by_first(full)[0].softmax(0)[1]


def test_nearest_unlike_neighbour_by_hand():
    train = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.4, 0.4]])
    made = nearest_unlike(torch.tensor([[0.1, 0.0]]), torch.tensor([1]), train, torch.tensor([0, 1, 1]))
    assert made.tolist() == [train[2].tolist()]
