"""Which optimizer trains what, and that Muon's steps are what they are said to be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from causal_compress.recipe import DistillSection
from causal_compress.recover import optimizers
from causal_compress.recover.optimizers import Muon, optimizers_of, orthogonalised


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 9), (2, 9, 4), (1, 1, 7), (1, 64, 576)])
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ orthogonalised(matrices) @ right.mT
    diagonal = turned.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(turned, torch.diag_embed(diagonal), rtol=0, atol=2e-4)
    seen = values > 1e-2 * torch.linalg.matrix_norm(matrices)[:, None]
    assert seen.float().mean() > 0.8
    assert ((diagonal > 0.6) & (diagonal < 1.3))[seen].all()


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([{"params": [weight]}], lr=0.1).step()
    assert torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_step_is_a_share_of_the_weights_norm_whatever_the_gradients(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(6, 3, 3, 3, generator=generator))
    before, weight.grad = weight.detach().clone(), size * torch.randn(6, 3, 3, 3, generator=generator)
    Muon([{"params": [weight]}], lr=0.02).step()
    assert ((weight - before).norm() / before.norm()).item() == pytest.approx(0.02, rel=1e-4)
    assert ((weight - before) * weight.grad).sum() < 0


def test_a_grouped_convolution_is_as_many_matrices_as_it_has_groups() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = nn.Parameter(torch.randn(8, 2, 3, 3, generator=generator))
    before, weight.grad = weight.detach().clone(), torch.randn(8, 2, 3, 3, generator=generator)
    Muon([{"params": [weight], "blocks": 2}], lr=0.5).step()
    step = (before - weight).detach().reshape(2, 4, 18)
    alone = torch.cat([orthogonalised(part.reshape(1, 4, 18)) for part in weight.grad.split(4)])
    torch.testing.assert_close(step / step.norm(), alone / alone.norm())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.words = nn.Embedding(5, 4)
        self.empty = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.table = nn.Parameter(torch.ones(2, 2))
        nn.init.zeros_(self.empty.weight)


def test_every_parameter_has_one_optimizer() -> None:
    net = Mixed()
    sgd, muon = optimizers_of(net, DistillSection(learning_rate=0.3, relative_rate=0.01))
    assert (type(sgd), type(muon)) == (torch.optim.SGD, Muon)
    trained = [p for optimizer in (sgd, muon) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, net.parameters()))
    matrices = {id(p): group["blocks"] for group in muon.param_groups for p in group["params"]}
    assert matrices == {id(net.conv.weight): 2, id(net.head.weight): 1}
    assert {group["peak"] for group in sgd.param_groups} == {0.3}
    assert {group["peak"] for group in muon.param_groups} == {0.01}


def test_sgd_alone_when_asked_for() -> None:
    net = Mixed()
    (sgd,) = optimizers_of(net, DistillSection(optimizer="sgd", weight_decay=0.5))
    assert type(sgd) is torch.optim.SGD
    decayed = {id(p) for group in sgd.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in net.parameters() if p.ndim > 1}


def test_muon_alone_where_there_are_only_matrices() -> None:
    (muon,) = optimizers_of(nn.Linear(3, 2, bias=False), DistillSection())
    assert type(muon) is Muon


def _left(optimizer: torch.optim.Optimizer, weight: nn.Parameter, inputs: Tensor, wanted: Tensor, steps: int) -> float:
    peak = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        optimizer.zero_grad()
        (inputs @ weight.mT - wanted).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - step / steps)
        optimizer.step()
    return (inputs @ weight.mT - wanted).square().mean().item()


def test_inputs_of_unlike_sizes_are_learnt_sooner_than_by_any_rate_of_sgd() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 8, generator=generator) * torch.logspace(0, -2.5, 8)
    goal, start = (torch.randn(4, 8, generator=generator) for _ in range(2))

    def after(make: Callable[..., torch.optim.Optimizer], **settings: float) -> float:
        weight = nn.Parameter(start.clone())
        return _left(make([{"params": [weight]}], **settings), weight, inputs, inputs @ goal.mT, 100)

    plain = min(after(torch.optim.SGD, lr=rate, momentum=0.9) for rate in (0.01, 0.1, 1.0, 3.0))
    assert min(after(Muon, lr=rate) for rate in (0.01, 0.1)) < plain / 3


def test_weights_of_one_shape_move_as_each_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(4, 3, 3, 3, generator=generator) for _ in range(5)] + [torch.randn(6, 2, generator=generator)]
    slopes = [torch.randn(value.shape, generator=generator) for value in values]

    def moved(groups: list[list[nn.Parameter]]) -> list[nn.Parameter]:
        for _ in range(3):
            for weights in groups:
                Muon([{"params": weights}], lr=0.1).step()
        return [weight for weights in groups for weight in weights]

    def fresh() -> list[nn.Parameter]:
        weights = [nn.Parameter(value.clone()) for value in values]
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope.clone()
        return weights

    alone = moved([[weight] for weight in fresh()])
    for most in (2**20, 2 * values[0].numel(), 1):
        monkeypatch.setattr(optimizers, "_TOGETHER", most)
        for together, single in zip(moved([fresh()]), alone, strict=True):
            torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-6)
