"""A traced network answers as the user's model does, or what does not is left whole and named."""

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.understand.trace import trace


class Plain(nn.Module):
    """Two convolutions and a head; subclasses say what lies between the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(self.between(self.first(x)))).mean((2, 3)))


class Asking(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.25 if torch.is_tensor(x) else x)


class Rectified(nn.Module):
    """Rectifies half of its channels, in a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        y[:, :4].relu_()
        return y


class Viewing(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.halves = Rectified()

    def between(self, x: Tensor) -> Tensor:
        return self.halves(x)


class Overwriting(nn.Module):
    """Can't be followed, and works in place."""

    def forward(self, x: Tensor) -> Tensor:
        if x.min() < -100:
            return x
        x -= 0.5
        x *= 4.0
        return x


class Prepared(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.prepare, self.middle = Overwriting(), Overwriting()

    def between(self, x: Tensor) -> Tensor:
        return self.middle(F.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.prepare(x))


class Forgetful(Plain):
    """Rectifies in place and goes on with the value that was overwritten, where fx can't see it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU(inplace=True)

    def between(self, x: Tensor) -> Tensor:
        self.inner(x)
        return x if torch.is_tensor(x) else -x


def hooked(kind: str) -> nn.Module:
    model = Plain()
    if kind == "before":
        model.register_forward_pre_hook(lambda _, args: ((args[0] - 0.5) / 0.25,))
    elif kind == "after":
        model.register_forward_hook(lambda _, args, answer: 3 * answer)
    else:
        model.forward = types.MethodType(lambda self, x: Plain.forward(self, 1 - x), model)
    return model


def inputs() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_answers(model: nn.Module, graph: Callable[[Tensor], Tensor]) -> None:
    model.eval()
    x = inputs()
    with torch.no_grad():
        wanted = model(x.clone())
        assert torch.allclose(graph(x), wanted, atol=1e-5)
    assert torch.equal(x, inputs())


@pytest.mark.parametrize("kind", ["before", "after", "instead"])
def test_hooks_and_a_forward_of_its_own_are_followed(kind: str) -> None:
    model = hooked(kind)
    network = trace(model, inputs())
    assert network.untraced == ()
    assert [region.info.name for region in network.regions] == ["first", "second", "fc"]
    assert_answers(model, network.teacher)


@pytest.mark.parametrize("kind", [Asking, Forgetful])
def test_what_is_followed_into_something_else_is_left_whole(kind: type[Plain]) -> None:
    model = kind()
    network = trace(model, inputs())
    (skip,) = network.untraced
    assert skip.what == "the whole model"
    assert "answers otherwise" in skip.reason
    assert_answers(model, network.teacher)


def test_only_the_module_that_writes_into_a_view_is_left_whole(caplog: pytest.LogCaptureFixture) -> None:
    network = trace(Viewing(), inputs())
    assert "halves: traced by torch.fx it answers otherwise" in caplog.text
    assert [skip.what for skip in network.untraced] == ["halves"]
    assert [region.info.name for region in network.regions] == ["first", "second", "fc"]
    assert_answers(Viewing(), network.teacher)


def test_what_works_in_place_unseen_leaves_its_inputs_alone() -> None:
    network = trace(Prepared(), inputs())
    assert [skip.what for skip in network.untraced] == ["prepare", "middle"]
    assert_answers(Prepared(), network.teacher)
    given = inputs()
    for region in network.regions:
        kept = given.clone()
        with torch.no_grad():
            answer = region.module(given)
        assert torch.equal(given, kept)
        given = answer


def test_chance_that_never_rests_is_no_disagreement() -> None:
    class Noisy(Plain):
        def between(self, x: Tensor) -> Tensor:
            return F.dropout(F.relu(x), 0.5, training=True)

    assert trace(Noisy(), inputs()).untraced == ()


def test_a_module_that_copies_its_inputs_can_be_exported(tmp_path: Path) -> None:
    class Halved(Rectified):
        def forward(self, x: Tensor) -> Tensor:
            x[:, :4].relu_()
            return x

    model = Viewing()
    model.halves = Halved()
    network = trace(model, inputs())
    assert [skip.what for skip in network.untraced] == ["halves"]
    assert_answers(model, network.teacher)
    export_onnx(network.teacher, inputs(), tmp_path / "model.onnx", opset=18)
    answer = OnnxRuntime.load(tmp_path / "model.onnx").run(inputs().numpy())
    assert_answers(model, lambda x: torch.from_numpy(answer))
