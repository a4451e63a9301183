"""Plans within a number of bytes: with files that are known by hand, and once the whole way with real ones."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quantize_sample import Residual, Sequence, Split
from small_runs import analysed, digits_recipe, train
from torch import nn

from causal_compress.deploy.faster import chosen_for_size
from causal_compress.deploy.filesize import bytes_each, file_bytes
from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.quantize import quantize
from causal_compress.deploy.scorecard import verdict
from causal_compress.errors import BudgetError
from causal_compress.pipeline import compress
from causal_compress.recipe import BudgetSection, PlanSection, QuantizeSection
from causal_compress.results import Candidates, Effects, Groups, Plan, Scorecard
from causal_compress.runs import read_result
from causal_compress.shrink.filesize import file_costs, plan_for_size
from causal_compress.shrink.latency import skeleton
from causal_compress.shrink.plan import make_plan
from causal_compress.understand.cost import count_params
from causal_compress.understand.trace import Network

BIASLESS = Path(__file__)
GRAPH = 9_000


class Plain(nn.Module):
    """Convolutions that have neither biases nor batch norms."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 12, 12, 12, 12]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def biasless(num_classes: int = 10) -> nn.Module:
    """For --arch."""
    return Plain()


@dataclass(frozen=True)
class Known:
    """A small network and all that was measured of it."""

    network: Network
    measured: tuple[Candidates, Effects, Groups]

    def plan(self, sizer: Callable[[nn.Module], int], **budget: float) -> Plan:
        costs = file_costs(self.network, sizer, 4)

        def planner(budget: BudgetSection) -> Plan:
            return make_plan(*self.measured, budget, PlanSection(), file=costs)

        return plan_for_size(self.network, BudgetSection.model_validate(budget), planner, sizer)

    def within(self, **budget: float) -> Plan:
        return make_plan(*self.measured, BudgetSection.model_validate(budget), PlanSection())

    @property
    def whole(self) -> int:
        """Bytes of the teacher's weights."""
        return 4 * self.measured[0].params


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("teacher") / "weights.safetensors", epochs=2)


@pytest.fixture(scope="module")
def known(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Known:
    network, *measured = analysed(weights, tmp_path_factory.mktemp("analysis") / "run")
    return Known(network, tuple(measured))


def by_hand(model: nn.Module) -> int:
    """A graph that takes as much whatever the weights are, and four bytes for each of those."""
    return GRAPH + 4 * count_params(model)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_graph_counts_and_what_is_left_is_used(known: Known, share: float) -> None:
    limit = GRAPH + int(share * known.whole)
    plan = known.plan(by_hand, size_bytes=limit)
    assert plan.size_bytes == by_hand(skeleton(known.network, plan)) <= limit
    best = known.within(params=share)
    assert plan.predicted_harm_kl <= 1.2 * best.predicted_harm_kl + 1e-6  # as if the graph's bytes had been known


def test_a_layer_more_is_paid_for(known: Known) -> None:
    """Splits save parameters and add layers; where these are most of a file, plans don't split."""

    def heavy(model: nn.Module) -> int:
        layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
        return 20_000 * layers + 4 * count_params(model)

    plan = known.plan(heavy, size_bytes=int(0.75 * heavy(known.network.graph)))
    assert plan.size_bytes is not None
    assert not any(decision.candidate.ranks for decision in plan.decisions)
    assert any(decision.candidate.first < decision.candidate.last for decision in plan.decisions)


@pytest.mark.parametrize("room", [1.0, 1.01, 1.03, 1.1])
def test_a_plan_is_found_though_by_its_parts_there_is_none(known: Known, room: float) -> None:
    """Files of all but the teacher are smaller than their parts add up to, by half a graph."""

    def lighter(model: nn.Module) -> int:
        return by_hand(model) - (0 if 4 * count_params(model) == known.whole else GRAPH // 2)

    def sizes() -> Iterator[int]:
        for share in np.geomspace(0.02, 0.9, 30):
            with contextlib.suppress(BudgetError):
                yield lighter(skeleton(known.network, known.within(params=float(share))))

    limit = int(room * next(sizes()))
    by_parts = file_costs(known.network, lighter, 4)
    with pytest.raises(BudgetError):
        make_plan(*known.measured, BudgetSection(size_bytes=limit), PlanSection(), file=by_parts)
    plan = known.plan(lighter, size_bytes=limit)
    assert plan.size_bytes == lighter(skeleton(known.network, plan)) <= limit


def test_a_larger_file_is_never_worse(known: Known) -> None:
    limits = [GRAPH + int(share * known.whole) for share in (0.2, 0.3, 0.4, 0.6, 0.9)]
    harms = [known.plan(by_hand, size_bytes=limit).predicted_harm_kl for limit in limits]
    assert all(later <= 1.1 * earlier + 1e-6 for earlier, later in itertools.pairwise(harms))


def test_shares_hold_beside_it(known: Known) -> None:
    roomy = GRAPH + known.whole
    assert known.plan(by_hand, size_bytes=roomy).predicted_harm_kl == 0.0
    both = known.plan(by_hand, size_bytes=roomy, params=0.5, macs=0.6)
    assert both.params <= 0.5
    assert both.macs <= 0.6


@pytest.mark.parametrize("limit", [100, GRAPH // 4])
def test_too_few_bytes_are_refused_and_what_would_be_possible_is_said(known: Known, limit: int) -> None:
    with pytest.raises(BudgetError) as raised:
        known.plan(by_hand, size_bytes=limit)
    assert f"budget.size_bytes: {limit:,}" in str(raised.value)
    said = re.search(r"about ([\d,]+) bytes", str(raised.value))
    assert said is not None
    possible = int(said[1].replace(",", ""))
    assert known.plan(by_hand, size_bytes=2 * possible).size_bytes <= 2 * possible


def test_the_limit_that_cannot_be_met_is_named(known: Known) -> None:
    with pytest.raises(BudgetError, match=r"budget\.macs: 0\.0001") as raised:
        known.plan(by_hand, size_bytes=GRAPH + known.whole, macs=0.0001)
    assert re.search(r"0\.\d+ of the MACs", str(raised.value))


@pytest.fixture(scope="module")
def finished(weights: Path, known: Known, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, Scorecard]:
    folder = tmp_path_factory.mktemp("size") / "run"
    limit = int(0.6 * file_bytes(known.network.graph, known.network.example_input, eight=False))
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
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert f"may have {limit:,} bytes" in report
    assert f"Asked for: a file of at most {limit:,} bytes." in report


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


@pytest.mark.parametrize("budget", [{"size_bytes": 10_500}, {"params": 0.4}], ids=["size", "params"])
def test_biases_that_refits_add_are_planned_for(tmp_path: Path, budget: dict[str, float]) -> None:
    """Plans right at their limit: without the biases that refits add it would be missed by a few."""
    arch = {"arch": f"{BIASLESS}:biasless", "args": {}}
    base = digits_recipe(None)
    # This seed's second layer is kept before the first change, and its refit would fit the noise of rounding.
    recipe = base.model_copy(update={"model": base.model.model_copy(update=arch), "seed": 2})
    weights = train(recipe, tmp_path / "weights.safetensors", epochs=2)
    asked = {"macs": None, "max_accuracy_drop": None, **budget}
    plain = {"runtimes": ["onnxruntime"], "batches": [1], "repeats": 2}
    # All regions after the first change are refitted, and none of them has a bias to begin with.
    made = digits_recipe(None, budget=asked, distill=None, benchmark=plain, plan={"low_rank": False, "depth": False})
    model = made.model.model_copy(update={**arch, "weights": str(weights)})
    scorecard = compress(made.model_copy(update={"model": model}), tmp_path / "run").scorecard
    assert scorecard.verdict == "PASS", scorecard.reasons
    planned = read_result(tmp_path / "run", "plan", Plan).size_bytes
    size = (tmp_path / "run" / "model.onnx").stat().st_size
    assert (planned is None) == ("params" in budget)
    assert planned is None or size == planned <= 10_500


@pytest.mark.parametrize("model", [Residual(), Sequence()], ids=lambda model: type(model).__name__)
def test_the_size_of_an_int8_file_is_that_of_the_file_made(model: nn.Module, tmp_path: Path) -> None:
    split = Split(64, 0)
    path = tmp_path / "model.onnx"
    export_onnx(model.eval(), split.x[:2], path, opset=18)
    section = QuantizeSection(families=["cpu"], methods=["minmax"], inputs=32, max_accuracy_drop=100.0)
    data = SimpleNamespace(calibration=split, validation=split)
    made = quantize(model, path, data, section, tmp_path, timer=lambda *_: (np.ones(9), np.full(9, 2.0)))
    size = made.files[0].size_bytes
    assert file_bytes(model, split.x[:2], eight=True) == pytest.approx(size, rel=0.02)
    assert made.chosen == "fp32"  # it took twice as long
    assert chosen_for_size(made, None) is made
    assert chosen_for_size(made, size - 1) is made
    assert chosen_for_size(made, made.fp32_size_bytes) is made
    small = chosen_for_size(made, size)
    assert small.chosen == "int8"
    assert "only INT8 is small enough" in small.reason


def test_files_for_other_runtimes_than_cpus_are_not_planned_for() -> None:
    assert bytes_each(None) == 4
    assert bytes_each(QuantizeSection(families=["tensorrt"])) == 4
    assert bytes_each(QuantizeSection()) == 1


def test_a_file_is_as_large_as_the_exporter_makes_it() -> None:
    torch.manual_seed(0)
    size = file_bytes(nn.Linear(300, 100), torch.randn(2, 300), eight=False)
    assert 4 * 30_100 < size < 4 * 30_100 + 2_000
