"""Closed forms against scikit-learn, brute force and PyTorch's own layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from causal_compress.errors import NumericalError
from causal_compress.shrink.refit import (
    Consumer,
    NormalEquations,
    effective_affine,
    fit,
    ridge,
    sample_rows,
    surgeon_path,
    weight_matrix,
    write_affine,
)
from causal_compress.shrink.rows import FewRows


def equations(z: Tensor, t: Tensor) -> NormalEquations:
    sums = NormalEquations(z.shape[1], t.shape[1])
    sums.add(z, t)
    return sums


def rows(count: int, features: int, targets: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features with a mean, targets that depend on them, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, features, generator=generator) @ torch.randn(features, features, generator=generator) + 2.0
    t = z @ torch.randn(features, targets, generator=generator)
    return z, t + 0.3 * torch.randn(count, targets, generator=generator) + 1.0


def strength_of(z: Tensor, penalty: float) -> float:
    """What a relative penalty means in absolute terms."""
    return penalty * float(z.double().var(0, correction=0).mean())


def best_within(z: Tensor, t: Tensor, strength: float, kept: list[int]) -> tuple[float, Tensor]:
    """The least penalised squared error with some features only, by the normal equations in numpy."""
    centred = (z - z.mean(0)).double().numpy()[:, kept]
    wanted = (t - t.mean(0)).double().numpy()
    gram = centred.T @ centred / len(z) + strength * np.eye(len(kept))
    weight = np.linalg.solve(gram, centred.T @ wanted / len(z))
    error = ((wanted - centred @ weight) ** 2).sum() / len(z) + strength * (weight**2).sum()
    return float(error), torch.from_numpy(weight)


def test_ridge_is_scikit_learns_ridge() -> None:
    z, t = rows(300, 7, 3)
    weight, bias = ridge(equations(z, t), 0.1)
    reference = Ridge(alpha=strength_of(z, 0.1) * len(z)).fit(z.double().numpy(), t.double().numpy())
    np.testing.assert_allclose(weight.numpy(), reference.coef_.T, atol=1e-4)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, atol=1e-3)


def test_ridge_towards_a_prior_is_ridge_on_what_the_prior_leaves() -> None:
    z, t = rows(300, 5, 2)
    prior = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight, bias = ridge(equations(z, t), 0.5, prior)
    reference = Ridge(alpha=strength_of(z, 0.5) * len(z)).fit(
        z.double().numpy(), (t.double() - z.double() @ prior).numpy()
    )
    np.testing.assert_allclose(weight.numpy(), reference.coef_.T + prior.numpy(), atol=1e-4)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, atol=1e-3)


def test_a_heavy_penalty_gives_the_prior_and_a_light_one_least_squares() -> None:
    z, t = rows(400, 4, 2)
    prior = torch.ones(4, 2, dtype=torch.float64)
    heavy, _ = ridge(equations(z, t), 1e6, prior)
    light, _ = ridge(equations(z, t), 1e-12, prior)
    _, least_squares = best_within(z, t, 0.0, [0, 1, 2, 3])
    assert torch.allclose(heavy, prior, atol=1e-4)
    assert torch.allclose(light, least_squares, atol=1e-4)


def test_sums_tell_error_and_variance_of_rows_they_have_seen() -> None:
    z, t = rows(200, 4, 3)
    sums = equations(z[:120], t[:120]) + equations(z[120:], t[120:])
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    direct = (t.double() - z.double() @ weight - bias).square().sum(1).mean()
    assert sums.error(weight, bias) == pytest.approx(float(direct), rel=1e-4)
    assert sums.target_variance() == pytest.approx(float(t.double().var(0, correction=0).sum()), rel=1e-4)
    assert sums.error(torch.zeros(4, 3, dtype=torch.float64), t.double().mean(0)) == pytest.approx(
        sums.target_variance(), rel=1e-3
    )


def test_selected_features_have_the_sums_of_their_own() -> None:
    z, t = rows(100, 5, 2)
    kept = torch.tensor([0, 3, 4])
    chosen, own = equations(z, t).select(kept), equations(z[:, kept], t)
    for name in ("sum_z", "sum_t", "zz", "zt", "tt"):
        assert torch.allclose(getattr(chosen, name), getattr(own, name), rtol=1e-5), name


def test_the_bias_takes_up_the_mean_of_what_is_missing() -> None:
    z, t = rows(500, 3, 1)
    _, bias = ridge(equations(z, t).select(torch.tensor([1])), 1e-9)
    weight, _ = ridge(equations(z, t).select(torch.tensor([1])), 1e-9)
    assert float(bias) == pytest.approx(float(t.mean() - z[:, 1].mean() * weight[0, 0]), rel=1e-3)


def test_fit_takes_the_penalty_that_held_out_rows_prefer() -> None:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(12, 10, generator=generator), torch.randn(12, 1, generator=generator)
    train = equations(z, noise)  # nothing to learn, and hardly more rows than features: the heaviest penalty is best
    heldout = equations(torch.randn(500, 10, generator=generator), torch.randn(500, 1, generator=generator))
    solution = fit(train, heldout, [1e-6, 1e-2, 1e3])
    assert solution.penalty == 1e3
    assert solution.relative_error == pytest.approx(1.0, abs=0.25)
    learnable = fit(*(equations(*rows(400, 5, 2, seed=1)),) * 2, penalties=[1e-6, 1e3])
    assert learnable.penalty == 1e-6
    assert learnable.relative_error < 0.1


def test_a_refit_on_nan_says_so() -> None:
    z, t = rows(20, 3, 1)
    z[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        ridge(equations(z, t), 0.1)


def surgeon(z: Tensor, t: Tensor, columns: Tensor, penalty: float) -> Consumer:
    sums = equations(z, t)
    return Consumer(sums, ridge(sums, penalty)[0], columns, penalty)


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_surgeon_removes_what_brute_force_would(each: int, seed: int) -> None:
    channels, penalty = 5, 0.05
    z, t = rows(300, channels * each, 3, seed)
    columns = torch.arange(channels * each).reshape(channels, each)
    path = surgeon_path([surgeon(z, t, columns, penalty)], range(1, channels + 1))
    alive = list(range(channels))
    strength = strength_of(z, penalty)
    assert path[channels].tolist() == alive
    while len(alive) > 1:
        remaining = [[c for c in alive if c != gone] for gone in alive]
        alive = min(remaining, key=lambda left: best_within(z, t, strength, columns[left].flatten().tolist())[0])
        assert path[len(alive)].tolist() == alive


def test_costs_of_several_readers_are_added() -> None:
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    columns = torch.arange(2).unsqueeze(1)
    first = surgeon(z, 3 * z[:, :1] + 2 * z[:, 1:], columns, 1e-6)
    second = surgeon(z, 3 * z[:, 1:], columns, 1e-6)
    assert surgeon_path([first], [1])[1].tolist() == [0]
    assert surgeon_path([first, second], [1])[1].tolist() == [1]


def test_a_doubled_or_constant_channel_goes_first() -> None:
    z, _ = rows(400, 4, 1)
    z = torch.cat([z, z[:, :1], torch.full((400, 1), 7.0)], 1)  # 4 doubles 0, 5 is constant
    t = z[:, :4] @ torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    path = surgeon_path([surgeon(z, t, torch.arange(6).unsqueeze(1), 1e-5)], [5, 4])
    assert 5 not in path[4].tolist()
    assert sorted(set(path[4].tolist()) | {0}) in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert len({0, 4} & set(path[4].tolist())) == 1


def test_the_surgeon_does_not_touch_what_it_is_given() -> None:
    consumer = surgeon(*rows(100, 4, 2), torch.arange(4).unsqueeze(1), 0.1)
    weight, zz = consumer.weight.clone(), consumer.equations.zz.clone()
    surgeon_path([consumer], [2])
    assert torch.equal(weight, consumer.weight)
    assert torch.equal(zz, consumer.equations.zz)


_GEOMETRY = list(itertools.product([1, 2, (2, 1)], [0, 1, (2, 1)], [1, 2], [1, 3, (3, 1)]))


@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel"), _GEOMETRY)
def test_rows_times_weight_is_the_convolution(stride: int, padding: int, dilation: int, kernel: int) -> None:
    layer = nn.Conv2d(3, 4, kernel, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(2, 3, 8, 7)
    with torch.no_grad():
        y = layer(x)
        z, t = sample_rows(layer, x, y, most=10**6, seed=0)
        assert torch.allclose(z @ layer.weight.flatten(1).T + layer.bias, t, atol=1e-5)
    assert torch.equal(t, y.permute(0, 2, 3, 1).reshape(-1, 4))


@given(most=st.integers(1, 40), seed=st.integers(0, 2**31), stride=st.sampled_from([1, 2]))
def test_sampled_rows_belong_together(most: int, seed: int, stride: int) -> None:
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        z, t = sample_rows(layer, x, layer(x), most, seed)
        assert len(z) == len(t) <= max(most, 1)
        assert torch.allclose(F.linear(z, layer.weight.flatten(1), layer.bias), t, atol=1e-5)


def test_rows_of_a_linear_layer_are_its_tokens() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(2, 5, 4)
    z, t = sample_rows(layer, x, layer(x).detach(), 100, 0)
    assert torch.equal(z, x.reshape(10, 4))
    assert t.shape == (10, 3)


def normed(inputs: int = 4, outputs: int = 5) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    layer, norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    return layer, norm.eval()


def test_the_effective_affine_map_is_what_layer_and_norm_compute() -> None:
    layer, norm = normed()
    weight, bias = effective_affine(layer, norm)
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        z, t = sample_rows(layer, x, norm(layer(x)), 10**6, 0)
    assert torch.allclose((z.double() @ weight + bias).float(), t, atol=1e-5)
    plain, _ = effective_affine(layer, None)
    assert torch.equal(plain, weight_matrix(layer))


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2]])
def test_a_written_solution_is_computed_in_evaluation_and_in_training_mode(kept: list[int]) -> None:
    layer, norm = normed()
    x = torch.randn(16, 4, 6, 6)
    with torch.no_grad():
        z, t = sample_rows(layer, x, layer(x), 10**6, 0)
    columns = torch.arange(36).reshape(4, 9)[kept].flatten()
    z = z[:, columns]
    weight, bias = torch.randn(len(columns), 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    write_affine(layer, norm, (weight, bias), equations(z, t))
    layer.in_channels = len(kept)
    wanted = (z.double() @ weight + bias).float()
    with torch.no_grad():
        y = layer(x[:, kept])
        assert torch.allclose(norm(y).permute(0, 2, 3, 1).reshape(-1, 5), wanted, atol=1e-4)
        assert torch.allclose(norm.train()(y).permute(0, 2, 3, 1).reshape(-1, 5), wanted, atol=1e-3)
    again, shift = effective_affine(layer, norm.eval())
    assert torch.allclose(again, weight, atol=1e-2)
    assert torch.allclose(shift, bias, atol=1e-2)


def few_rows(count: int, features: int, targets: int, seed: int = 0) -> tuple[FewRows, NormalEquations]:
    z, t = rows(count, features, targets, seed)
    return FewRows(z, t), equations(z, t)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("count", [12, 40])
def test_the_dual_gives_what_the_normal_equations_give(count: int, with_prior: bool) -> None:
    train, heldout = few_rows(count, 20, 3), few_rows(8, 20, 3, seed=1)
    prior = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) if with_prior else None
    penalties = [1e-2, 1e-1, 1.0]
    dual, primal = (fit(train[kind], heldout[kind], penalties, prior) for kind in (0, 1))
    assert dual.penalty == primal.penalty
    assert dual.relative_error == pytest.approx(primal.relative_error, rel=1e-3)
    torch.testing.assert_close(dual.weight, primal.weight, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(dual.bias, primal.bias, atol=2e-2, rtol=1e-3)


def test_few_rows_answer_what_normal_equations_answer() -> None:
    kept, columns = torch.tensor([1, 4, 5]), torch.tensor([[0, 3], [2, 5]])
    weight, bias = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    few, sums = few_rows(30, 6, 2)
    more, others = few_rows(10, 6, 2, seed=1)
    few, sums = few + more, sums + others
    assert few.error(weight, bias) == pytest.approx(sums.error(weight, bias), rel=1e-4)
    assert few.target_variance() == pytest.approx(sums.target_variance(), rel=1e-4)
    for mine, wanted in (
        (few.sum_z, sums.sum_z),
        (few.covariance(), sums.covariance()),
        (few.blocks(columns), sums.blocks(columns)),
        (few.output_variance(weight), sums.output_variance(weight)),
        (few.select(kept).covariance(), sums.select(kept).covariance()),
    ):
        torch.testing.assert_close(mine, wanted, atol=1e-3, rtol=1e-4)


def test_few_rows_that_are_not_finite_are_refused() -> None:
    few, _ = few_rows(10, 20, 3)
    few.z[0, 0] = torch.nan
    with pytest.raises(NumericalError):
        fit(few, few, [0.1])


def test_a_layer_without_norm_gets_the_bias() -> None:
    layer = nn.Linear(4, 3, bias=False)
    z, t = rows(50, 4, 3)
    weight, bias = ridge(equations(z, t), 1e-3)
    write_affine(layer, None, (weight, bias), equations(z, t))
    assert torch.allclose(layer(z), (z.double() @ weight + bias).float(), atol=1e-4)
