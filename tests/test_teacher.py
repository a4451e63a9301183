"""The teacher's fingerprints, and the warning where it has seen its own validation inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Residual
from torch import nn

from causal_compress.deploy.scorecard import seen_in_training
from causal_compress.results import Scorecard, ScoreRow, TeacherScore
from causal_compress.understand.statistics import wilson
from causal_compress.understand.teacher import structure_sha256, weights_sha256
from causal_compress.understand.trace import trace


class Net(nn.Module):
    def __init__(self, *, active: bool = True, slope: float = 0.0, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=stride)
        self.act = nn.LeakyReLU(slope)
        self.fc = nn.Linear(4, 2)
        self.active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = torch.relu(x) if self.active else x
        return self.fc(self.act(x).mean((2, 3)))  # type: ignore[no-any-return]


def fingerprints(**settings: float) -> tuple[str, str]:
    torch.manual_seed(0)
    graph = trace(Net(**settings).eval(), torch.randn(2, 3, 8, 8)).graph  # type: ignore[arg-type]
    return weights_sha256(graph), structure_sha256(graph)


def test_equal_weights_in_another_function_are_another_network() -> None:
    usual = fingerprints()
    assert usual == fingerprints()
    for changed in ({"active": False}, {"slope": 0.1}, {"stride": 2}):
        weights, structure = fingerprints(**changed)
        assert weights == usual[0]
        assert structure != usual[1]


def test_the_fingerprint_of_a_structure_does_not_hang_on_addresses() -> None:
    x = torch.randn(2, 1, 8, 8)
    first, second = (structure_sha256(trace(Residual().eval(), x).graph) for _ in range(2))
    assert first == second


class Opaque(nn.Module):
    """What tracing can't follow, with a setting that it doesn't print."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.gain, self.act, self.size = 1.0, torch.relu, (1, 2)
        self.table, self._hidden = torch.ones(3), "plain"
        self.register_buffer("kept_nowhere", torch.ones(2), persistent=False)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) * self.gain if bool((x > 0).any()) else x


class Renamed(Opaque):
    """The same settings, another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0


class Around(nn.Module):
    """A layer, and behind it a module that stays whole or a buffer that no checkpoint holds."""

    def __init__(self, inner: nn.Module, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.fc = inner, nn.Linear(3, 2)
        self.register_buffer("gain", torch.tensor(gain), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.inner(x)) * self.gain  # type: ignore[no-any-return]


def structure(model: nn.Module) -> str:
    """Before 2.14 torch makes a traced network's buffers part of its checkpoint; they are then among its weights."""
    graph = trace(model.eval(), torch.ones(2, 3)).graph
    return structure_sha256(graph) + weights_sha256(graph)


@pytest.mark.parametrize(
    "changed",
    [
        Around(Opaque(gain=-1.0)),
        Around(Opaque(act=torch.tanh)),
        Around(Opaque(size=(1, 3))),
        Around(Opaque(table=torch.zeros(3))),
        Around(Opaque(_hidden="other")),
        Around(Opaque(kept_nowhere=torch.zeros(2))),
        Around(Renamed()),
        Around(nn.Sequential(Opaque(gain=2.0))),
        Around(Opaque(), gain=-1.0),
    ],
)
def test_what_a_checkpoint_does_not_hold_is_part_of_the_fingerprint(changed: nn.Module) -> None:
    usual = Around(nn.Sequential(Opaque()) if isinstance(changed.inner, nn.Sequential) else Opaque())
    assert structure(usual) != structure(changed)


def test_equal_modules_that_stay_whole_have_equal_fingerprints() -> None:
    assert structure(Around(Opaque())) == structure(Around(Opaque()))
    odd, again = ({"kept": object(), "table": {object(): 1, object(): None, "b": (2.0, torch.relu)}} for _ in range(2))
    assert structure(Around(Opaque(**odd))) == structure(Around(Opaque(**again)))


@pytest.mark.parametrize(
    "changed",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, norm_first=True),
        lambda: nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, activation="gelu"),
    ],
)
def test_what_pytorchs_own_attention_does_not_print_is_part_of_the_fingerprint(changed: Any) -> None:
    x = torch.randn(2, 3, 8)

    def found(layer: nn.Module) -> str:
        return structure_sha256(trace(nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).eval(), x).graph)

    usual = [found(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)) for _ in range(2)]
    assert usual[0] == usual[1] != found(changed())


def test_of_a_module_that_tracing_goes_into_only_the_graph_counts() -> None:
    plain, noted = Net(), Net()
    noted.note = "read by nothing"  # type: ignore[assignment]
    x = torch.ones(2, 3, 8, 8)
    assert structure_sha256(trace(plain, x).graph) == structure_sha256(trace(noted, x).graph)


def scored(validation_right: int, test_pct: float) -> str | None:
    row = ScoreRow(
        model="teacher",
        runtime="torch",
        precision="fp32",
        batch=1,
        threads=1,
        accuracy_pct=test_pct,
        n=10_000,
        drop_pp=0.0,
        drop_ci_pp=(0.0, 0.0),
        params=1,
        macs=1,
        size_bytes=1,
        latency_ms_p50=1.0,
        latency_ms_p95=1.0,
        latency_ms_p99=1.0,
        throughput_per_s=1.0,
        peak_memory_bytes=None,
        speedup=1.0,
        speedup_ci=(1.0, 1.0),
    )
    teacher = TeacherScore(
        accuracy=wilson(validation_right, 2000), chance_pct=10.0, macs=1, params=1, size_bytes=1, classes=10
    )
    return seen_in_training(teacher, Scorecard(verdict="PASS", reasons=(), notes=(), rows=(row,)))


def test_a_teacher_that_has_seen_its_validation_inputs_is_noticed() -> None:
    told = scored(1998, 93.4)
    assert told is not None
    assert "validation_from: test" in told
    assert scored(1880, 93.4) is None  # 94.0 %: within what chance allows
    assert scored(1800, 93.4) is None
