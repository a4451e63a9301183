"""Plans within a latency: with timers that are known by hand, and once the whole way on the runtime itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import analysed, digits_recipe, train
from torch import Tensor, nn

from causal_compress.deploy.latency import covering, time_models
from causal_compress.deploy.scorecard import verdict
from causal_compress.errors import BudgetError
from causal_compress.pipeline import compress
from causal_compress.recipe import BenchmarkSection, BudgetSection, LatencySection, PlanSection
from causal_compress.results import Candidate, Candidates, Effects, Groups, Plan, Scorecard
from causal_compress.runs import read_result
from causal_compress.shrink.latency import Timer, measure_latency, plan_for_latency, skeleton
from causal_compress.shrink.plan import make_plan
from causal_compress.understand.cost import count_macs
from causal_compress.understand.trace import Network, trace

Models = Sequence[tuple[nn.Module, Tensor]]
SHORT = {"budget": {"macs": None, "latency_ms": {"keep": 0.9}, "max_accuracy_drop": None}, "distill": None}


@dataclass(frozen=True)
class Known:
    """A small network and all that was measured of it."""

    network: Network
    candidates: Candidates
    effects: Effects
    groups: Groups

    def plan(self, keep: float, timer: Timer, parts_timer: Timer | None = None) -> Plan:
        section = LatencySection(keep=keep)
        table = measure_latency(self.network, self.candidates, section, parts_timer or timer)
        budget = BudgetSection(latency_ms=section)
        measured = (self.candidates, self.effects, self.groups)
        return plan_for_latency(self.network, *measured, budget, PlanSection(), table, timer)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("teacher") / "weights.safetensors", epochs=2)


@pytest.fixture(scope="module")
def known(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known(*analysed(weights, tmp_path_factory.mktemp("analysis") / "run"))


def convolutions(network: nn.Module) -> float:
    """As if every convolution took a millisecond, whatever its width."""
    return float(sum(isinstance(module, nn.Conv2d) for module in network.modules()))


def each(time: Callable[[nn.Module], float]) -> Timer:
    def timer(models: Models) -> list[float]:
        return [time(model) + 0.01 for model, _ in models]

    return timer


def test_where_width_saves_no_time_a_plan_merges(known: Known) -> None:
    plan = known.plan(0.75, each(convolutions))
    assert "merge" in {decision.kind for decision in plan.decisions}
    assert not any("narrow" in decision.kind for decision in plan.decisions)
    assert plan.latency_measured is not None
    assert plan.latency_measured <= 0.75
    whole = convolutions(known.network.graph)
    assert plan.latency_measured == pytest.approx(convolutions(skeleton(known.network, plan)) / whole, abs=0.01)


def test_where_time_is_macs_latency_and_macs_agree(known: Known) -> None:
    example = known.network.example_input[:1]

    def timer(models: Models) -> list[float]:
        return [count_macs(model, x[:1]) / 1e3 + 1e-9 for model, x in models]

    plan = known.plan(0.6, timer)
    assert plan.latency == pytest.approx(plan.macs, abs=0.02)
    assert count_macs(skeleton(known.network, plan), example) == pytest.approx(
        sum(decision.macs_after for decision in plan.decisions), rel=0.01
    )


def test_a_network_slower_than_its_parts_is_planned_smaller(known: Known) -> None:
    whole = known.network.example_input.shape

    def timer(models: Models) -> list[float]:
        """Whole networks that are not the teacher take a third longer than their parts do."""
        slow = [1.33 if x.shape == whole and model is not known.network.graph else 1.0 for model, x in models]
        return [count_macs(model, x[:1]) / 1e3 * factor for (model, x), factor in zip(models, slow, strict=True)]

    plan = known.plan(0.6, timer)
    assert plan.latency_measured is not None
    assert plan.latency is not None
    assert plan.latency_measured <= 0.6
    assert plan.latency < 0.5


def test_one_lucky_reading_does_not_make_a_plan_fast_enough(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    def lucky(models: Models) -> list[float]:
        """The first reading of each network is 5 % too short."""
        times = at_once(models)
        return [0.95 * times[0], *times[1:]]

    plan = known.plan(0.6, lucky, at_once)
    assert plan.latency_measured is not None
    assert plan.latency_measured == pytest.approx(plan.macs, rel=1e-3)  # and not 5 % less
    assert "readings of one network's latency differ by 5 %" in caplog.text
    caplog.clear()
    known.plan(0.6, at_once)
    assert not caplog.text


def in_parts(models: Models) -> list[float]:
    """As if each part took two milliseconds more than it does in its network."""
    return [time + 2.0 for time in at_once(models)]


def at_once(models: Models) -> list[float]:
    return [count_macs(model, x[:1]) / 1e5 for model, x in models]


def test_the_runtime_judges_the_fastest_plan_though_by_its_parts_it_is_too_slow(known: Known) -> None:
    by_parts = LatencySection(keep=0.3)
    table = measure_latency(known.network, known.candidates, by_parts, in_parts)
    measured = (known.candidates, known.effects, known.groups)
    with pytest.raises(BudgetError):
        make_plan(*measured, BudgetSection(latency_ms=by_parts), PlanSection(), table)
    plan = known.plan(0.3, at_once, in_parts)
    assert plan.latency is not None
    assert plan.latency_measured is not None
    assert plan.latency_measured <= 0.3 < plan.latency


def test_too_little_time_is_refused_once_the_fastest_plan_was_timed(known: Known) -> None:
    timed: list[int] = []

    def counting(models: Models) -> list[float]:
        timed.append(len(models))
        return [convolutions(model) + 0.01 for model, _ in models]

    with pytest.raises(BudgetError, match=r"the fastest plan tried keeps 0\.\d+ of the teacher's latency") as raised:
        known.plan(0.01, counting)
    assert timed[1:] == [6]  # after the parts: one plan and the teacher, three times in turn
    said = re.search(r"keeps (0\.\d+)", str(raised.value))
    assert said is not None
    possible = float(said[1]) + 0.001
    assert known.plan(possible, each(convolutions)).latency_measured == pytest.approx(possible, abs=0.01)


def test_another_budget_that_cannot_be_met_is_not_blamed_on_latency(known: Known) -> None:
    section = LatencySection(keep=0.9)
    table = measure_latency(known.network, known.candidates, section, each(convolutions))
    budget = BudgetSection(latency_ms=section, macs=0.001)
    measured = (known.candidates, known.effects, known.groups)
    with pytest.raises(BudgetError, match=r"budget\.macs: 0\.001"):
        plan_for_latency(known.network, *measured, budget, PlanSection(), table, each(convolutions))


def test_what_a_latency_budget_names_is_measured_too() -> None:
    section = BenchmarkSection(runtimes=["torch"], batches=[1, 64], threads=[2])
    wider = covering(section, BudgetSection(latency_ms=LatencySection(keep=0.5, batch=8)))
    assert (wider.runtimes, wider.batches, wider.threads) == (["torch", "onnxruntime"], [1, 64, 8], [2, 1])
    assert covering(section, BudgetSection()) == section
    assert covering(section, BudgetSection(size_bytes=1)).runtimes == ["torch", "onnxruntime"]


def test_equal_parts_are_timed_once(known: Known) -> None:
    seen: list[int] = []

    def timer(models: Models) -> list[float]:
        seen.append(len(models))
        return [1.0 + index for index in range(len(models))]

    table = measure_latency(known.network, known.candidates, LatencySection(keep=0.5), timer)
    assert seen == [table.parts]
    assert table.parts < len(known.candidates.rows)
    assert len(table.ms) == len(known.candidates.rows)
    assert all(ms > 0 for ms in table.ms)


class Bottleneck(nn.Module):
    """Two layers in a row, of other kernels, beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.thin, self.wide, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.out(torch.relu(self.wide(torch.relu(self.thin(x))))))


class Bare(nn.Module):
    """A layer, then two whose weights are bare parameters, with a hidden width, beside a skip."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.first, self.second = nn.Parameter(torch.ones(hidden, 4, 1, 1)), nn.Parameter(torch.ones(4, hidden, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv2d(torch.relu(F.conv2d(self.conv(x), self.first)), self.second)


def chain(*blocks: nn.Module) -> Network:
    ends = nn.Conv2d(1, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return trace(nn.Sequential(ends[0], nn.ReLU(), *blocks, ends[1]).eval(), torch.rand(2, 1, 8, 8))


def as_measured(network: Network, *changes: tuple[int, dict[str, int], dict[str, int]]) -> Candidates:
    """Every region whole, then some in widths and ranks, as if anything had been measured of them."""
    whole: list[tuple[int, dict[str, int], dict[str, int]]] = [(i, {}, {}) for i in range(len(network.regions))]
    zero = dict.fromkeys(("macs_fixed", "macs_out", "params_fixed", "params_out"), 0)
    rows = [
        Candidate(
            first=index,
            last=index,
            representative=index,
            adapter=None,
            widths=widths,
            inputs_kept=1.0,
            ranks=ranks,
            **zero,
            harm_kl=0.0,
            harm_stderr=0.0,
            relative_error=0.0,
        )
        for index, widths, ranks in (*whole, *changes)
    ]
    return Candidates(
        rows=tuple(rows),
        cut_groups={},
        regions=len(whole),
        macs=1,
        params=1,
        skipped=(),
        inputs=1,
        heldout=1,
        seconds=0.0,
    )


def time_all(network: Network, candidates: Candidates) -> tuple[list[float], int]:
    """What each candidate takes where time is parameters, and how many parts were timed."""
    weigh = each(lambda model: float(sum(value.numel() for value in model.parameters())))
    table = measure_latency(network, candidates, LatencySection(keep=0.5), weigh)
    return list(table.ms), table.parts


@pytest.mark.parametrize("kept", [({"thin": 2, "wide": 6}, {"thin": 6, "wide": 2}), ({"thin": 2}, {"wide": 2})])
@pytest.mark.parametrize("kind", ["widths", "ranks"])
def test_equal_sizes_of_different_layers_are_timed_apart(kind: str, kept: tuple[dict[str, int], ...]) -> None:
    network = chain(Bottleneck())
    name = network.regions[1].info.name
    sizes = [{f"{name}.{layer}": count for layer, count in counts.items()} for counts in kept]
    changes = [(1, size, {}) if kind == "widths" else (1, {}, size) for size in sizes]
    ms, _ = time_all(network, as_measured(network, *changes))
    assert ms[-1] != ms[-2]


def test_equal_blocks_in_equal_sizes_are_timed_once() -> None:
    network = chain(Bottleneck(), Bottleneck())
    names = [next(name for name in network.regions[i].info.modules if name.endswith("wide")) for i in (1, 2)]
    ms, parts = time_all(network, as_measured(network, (1, {names[0]: 4}, {}), (2, {names[1]: 4}, {})))
    assert ms[1] == ms[2] > ms[-1] == ms[-2]
    assert parts == len(network.regions)  # two ends, the block, the narrower block


def test_bare_parameters_of_other_shapes_are_timed_apart() -> None:
    network = chain(Bare(8), Bare(16))
    ms, _ = time_all(network, as_measured(network))
    assert ms[1] < ms[2]


def test_times_are_medians_of_the_runtime(known: Known) -> None:
    small, large = nn.Conv2d(4, 4, 3, padding=1).eval(), nn.Sequential(*[nn.Conv2d(64, 64, 3) for _ in range(4)]).eval()
    inputs = [Tensor(2, 4, 16, 16), Tensor(2, 64, 32, 32)]
    fast, slow = time_models(list(zip([small, large], inputs, strict=True)), LatencySection(keep=0.5))
    assert 0 < fast < slow


@pytest.fixture(scope="module")
def finished(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scorecard]:
    folder = tmp_path_factory.mktemp("latency") / "run"
    recipe = digits_recipe(weights, **SHORT, benchmark={"runtimes": ["onnxruntime"], "batches": [1]})
    return folder, compress(recipe, folder).scorecard


def test_the_whole_way_within_a_latency(finished: tuple[Path, Scorecard]) -> None:
    folder, scorecard = finished
    plan = read_result(folder, "plan", Plan)
    assert plan.latency_measured is not None
    assert plan.latency_measured <= 0.9
    assert "latency kept on onnxruntime fp32, batch 1, 1 thread(s)" in " ".join(scorecard.reasons)
    stages = [stage["stage"] for stage in json.loads((folder / "run.json").read_text())["stages"]]
    assert stages.index("candidates") < stages.index("latency") < stages.index("plan")


def test_verdicts_on_latency(finished: tuple[Path, Scorecard]) -> None:
    interval = (1.5, 2.0)  # what was measured may be too near 1 on a slow machine
    rows = tuple(replace(row, speedup_ci=interval) if row.model == "student" else row for row in finished[1].rows)
    share = 1.0 / np.array(interval)
    for keep, expected in ((share.max() * 1.05, "PASS"), (share.min() * 0.95, "FAIL")):
        budget = BudgetSection(latency_ms=LatencySection(keep=min(float(keep), 1.0)))
        assert verdict(rows, budget)[0] == expected
    elsewhere = BudgetSection(latency_ms=LatencySection(keep=0.5, batch=512))
    outcome, reasons = verdict(rows, elsewhere)
    assert outcome == "INCONCLUSIVE"
    assert "was not measured" in " ".join(reasons)
