"""Plans within a number of bytes: with files that are known by hand, and once the whole way with real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from quantize_sample import Residual
from small_runs import digits_recipe, train
from torch import nn

from causal_compress.deploy.filesize import int8_bytes, onnx_bytes
from causal_compress.deploy.scorecard import verdict
from causal_compress.errors import BudgetError
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.pipeline import analyze, compress
from causal_compress.recipe import BudgetSection, PlanSection
from causal_compress.results import Candidates, Effects, Groups, Plan, Scorecard
from causal_compress.runs import read_result
from causal_compress.shrink.filesize import Params, plan_for_size
from causal_compress.shrink.latency import skeleton
from causal_compress.shrink.plan import least_share, make_plan
from causal_compress.understand.cost import count_params
from causal_compress.understand.trace import Network, trace

GRAPH = 9_000


@dataclass(frozen=True)
class Known:
    """A small network and all that was measured of it."""

    network: Network
    measured: tuple[Candidates, Effects, Groups]

    def planner(self, budget: BudgetSection) -> Plan:
        return make_plan(*self.measured, budget, PlanSection())

    def plan(self, sizer: Callable[[nn.Module], int], **budget: float) -> Plan:
        asked = BudgetSection.model_validate(budget)
        params = Params(self.measured[0].params, self.least)
        return plan_for_size(self.network, params, asked, self.planner, sizer, bytes_each=4)

    @property
    def least(self) -> float:
        candidates, effects, _ = self.measured
        return least_share("params", candidates, PlanSection(), effects.chain.regions)

    @property
    def whole(self) -> int:
        """Bytes of the teacher's weights."""
        return 4 * self.measured[0].params


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("teacher") / "weights.safetensors", epochs=2)


@pytest.fixture(scope="module")
def known(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Known:
    recipe = digits_recipe(weights)
    folder = tmp_path_factory.mktemp("analysis") / "run"
    analyze(recipe, folder)
    network = trace(build_model(recipe.model), load_data(recipe.data, seed=0).example_input)
    kinds = read_result(folder, "candidates", Candidates), read_result(folder, "intervene", Effects)
    return Known(network, (*kinds, read_result(folder, "group", Groups)))


def by_hand(model: nn.Module) -> int:
    """A graph that takes as much whatever the weights are, and four bytes for each of those."""
    return GRAPH + 4 * count_params(model)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_graph_counts_and_what_is_left_is_used(known: Known, share: float) -> None:
    limit = GRAPH + int(share * known.whole)
    plan = known.plan(by_hand, size_bytes=limit)
    assert plan.size_bytes == by_hand(skeleton(known.network, plan)) <= limit
    best = known.planner(BudgetSection(params=share))
    assert plan.predicted_harm_kl <= 1.2 * best.predicted_harm_kl + 1e-6  # as if the graph's bytes had been known


def test_shares_hold_beside_it(known: Known) -> None:
    roomy = GRAPH + known.whole
    assert known.plan(by_hand, size_bytes=roomy).predicted_harm_kl == 0.0
    both = known.plan(by_hand, size_bytes=roomy, params=0.5, macs=0.6)
    assert both.params <= 0.5
    assert both.macs <= 0.6


@pytest.mark.parametrize("limit", [100, GRAPH - 1, GRAPH + 40])
def test_too_few_bytes_are_refused(known: Known, limit: int) -> None:
    with pytest.raises(BudgetError, match="the file's size") as raised:
        known.plan(by_hand, size_bytes=limit)
    assert f"budget.size_bytes: {limit:,}" in str(raised.value)
    smallest = by_hand(skeleton(known.network, known.plan(by_hand, size_bytes=GRAPH + known.whole, params=known.least)))
    assert f"smallest file of a plan that was tried has {smallest:,} bytes" in str(raised.value)


def test_another_budget_that_cannot_be_met_is_named(known: Known) -> None:
    with pytest.raises(BudgetError, match=r"0\.\d+ of the MACs"):
        known.plan(by_hand, size_bytes=GRAPH + known.whole, macs=0.0001)


@pytest.fixture(scope="module")
def finished(weights: Path, known: Known, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Scorecard]:
    folder = tmp_path_factory.mktemp("size") / "run"
    limit = int(0.6 * onnx_bytes(known.network.graph, known.network.example_input))
    asked = {"macs": None, "size_bytes": limit, "max_accuracy_drop": None}
    recipe = digits_recipe(weights, budget=asked, distill=None, benchmark={"runtimes": ["torch"], "batches": [1]})
    return folder, limit, compress(recipe, folder).scorecard


def test_the_whole_way_within_a_size(finished: tuple[Path, int, Scorecard]) -> None:
    folder, limit, scorecard = finished
    size = (folder / "model.onnx").stat().st_size
    assert 0.8 * limit < size <= limit
    # the exporter's names differ by a few bytes between a network with and without weights
    assert read_result(folder, "plan", Plan).size_bytes == pytest.approx(size, rel=0.02)
    assert scorecard.verdict == "PASS"
    assert scorecard.reasons == (f"the ONNX file (fp32) has {size:,} bytes; the budget allows {limit:,}",)
    assert f"may have {limit:,} bytes" in (folder / "report.html").read_text(encoding="utf-8")


def test_verdicts_on_size(finished: tuple[Path, int, Scorecard]) -> None:
    rows = finished[2].rows
    size = next(row.size_bytes for row in rows if (row.model, row.runtime) == ("student", "onnxruntime"))
    assert verdict(rows, BudgetSection(size_bytes=size))[0] == "PASS"
    assert verdict(rows, BudgetSection(size_bytes=size - 1))[0] == "FAIL"
    eight = [replace(row, precision="int8", size_bytes=size // 3) for row in rows if row.model == "student"]
    outcome, (reason,) = verdict([*rows, *eight], BudgetSection(size_bytes=size // 2))
    assert outcome == "PASS"
    assert "the ONNX file (int8)" in reason
    elsewhere = [row for row in rows if row.runtime == "torch"]
    assert verdict(elsewhere, BudgetSection(size_bytes=size))[0] == "INCONCLUSIVE"


def test_int8_takes_a_byte_for_a_weight_and_something_for_each_layer() -> None:
    model = Residual()
    plain = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    assert plain < int8_bytes(model) < plain + 5_000
    assert int8_bytes(model) > int8_bytes(nn.Sequential(model.first, model.second, model.third))


def test_a_file_is_as_large_as_the_exporter_makes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = onnx_bytes(nn.Linear(300, 100), torch.randn(2, 300))
    assert 4 * 30_100 < size < 4 * 30_100 + 2_000
