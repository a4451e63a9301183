"""Exact algebra: what is folded computes the same, is remembered, replayed, and counted against the whole teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_compress.afterwards import reopen, replay
from causal_compress.inputs.data import load_data
from causal_compress.pipeline import compress
from causal_compress.recipe import DataSection
from causal_compress.recipe_file import load_recipe
from causal_compress.understand.algebra import folded, saved, simplify, told
from causal_compress.understand.cost import count_params
from causal_compress.understand.trace import trace

SOURCE = """
import torch
import torch.nn as nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12 * 64, 16), nn.ReLU(), nn.Linear(16, 3),
    )
"""


def pooled(side: int) -> nn.Sequential:
    """A convolution of stride 4 on 8 pixels leaves 2 x 2 positions, which the pooling makes `side` x `side`."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Dropout(), nn.Linear(5 * side**2, 7), nn.ReLU()]
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=4, padding=1), nn.ReLU(), *head, nn.Linear(7, 4)).eval()


def grey(n: int, channels: int = 3) -> Tensor:
    """Images whose channels are equal."""
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(1, channels, 1, 1)


@pytest.mark.parametrize("form", ["view", "reshape", "view of a known length"])
def test_rows_that_are_made_by_a_view_count_if_their_length_is_left_open(form: str) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.linear = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(x)
            rows = y.reshape(x.shape[0], -1) if form == "reshape" else y.view(x.size(0), -1 if form == "view" else 48)
            answer: Tensor = self.linear(rows)
            return answer

    x = torch.randn(6, 3, 2, 2)
    before = trace(Viewed(), x[:2])
    after = simplify(before)
    assert bool(after.folds) == (form != "view of a known length")
    torch.testing.assert_close(after.graph(x), before.graph(x))


@pytest.mark.parametrize("side", [3, 4, 6])
def test_a_pooling_that_repeats_is_left_out_exactly(side: int) -> None:
    x = torch.randn(6, 3, 8, 8)
    before = trace(pooled(side), x[:2])
    after = simplify(before)
    assert [(fold.layer, fold.inputs, fold.kept) for fold in after.folds] == [("5", 5 * side**2, 20)]
    torch.testing.assert_close(after.graph(x), before.graph(x))
    torch.testing.assert_close(after.teacher(x), before.graph(x))
    assert saved(after)[1] == count_params(before.graph) - count_params(after.graph) == 7 * 5 * (side**2 - 4)
    assert sum(region.info.params for region in after.regions) == count_params(after.graph)


def test_a_pooling_that_averages_stays() -> None:
    for side in (1, 2):  # as many positions as there are, or fewer
        network = trace(pooled(side), torch.randn(2, 3, 8, 8))
        assert simplify(network) is network


FAULTS = ["read twice", "activation between", "layer used twice", "weights read by a function", "rows not flattened"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pooling_whose_reader_can_not_be_changed_stays(fault: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = fault == "rows not flattened"
            self.pool, self.linear = nn.AdaptiveAvgPool2d((1, 48) if rows else 4), nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.pool(x)
            if fault == "activation between":
                return self.linear(torch.tanh(wide).flatten(1))
            if fault == "rows not flattened":
                answer: Tensor = self.linear(wide).flatten(1)
                return answer
            answer = self.linear(wide.flatten(1))
            if fault == "weights read by a function":
                return answer + F.linear(wide.flip(-1).flatten(1), self.linear.weight)
            if fault == "read twice":
                return answer + wide.mean((1, 2, 3))[:, None]
            return answer + self.linear(wide.flip(-1).flatten(1))

    network = trace(Odd(), torch.randn(2, 3, 2, 2))
    assert simplify(network) is network


def test_copied_channels_are_read_once_and_only_where_they_are_copies() -> None:
    network = trace(pooled(1), grey(2))
    assert simplify(network, repeated=1) is network
    after = simplify(network, repeated=3)
    assert [(fold.layer, fold.kind, fold.kept) for fold in after.folds] == [("0", "channels", 1)]
    torch.testing.assert_close(after.graph(grey(6)), network.graph(grey(6)))
    assert after.graph.get_submodule("0").weight.shape == (5, 1, 3, 3)
    assert "reads 1 of 3 inputs" in told(after.folds)[0].what


def test_a_first_layer_called_by_keyword_reads_one_channel_too() -> None:
    class Named(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first, self.shared = nn.Conv2d(3, 4, 3), shared

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(input=x)
            if self.shared:
                y = F.conv2d(y[:, :3], self.first.weight)
            return y.mean((2, 3))

    network = trace(Named(shared=False), grey(2))
    torch.testing.assert_close(simplify(network, repeated=3).graph(grey(6)), network.graph(grey(6)))
    network = trace(Named(shared=True), grey(2))
    assert simplify(network, repeated=3) is network


def test_excluded_layers_are_not_folded() -> None:
    network = trace(pooled(4), grey(2))
    assert [fold.layer for fold in simplify(network, repeated=3).folds] == ["5", "0"]
    assert [fold.layer for fold in simplify(network, repeated=3, allowed=lambda name: name != "0").folds] == ["5"]


@pytest.mark.parametrize(
    ("channels", "mean", "copies"), [(3, [0.5] * 3, 3), (3, [0.5, 0.4, 0.5], 1), (3, None, 3), (None, None, 1)]
)
def test_data_says_whether_channels_are_copies(
    tmp_path: Path, channels: int | None, mean: list[float] | None, copies: int
) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.integers(0, 255, (300, 8, 8), dtype=np.uint8), y=np.arange(300) % 3)
    normalize: dict[str, Any] = {"mean": mean, "std": None if mean is None else [0.5] * 3}
    section = DataSection(
        source=f"npz:{tmp_path / 'd.npz'}", channels=channels, normalize=normalize, calibration=32, validation=32
    )
    data = load_data(section, seed=0)
    assert data.copied_channels == copies
    assert (copies > 1) == bool(
        len(data.example_input[0]) > 1 and (data.example_input[:, 0] == data.example_input[:, 1]).all()
    )


def test_folds_can_be_taken_back_and_repeated() -> None:
    network = simplify(trace(pooled(6), grey(2)), repeated=3)
    assert len(network.folds) == 2
    raw = folded(network, ())
    assert raw.folds == ()
    assert count_params(raw.graph) == count_params(network.teacher)
    again = folded(raw, network.folds)
    torch.testing.assert_close(again.graph(grey(4)), network.graph(grey(4)))
    assert folded(network, network.folds) is network


def test_a_run_with_folds_counts_against_the_whole_teacher_and_is_replayed(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    rng = np.random.default_rng(0)
    y = np.arange(900) % 3
    x = rng.integers(0, 60, (900, 16, 16)).astype(np.uint8)
    x[np.arange(900), 4 + 3 * y] += 120  # a bright line says the class
    np.savez(tmp_path / "d.npz", x=x, y=y)
    given = {
        "model.arch": f"{tmp_path / 'net.py'}:net", "data.source": f"npz:{tmp_path / 'd.npz'}", "data.channels": 3,
        "data.calibration": 128, "data.validation": 100, "plan.inputs": 64, "plan.heldout": 64, "plan.min_channels": 2,
        "intervene.inputs": 64, "budget.params": 0.2, "budget.macs": None, "benchmark": None, "distill": None,
        "quantize": {},
    }  # fmt: skip
    recipe = load_recipe(None, [f"{key}={'null' if value is None else value}" for key, value in given.items()])
    outcome = compress(recipe, tmp_path / "run", force=True)
    finished = reopen(tmp_path / "run")
    whole, student = count_params(finished.network.teacher), count_params(finished.student.graph)
    assert whole == 224 + 876 + 12304 + 51
    assert student <= 0.2 * whole
    assert {fold.kind for fold in finished.student.surgery.folds} == {"pooling", "channels"}
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    again = replay(namespace["net"](), tmp_path / "run").eval()
    probe, _ = finished.data.validation.take(range(8))
    torch.testing.assert_close(again(probe), finished.student.graph.eval()(probe))
    assert "exact" in (outcome.folder / "report.html").read_text()
