"""What full recoveries cost and teach a search: on made-up curves, each with what was done before it was mended."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from report_sample_later import full_sample
from small_runs import digits_recipe, train
from test_search import point

from causal_compress import planning, stages
from causal_compress.errors import BudgetError, NumericalError
from causal_compress.explain.report import build_report
from causal_compress.files import sha256_of_json
from causal_compress.pipeline import compress
from causal_compress.recipe import Recipe, SearchSection
from causal_compress.results import Pareto, Plan, SearchPoint
from causal_compress.runs import read_result
from causal_compress.shrink.search import refuse_unsure, search

Curve = Callable[[float], float]
LIMIT = 0.5


@dataclass
class Tried:
    """Drops over the share of MACs after short and full recoveries, and at which shares these were asked for."""

    short: Curve
    full: Curve | None
    fully: list[float] = field(default_factory=list)

    def briefly(self, share: float) -> SearchPoint:
        return replace(point(share, self.short(share)), epochs=2)

    def in_full(self, share: float) -> SearchPoint | None:
        self.fully.append(share)
        return None if self.full is None else replace(point(share, self.full(share)), epochs=20)

    def search(self, least: float = 0.02, **section: float) -> Pareto:
        asked = SearchSection.model_validate(section)
        return search(self.briefly, asked, limit_pp=LIMIT, least=least, in_full=self.in_full)


def through(half: float, larger: float) -> Curve:
    """A straight line over the logarithm of the share, through drops at 0.5 and 0.7018."""
    return lambda share: max(0.0, half + (larger - half) * math.log(share / 0.5) / math.log(0.7018 / 0.5))


def measured() -> Tried:
    """ResNet-20 on CIFAR-10, as the search met it."""
    return Tried(through(1.64, 0.74), through(0.98, 0.18))


def healing() -> Tried:
    """0.5 heals nearly completely, smaller sizes less and less; 0.247 is where the limit lies."""
    return Tried(lambda share: 0.7 * (0.5 / share) ** 2, lambda share: 0.03 * (0.5 / share) ** 4)


def chosen(found: Pareto) -> SearchPoint:
    return found.points[found.chosen]


def test_two_full_recoveries_are_the_rule_and_where_more_would_look_is_said() -> None:
    tried = measured()
    found = tried.search()
    assert tried.fully == [0.5, pytest.approx(0.702, abs=0.001)]
    assert chosen(found).asked_macs == tried.fully[1]
    assert "sizes between 0.495 (0.98 pp in full) and 0.695 were not tried: a larger search.full" in found.reason


@pytest.mark.parametrize(("full", "edge"), [(3, 0.6128), (5, 0.6128)])
def test_more_full_recoveries_look_between_what_is_known_in_full(full: int, edge: float) -> None:
    tried = measured()
    found = tried.search(full=full)
    assert len(tried.fully) <= full
    assert chosen(found).asked_macs == pytest.approx(edge, abs=0.001)
    assert (chosen(found).epochs, found.met) == (20, True)
    assert {p.asked_macs for p in found.points if p.epochs == 2} == {0.5, tried.fully[1]}  # the others in full only
    assert "search.full" not in found.reason  # what lies between is too near


def test_with_one_full_recovery_the_chosen_size_gets_its_own_all_the_same() -> None:
    tried = measured()
    found = tried.search(full=1)
    assert len(tried.fully) == 2
    assert chosen(found).epochs == 20


def test_a_small_drop_that_heals_says_little_of_large_ones() -> None:
    found = healing().search()
    assert found.met
    assert chosen(found).asked_macs < 0.4
    assert chosen(healing().search(full=5)).asked_macs == pytest.approx(0.247, rel=0.1)
    by_short = {p.asked_macs: p.judged_pp for p in found.points if p.epochs == 2}
    assert by_short[0.1] > 14.0  # of 17.5 pp; only the first few are known to heal


def test_before_nothing_is_said_to_hold_the_largest_size_is_recovered_in_full() -> None:
    tried = Tried(lambda share: 3.0 * (1.0 - share) + 1.0, lambda share: 2.4 if share < 0.6 else 0.1)
    found = tried.search()
    assert (found.met, chosen(found).asked_macs) == (True, 0.9085)
    assert "were not recovered in full: a larger search.full looks there" in found.reason
    more = Tried(tried.short, tried.full).search(full=4)
    assert 0.6 <= chosen(more).asked_macs < 0.75

    never = Tried(tried.short, lambda _: 2.4)
    found = never.search()
    assert not found.met
    assert max(p.asked_macs for p in found.points) in never.fully
    assert chosen(found).epochs == 20
    assert f"validation drop {chosen(found).drop_pp:.2f} pp" in found.reason
    assert "and 1 were not tried" in found.reason


def test_nothing_is_spent_on_what_is_beyond_hope() -> None:
    short: Curve = lambda share: 0.2 if share >= 0.45 else min(85.0, 2.0 * (0.45 / share) ** 4)  # noqa: E731
    tried = Tried(short, lambda share: short(share) / 2)
    found = tried.search()
    assert all(short(share) <= 8 * LIMIT for share in tried.fully)
    assert (found.met, chosen(found).asked_macs) == (True, 0.5)

    untrained = Tried(short, tried.full)  # networks that nobody has trained may lose anything
    search(
        lambda share: point(share, 30.0 * (1.0 - share)),
        SearchSection(points=2),
        limit_pp=LIMIT,
        least=0.02,
        in_full=untrained.in_full,
    )
    assert untrained.fully[0] == 0.5


@pytest.mark.parametrize("full", [2, 3])
def test_a_size_that_holds_after_a_short_recovery_is_recovered_in_full_too(full: int) -> None:
    tried = Tried(lambda _: 0.3, lambda share: 0.3 if share > 0.25 else 9.0)
    found = tried.search(points=3, least=0.2, full=full)
    assert (found.met, chosen(found).epochs) == (True, 20)
    assert chosen(found).asked_macs > 0.25
    held = Tried(lambda _: 0.0, lambda _: 0.0)
    assert chosen(held.search(points=3, full=full)).asked_macs == held.fully[-1]
    assert len(held.fully) == 1  # nothing failed, so that there is nothing to look for below
    with pytest.raises(BudgetError, match="none of them recovered in full"):
        Tried(lambda _: 0.3, None).search(points=3, least=0.2)


def test_confirmations_that_fail_do_not_go_on_for_ever() -> None:
    """Each smaller size is expected to hold by what healed at a larger one, and none does."""
    tried = Tried(lambda share: 1.6 * (0.5 / share) ** 0.35, lambda share: 0.2 if share >= 0.5 else 0.505)
    found = tried.search(points=9)
    assert len(tried.fully) == 2
    assert (found.met, chosen(found).asked_macs) == (True, 0.5)


@given(
    st.floats(0.1, 6.0), st.floats(0.2, 4.0), st.floats(0.0, 1.2), st.integers(1, 6), st.integers(1, 6), st.booleans()
)
def test_whatever_the_curves(scale: float, bend: float, left: float, points: int, full: int, odd: bool) -> None:
    short: Curve = lambda share: scale * ((1.0 / share) ** bend - 1.0)  # noqa: E731
    tried = Tried(short, lambda share: left * short(share) * (1.5 if odd and round(1e4 * share) % 2 else 1.0))
    found = tried.search(points=points, full=full)
    assert len(set(tried.fully)) == len(tried.fully) <= max(full, points) + 2
    assert chosen(found).epochs == 20
    assert found.met == (chosen(found).drop_pp <= LIMIT)
    assert found.met or chosen(found).asked_macs == max(p.asked_macs for p in found.points) or odd
    assert found.sizes == len({p.asked_macs for p in found.points})
    assert found.in_full == len(tried.fully)


def test_the_chosen_size_is_on_the_front() -> None:
    found = Tried(lambda share: 2 * (1 - share), lambda share: 1.2 * (1 - share)).search()
    assert found.chosen in found.front
    on_front = [found.points[index].asked_macs for index in found.front]
    assert len(set(on_front)) == len(on_front) == found.sizes


def test_a_confidence_that_few_inputs_cannot_give_is_refused() -> None:
    with pytest.raises(BudgetError) as raised:
        refuse_unsure(SearchSection(confidence=0.975), limit_pp=0.5, n=200)
    assert "found: 200 validation inputs" in str(raised.value)
    assert "0.97 pp" in str(raised.value)
    assert "wanted: at least 390 validation inputs" in str(raised.value)
    assert "data.validation" in str(raised.value)
    refuse_unsure(SearchSection(confidence=0.975), limit_pp=0.5, n=390)
    with pytest.raises(BudgetError, match="at least 390"):
        refuse_unsure(SearchSection(confidence=0.975), limit_pp=0.5, n=389)
    with pytest.raises(BudgetError, match="a limit above 0"):
        refuse_unsure(SearchSection(confidence=0.6), limit_pp=0.0, n=10_000)
    refuse_unsure(SearchSection(), limit_pp=0.0, n=2)


def test_an_older_search_is_still_read() -> None:
    found = measured().search()
    old = TypeAdapter(Pareto).dump_python(found, mode="json")
    del old["remains"]
    read = TypeAdapter(Pareto).validate_python(old)
    assert (read.points, read.sizes, read.in_full) == (found.points, 2, 2)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (measured().search(), "2 sizes of the network were made, trained and measured on the validation data, 2 of"),
        (measured().search(full=3), "3 sizes of the network were made, trained and measured on the validation data, 3"),
        (healing().search(), "after a full recovery of 20 epochs, the others after a short one only"),
        (
            search(lambda share: point(share, 0.0), SearchSection(points=1), limit_pp=LIMIT, least=0.1),
            "1 size of the network was made and measured on the validation data, without any training",
        ),
    ],
)
def test_the_report_counts_sizes_and_full_recoveries(found: Pareto, told: str) -> None:
    text = build_report(replace(full_sample(), pareto=found))
    assert told in " ".join(text.replace("\u00a0", " ").split())
    assert found.reason in text


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(digits_recipe(None), tmp_path_factory.mktemp("teacher") / "teacher.safetensors", epochs=3)


def searched(weights: Path, limit: float, **section: float) -> Recipe:
    return digits_recipe(
        weights,
        budget={"macs": None, "max_accuracy_drop": limit},
        search={"points": 2, "epochs": 1, **section},
        distill={"epochs": 3},
        benchmark={"runtimes": ["torch"], "batches": [1]},
    )


@pytest.fixture(scope="module")
def earlier(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The weights, and a search that is over."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    compress(searched(weights, 3.0), folder)
    return weights, folder


@pytest.fixture
def recoveries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs of every recovery from now on."""
    seen: list[int] = []
    recover = stages.distill

    def counted(*given: Any, **named: Any) -> Any:
        seen.append(given[4].epochs)
        return recover(*given, **named)

    monkeypatch.setattr(stages, "distill", counted)
    return seen


def test_a_network_that_two_budgets_lead_to_recovers_once(weights: Path, recoveries: list[int], tmp_path: Path) -> None:
    recipe = searched(weights, 3.0)
    depth_alone = recipe.plan.model_copy(update={"width": False, "low_rank": False})
    for share in (0.65, 0.55, 0.49):
        budget = recipe.budget.model_copy(update={"macs": share})
        one = recipe.model_copy(update={"plan": depth_alone, "budget": budget})
        compress(one, tmp_path / str(share), reuse=None if share == 0.65 else tmp_path / "0.65")
    plans = [read_result(tmp_path / share, "plan", Plan) for share in ("0.65", "0.55", "0.49")]
    assert plans[0].decisions == plans[1].decisions != plans[2].decisions
    assert recoveries == [3, 3]


@pytest.mark.parametrize(("limit", "section"), [(3.0, {"points": 3}), (1.0, {})])
def test_another_search_takes_over_the_recoveries_of_an_earlier_one(
    limit: float, section: dict[str, float], earlier: tuple[Path, Path], tmp_path: Path, recoveries: list[int]
) -> None:
    weights, old = earlier
    recoveries.clear()
    compress(searched(weights, limit, **section), tmp_path / "run", reuse=old)
    first, second = ({path.name for path in (run / "points").iterdir()} for run in (old, tmp_path / "run"))
    assert first & second
    assert len(recoveries) == len(second - first)


def test_recoveries_of_a_run_that_went_by_the_plans_key_are_taken_over(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recoveries: list[int]
) -> None:
    recipe = searched(weights, 3.0)
    fixed = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"macs": 0.5})})
    with monkeypatch.context() as before:
        before.setattr(stages, "surgery_depends", lambda *given: {"plan": given[2], "rewrite": given[4].rewrite})
        compress(fixed, tmp_path / "old")
    assert recoveries == [3]
    compress(fixed, tmp_path / "new", reuse=tmp_path / "old")
    (tmp_path / "old" / "scorecard.json").unlink()
    compress(fixed, tmp_path / "old")
    assert recoveries == [3]


def test_a_damaged_size_is_told_and_left_aside(
    earlier: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, recoveries: list[int]
) -> None:
    weights, old = earlier
    shutil.copytree(old, tmp_path / "old")
    damaged, *sound = sorted((tmp_path / "old" / "points").iterdir())
    (damaged / "run.json").write_text("{")
    recoveries.clear()
    compress(searched(weights, 3.0, points=3), tmp_path / "run", reuse=tmp_path / "old")
    assert "is damaged" in caplog.text
    taken = {path.name for path in (tmp_path / "run" / "points").iterdir()}
    assert taken & {path.name for path in sound}
    assert len(recoveries) <= len(taken - {path.name for path in sound})


def test_surgery_depends_on_the_inputs_that_are_drawn(earlier: tuple[Path, Path]) -> None:
    """Pruning on more of them than merging draws other chunks for both."""
    weights, old = earlier
    recipe = searched(weights, 3.0)
    more = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"inputs": recipe.rewrite.inputs + 64})})
    plan = read_result(old, "plan", Plan)
    one, other = (planning.surgery_depends([old], "measured", "planned", plan, each) for each in (recipe, more))
    assert sha256_of_json(one) != sha256_of_json(other)


def test_a_full_recovery_that_diverges_is_met_by_the_search_and_its_remedy_is_told(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recover = stages.distill
    sizes: list[int] = []

    def diverging(student: Any, *given: Any, **named: Any) -> Any:
        sizes.append(sum(parameter.numel() for parameter in student.parameters()))
        if given[3].epochs == 3 and sizes[-1] == min(sizes):
            raise NumericalError("the loss is NaN", found="nan", remedy="lower distill.learning_rate")
        return recover(student, *given, **named)

    monkeypatch.setattr(stages, "distill", diverging)
    with caplog.at_level(logging.WARNING):
        compress(searched(weights, 60.0), tmp_path / "run")
    found = read_result(tmp_path / "run", "search", Pareto)
    assert chosen(found).epochs == 3
    assert 0.29 < chosen(found).asked_macs <= 0.5  # the least, 0.288, can't be delivered
    assert "the loss is NaN; found: nan; remedy: lower distill.learning_rate" in caplog.text


def test_a_search_that_cannot_be_as_sure_as_asked_is_refused_before_its_first_size(
    weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="at least 390 validation inputs"):
        compress(searched(weights, 0.5, confidence=0.975), tmp_path / "run")
    assert not (tmp_path / "run" / "points").exists()
