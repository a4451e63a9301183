"""Training by recorded passes: the same student, and whatever can't be recorded is trained all the same."""

import copy
from typing import Any

import distill_sample
import pytest
import torch
from distill_sample import run, section
from torch import Tensor, fx, nn

from causal_compress.recipe import DistillSection
from causal_compress.recover import compiling, distill, training
from causal_compress.recover.compiling import is_recorded, record

teacher, student = distill_sample.teacher, distill_sample.student  # fixtures
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("compile", "device", "processes", "steps", "wanted"),
    [
        ("auto", CUDA, 1, 1000, True),
        ("auto", CUDA, 1, 10, False),
        ("auto", CUDA, 2, 1000, False),
        ("auto", CPU, 1, 1000, False),
        (False, CUDA, 1, 1000, False),
        (True, CUDA, 1, 1000, False),
    ],
)
def test_who_records(compile: Any, device: torch.device, processes: int, steps: int, wanted: bool) -> None:
    assert is_recorded(DistillSection(compile=compile), steps=steps, device=device, processes=processes) is wanted


@pytest.mark.parametrize(("weight", "count", "possible"), [(0.0, 2, True), (1.0, 3, False)])
def test_what_is_recorded(
    monkeypatch: pytest.MonkeyPatch, student: nn.Module, teacher: nn.Module, weight: float, count: int, possible: bool
) -> None:
    seen: list[tuple[bool, bool]] = []

    def spied(network: nn.Module, example: Tensor, precision: Any) -> bool:
        with precision():
            assert not torch.is_autocast_cache_enabled()
        assert len(example) == 32
        seen.append((network.training, any(p.requires_grad for p in network.parameters())))
        return possible and not network.training

    monkeypatch.setattr(distill, "is_recorded", lambda *_, **__: True)
    monkeypatch.setattr(training, "record", spied)
    trained, told = run(student, teacher, section(boundary_weight=weight))
    assert seen == [(False, False), *[(True, True)] * (count - 1)]
    assert told.recorded is possible
    plain, _ = run(student, teacher, section(boundary_weight=weight, compile=False))
    assert distill_sample.same(trained.state_dict(), plain.state_dict())


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU's functions that do nothing here, and what was asked of them."""
    asked: list[str] = []
    monkeypatch.setattr(compiling, "_is_suited", lambda network, x: not compiling.shares_gradients(network, x))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the usual stream")
    for name in ("synchronize", "set_stream", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *told, name=name: asked.append(f"{name} {told}"))
    return asked


def eagerly() -> Any:
    return torch.autocast("cpu", enabled=False)


def test_what_can_not_be_recorded_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, student: nn.Module, acted: list[str]
) -> None:
    def refusing(network: nn.Module, args: tuple[Tensor], **_: Any) -> None:
        network(*args)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refusing)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert not record(student.train(), torch.randn(8, 2, 8, 8), eagerly)
    assert distill_sample.same(before, student.state_dict())
    assert acted[-2:] == ["set_stream ('the usual stream',)", "synchronize ()"]


class Adds(nn.Module):
    """Two weights that are only added up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.one + self.other)


class Counts(nn.Module):
    """Replaces its buffer where others write into theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean()
        return self.layer(x) + self.seen


@pytest.mark.parametrize("network", [Adds(), Counts()])
def test_what_would_be_replayed_wrongly_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, acted: list[str], network: nn.Module
) -> None:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: pytest.fail("recorded"))
    buffers = dict(network.named_buffers())
    assert not record(network.train(), torch.ones(4, 3), eagerly)
    assert all(network.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(float(buffer) == 0.0 for buffer in buffers.values())
    assert not acted


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in whole float32, summed in the same order each time; short runs are recorded too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(compiling, "_WORTHWHILE_REPLAYS", 1)


def exactly() -> Any:
    return torch.autocast("cuda", enabled=False, cache_enabled=False)


@gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # as training does
@pytest.mark.usefixtures("exact")
def test_a_recorded_pass_is_the_same_pass(student: nn.Module) -> None:
    eager = student.cuda().train()
    replayed = copy.deepcopy(eager)
    assert record(replayed, torch.randn(32, 2, 8, 8, device="cuda"), exactly)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(32, 2, 8, 8, generator=generator).cuda()
        answers = []
        for network in (eager, replayed):
            network.zero_grad()
            answers.append(network(x))
            answers[-1].square().sum().backward()
        torch.testing.assert_close(*answers)
        for ours, theirs in zip(replayed.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(replayed.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
    some = torch.randn(5, 2, 8, 8, generator=generator).cuda()
    torch.testing.assert_close(replayed.eval()(some), eager.eval()(some))


@gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("changes", [{}, {"boundary_weight": 0.0, "views": 2}, {"ema": 0.0}, {"optimizer": "sgd"}])
def test_recorded_training_follows_eager_training(
    student: nn.Module, teacher: nn.Module, changes: dict[str, Any]
) -> None:
    eager, told = run(student, teacher, section(compile=False, **changes), device="cuda")
    replayed, also_told = run(student, teacher, section(**changes), device="cuda")
    assert (told.recorded, also_told.recorded) == (False, True)
    follows(replayed, eager)


def follows(trained: nn.Module, wanted: nn.Module) -> None:
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-2, atol=1e-2)


@gpu
@pytest.mark.usefixtures("exact")
def test_training_on_a_gpu_follows_training_on_the_cpu(student: nn.Module, teacher: nn.Module) -> None:
    there, _ = run(student, teacher, section(), device="cpu")
    here, _ = run(student, teacher, section(), device="cuda")
    follows(here, there)


class Waits(nn.Module):
    """Asks the GPU for a number midway, which may not be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > -1e9 else -x


@gpu
@pytest.mark.usefixtures("exact")
def test_a_network_that_waits_for_the_gpu_is_trained(student: nn.Module, teacher: nn.Module) -> None:
    class Whole(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Waits) or super().is_leaf_module(module, name)

    root = nn.Sequential(Waits(), student)
    waiting = fx.GraphModule(root, Whole().trace(root)).eval()
    trained, _ = run(waiting, teacher, section(), device="cuda", boundaries=())
    plain, _ = run(student, teacher, section(), device="cuda", boundaries=())
    follows(trained.get_submodule("1"), plain)
