"""The parts of distillation by themselves: losses, schedule, networks made ready."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from causal_compress.errors import TraceError
from causal_compress.recover.losses import boundary_loss, kd_loss, label_loss
from causal_compress.recover.networks import answer, fold_batch_norms, observed
from causal_compress.recover.norms import SUFFIX, trained_node, with_norms, without_norms
from causal_compress.recover.schedule import boundary_share_at, decay_at, learning_rate_at


def test_folded_batch_norms_compute_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(216, 3))
    nn.init.uniform_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 0.5, 1.5)
    x = torch.randn(5, 2, 8, 8)
    wanted, inside = answer(observed(fx.symbolic_trace(net.eval()), ["_1", "_2"], role="teacher"), x)
    folded = fold_batch_norms(observed(fx.symbolic_trace(net), ["_1", "_2"], role="teacher"))
    logits, folded_inside = answer(folded, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(folded_inside, inside)


def test_layer_that_is_called_twice_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.bn(self.conv(x)))

    net = Twice().eval()
    nn.init.uniform_(net.bn.running_mean)
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(fold_batch_norms(fx.symbolic_trace(net))(x), net(x))


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    wanted = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    expected = (0.9 * torch.tensor(1.8).log() + 0.1 * torch.tensor(0.2).log()) / 2
    torch.testing.assert_close(kd_loss(logits, wanted, 1.0), expected)
    torch.testing.assert_close(kd_loss(logits, 2.0 * wanted, 2.0), 4.0 * expected)
    counted = torch.tensor([True, False])
    torch.testing.assert_close(label_loss(wanted, torch.tensor([1, 0]), counted), -torch.tensor(0.1).log())
    assert label_loss(wanted, torch.tensor([1, 0]), torch.tensor([False, False])) == 0.0
    activations = torch.tensor([[2.0, 0.0]])
    torch.testing.assert_close(boundary_loss([activations, 2 * activations], [activations] * 2), torch.tensor(0.5))


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_boundary_loss_and_gradient_equal_the_written_out_ones(precision: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, wanted = torch.randn(2, 4, 3, 5, 5, generator=generator).to(precision)
    ours.requires_grad_()
    plain = ours.detach().float().requires_grad_()
    loss = boundary_loss([ours], [wanted])
    reference = (plain - wanted.float()).square().mean() / wanted.float().square().mean()
    (3.0 * loss).backward()
    (3.0 * reference).backward()
    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=0.0)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.float(), plain.grad, rtol=tolerance, atol=tolerance * 0.1)


def test_one_cycle() -> None:
    rates = [learning_rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(left >= right for left, right in itertools.pairwise(rates[5:]))
    assert 0.0 < rates[-1] < 1e-3
    assert learning_rate_at(0, 1, 0.1) == pytest.approx(0.1)
    assert [boundary_share_at(step, 30) for step in (0, 5, 10, 29)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert decay_at(0, 0.999) == pytest.approx(0.1)
    assert decay_at(10**6, 0.999) == 0.999


def plain(bias: bool = True) -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, bias=bias), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return fx.symbolic_trace(nn.Sequential(*layers, nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)).eval())


def test_norms_for_training_change_nothing_at_first() -> None:
    student, x = plain(), torch.randn(64, 2, 8, 8)
    normed = with_norms(student, [x[:32], x[32:]])
    added = [name for name, module in normed.named_modules() if name.endswith(SUFFIX)]
    assert added == ["0_training_norm", "6_training_norm"]  # not the one that has a norm, not the last
    torch.testing.assert_close(normed(x), student(x), rtol=1e-4, atol=1e-5)
    bare = fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval())
    torch.testing.assert_close(with_norms(bare, [x]).train()(x), bare(x), rtol=1e-3, atol=1e-4)
    assert [name for name, _ in with_norms(plain(bias=False), [x]).named_modules() if name.endswith(SUFFIX)] == [
        "6_training_norm"
    ]


@pytest.mark.parametrize("sizes", [[64, 1], [33, 32], [65]])
def test_statistics_for_training_do_not_hang_on_how_inputs_are_chunked(sizes: list[int]) -> None:
    student, x = plain(), torch.randn(65, 2, 8, 8)
    norm = with_norms(student, x.split(sizes)).get_submodule(f"0{SUFFIX}")
    activations = student.get_submodule("0")(x)
    torch.testing.assert_close(norm.running_mean, activations.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, activations.var((0, 2, 3), correction=0))


def test_norms_are_folded_into_the_structure_that_was_there() -> None:
    student, x = plain(), torch.randn(64, 2, 8, 8)
    normed = with_norms(student, [x])
    optimizer = torch.optim.SGD(normed.train().parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        normed(x).square().mean().backward()
        optimizer.step()
    before = student(x)
    student.load_state_dict(without_norms(normed, student))
    torch.testing.assert_close(student.eval()(x), normed.eval()(x))
    assert not torch.allclose(student(x), before)
    with pytest.raises(TraceError, match="norms"):
        with_norms(nn.Linear(2, 2), [torch.randn(4, 2)])


class Standardised(nn.Conv2d):
    """Its weights are standardised on each call; control flow makes fx leave it whole."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class OwnLayers(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Standardised) or super().is_leaf_module(m, module_qualified_name)


def test_a_convolution_of_another_kind_is_neither_folded_nor_normed() -> None:
    net = nn.Sequential(Standardised(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Standardised(6, 4, 3), nn.Conv2d(4, 3, 1))
    net = net.eval()
    nn.init.uniform_(net[1].running_var, 0.5, 1.5)
    graph = fx.GraphModule(net, OwnLayers().trace(net))
    x = torch.randn(8, 2, 6, 6)
    torch.testing.assert_close(fold_batch_norms(copy.deepcopy(graph))(x), net(x))
    assert not any(name.endswith(SUFFIX) for name, _ in with_norms(graph, [x]).named_modules())


@pytest.mark.parametrize("twin", ["tied", "read by a function"])
def test_weights_with_two_users_get_no_norm_and_keep_theirs(twin: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b, self.c = (
                nn.Conv2d(2, 2, 1),
                nn.BatchNorm2d(2),
                nn.Conv2d(2, 2, 1),
                nn.Conv2d(2, 3, 1),
            )
            if twin == "tied":
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.a(x)).relu()
            x = self.b(x) if twin == "tied" else F.conv2d(x, self.a.weight)
            return self.c(x)

    net = Two().eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 1.5)
    x = torch.randn(8, 2, 4, 4)
    torch.testing.assert_close(fold_batch_norms(fx.symbolic_trace(net))(x), net(x))
    assert not any(name.endswith(SUFFIX) for name, _ in with_norms(fx.symbolic_trace(net), [x]).named_modules())


def test_what_a_boundary_sees_in_training_is_what_the_folded_student_has_there() -> None:
    student, x = plain(), torch.randn(64, 2, 8, 8)
    normed = with_norms(student, [x])
    with torch.no_grad():
        normed.get_submodule(f"0{SUFFIX}").weight.mul_(2.0)
    seen = observed(normed, [trained_node(normed, "_0")], role="student")(x)[1]
    student.load_state_dict(without_norms(normed, student))
    torch.testing.assert_close(seen, observed(student, ["_0"], role="student")(x)[1])
    assert trained_node(normed, "_2") == "_2"
