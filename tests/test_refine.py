"""Gauss-Newton refits of whole parts: against least squares that can be solved directly, and on small networks."""

from __future__ import annotations

import copy

import pytest
import torch
from test_surgery import planned, singles
from tiny import Residual, images, random_norms
from torch import Tensor, fx, nn

from causal_compress.recipe import PruneSection, RewriteSection
from causal_compress.shrink import prune as pruning
from causal_compress.shrink import refine as refining
from causal_compress.shrink.front import open_front
from causal_compress.shrink.refine import Refined, least_squares, refine, settle_norms
from causal_compress.shrink.rewrite import rewrite
from causal_compress.understand.trace import trace


def block(seed: int = 0) -> fx.GraphModule:
    """A residual block with batch norms, as a region of a network."""
    torch.manual_seed(seed)
    network = trace(random_norms(Residual(1)), images(2, 1, 6))
    return copy.deepcopy(network.regions[1].module)


def rows(count: int = 8, size: int = 64) -> list[Tensor]:
    return [images(size, 4, 6, seed).abs() for seed in range(count)]


def answers(part: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [part(x) for x in inputs]


def disturbed(part: fx.GraphModule, by: float) -> fx.GraphModule:
    changed = copy.deepcopy(part)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in changed.parameters():
            value += by * value.norm() / value.numel() ** 0.5 * torch.randn(value.shape, generator=generator)
    return changed


def test_conjugate_gradients_solve_least_squares() -> None:
    matrix = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = matrix.sum(1) + torch.linspace(-1, 1, 40, dtype=torch.float64)
    (step,) = least_squares(lambda v: [matrix @ v[0]], lambda u: [matrix.T @ u[0]], [wanted], 6)
    assert torch.allclose(step, torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0], atol=1e-9)


def test_where_nothing_is_wrong_nothing_moves() -> None:
    (step,) = least_squares(lambda v: [2 * v[0]], lambda u: [2 * u[0]], [torch.zeros(3)], 5)
    assert torch.equal(step, torch.zeros(3))


def test_the_linear_map_is_the_derivative_and_its_transpose() -> None:
    part = block()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in part.named_parameters()}
    x = rows(1, 8)[0]
    found = refining._Linear(part, leaves, x)
    step = [torch.randn_like(value) for value in leaves.values()]
    moved, eps = found.forth(step), 1e-3
    with torch.no_grad():
        for (_, value), along in zip(part.named_parameters(), step, strict=True):
            value += eps * along
        there = part(x)
        for (_, value), along in zip(part.named_parameters(), step, strict=True):
            value -= 2 * eps * along
        differences = (there - part(x)) / (2 * eps)
    assert (moved - differences).norm() < 0.02 * moved.norm()
    against = torch.randn_like(moved)
    back = found.back(against)
    assert sum(float((a * b).sum()) for a, b in zip(back, step, strict=True)) == pytest.approx(
        float((against * moved).sum()), rel=1e-3
    )


def test_disturbed_weights_find_their_way_back() -> None:
    teacher, inputs = block(), rows()
    student = disturbed(teacher, 0.1)
    found = refine(student, inputs, answers(teacher, inputs))
    assert isinstance(found, Refined)
    assert found.after < 0.05 * found.before
    fresh = [images(64, 4, 6, 99).abs()]
    left, was = answers(student, fresh)[0], answers(disturbed(teacher, 0.1), fresh)[0]
    wanted = answers(teacher, fresh)[0]
    assert (left - wanted).norm() < 0.3 * (was - wanted).norm()


def test_a_part_that_can_not_be_improved_stays_bit_for_bit() -> None:
    part, inputs = block(), rows()
    before = copy.deepcopy(part.state_dict())
    found = refine(part, inputs, answers(part, inputs))
    assert isinstance(found, Refined)
    assert found.before == found.after == 0
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


def test_steps_that_only_fit_the_fitting_chunks_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    part, inputs = block(), rows()
    wanted = answers(disturbed(part, 0.1), inputs)
    for index in range(3, 8, 4):  # what is held out wants what the part does already
        wanted[index] = answers(part, [inputs[index]])[0]
    before = copy.deepcopy(part.state_dict())
    refine(part, inputs, wanted)
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


def test_batch_norms_have_the_statistics_of_what_they_are_fed_now() -> None:
    teacher, inputs = block(), rows()
    student = disturbed(teacher, 0.1)
    refine(student, inputs, answers(teacher, inputs))
    train = [x for index, x in enumerate(inputs) if index % 4 != 3]
    seen = torch.cat(train)
    with torch.no_grad():
        quiet = student(seen)
        norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 0.0
            norm.train()
        assert torch.allclose(student(seen), quiet, atol=1e-2 * float(quiet.std()))


def test_settled_norms_compute_what_they_did() -> None:
    part, inputs = block(), rows(2)
    before = answers(part, inputs)
    means = [module.running_mean.clone() for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    settle_norms(part, inputs)
    now = [module.running_mean for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(torch.allclose(a, b) for a, b in zip(means, now, strict=True))
    for one, other in zip(before, answers(part, inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_one_layer_alone_is_left_to_the_closed_form() -> None:
    network = trace(random_norms(Residual(1)), images(2, 1, 6))
    stem = network.regions[0].module
    inputs = [images(16, 1, 6, seed) for seed in range(4)]
    assert refine(copy.deepcopy(stem), inputs, answers(stem, inputs)) is None


def test_too_many_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    part, inputs = block(), rows(4)
    monkeypatch.setattr(refining, "MOST_WEIGHTS", 10)
    assert refine(part, inputs, answers(part, inputs)) == "452 weights are too many (limit 10)"


def test_little_memory_means_fewer_inputs_of_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    part, inputs = block(), rows()
    whole, _ = refining._chunks(part, inputs, answers(part, inputs))
    monkeypatch.setattr(refining, "MOST_BYTES", refining._bytes(part, inputs[0][:1]) * 8 * 5.5)
    train, heldout = refining._chunks(part, inputs, answers(part, inputs))
    assert ({len(x) for x, _ in whole}, len(whole)) == ({64}, 6)
    assert ({len(x) for x, _ in [*train, *heldout]}, len(train), len(heldout)) == ({5}, 6, 2)


@pytest.mark.parametrize(
    ("asked", "few", "made"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_steps_are_made_where_inputs_are_few(
    asked: object, few: bool, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = trace(random_norms(Residual(2)), images(2, 1, 6))
    fit, heldout = images(128, 1, 6, 1).split(32), images(64, 1, 6, 2).split(32)
    plan = planned(singles(network), {1: {"blocks.0.conv1": 3}})
    monkeypatch.setattr(pruning, "ENOUGH_INPUTS", 129 if few else 128)
    student, _, _ = rewrite(network, plan, open_front(network, fit, heldout, 4.0), RewriteSection())
    section = PruneSection.model_validate({"refine": asked})
    _, changes, _ = pruning.prune(student, plan, open_front(network, fit, heldout, 4.0), section)
    (found,) = {change.refined is not None for change in changes if change.node == "1..1"}
    assert found == made
    if made:
        assert all(change.refined[1] <= change.refined[0] for change in changes if change.refined is not None)


@pytest.mark.parametrize("chunks", [2, 3, 4, 7])
def test_few_chunks_are_enough_and_one_is_not(chunks: int) -> None:
    teacher, inputs = block(), rows(chunks)
    wanted = answers(teacher, inputs)
    found = refine(disturbed(teacher, 0.1), inputs, wanted)
    assert isinstance(found, Refined)
    assert found.after < 0.2 * found.before
    assert refine(disturbed(teacher, 0.1), inputs[:1], wanted[:1]) == (
        "there is one chunk of calibration inputs, and none to hold out"
    )
