"""The search for the smallest network within a drop: on made-up curves, and once the whole way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_runs import digits_recipe, train

from causal_compress.errors import BudgetError
from causal_compress.pipeline import compress
from causal_compress.recipe import BudgetSection, DistillSection, LatencySection, SearchSection
from causal_compress.results import Pareto, SearchPoint
from causal_compress.runs import read_result
from causal_compress.searching import shortened
from causal_compress.shrink.search import front_of, search, searches


def point(asked: float, drop: float) -> SearchPoint:
    return SearchPoint(
        asked_macs=asked,
        macs=asked * 0.99,
        params=asked,
        heldout_kl=0.1,
        drop_pp=drop,
        drop_ci_pp=(drop - 0.2, drop + 0.2),
        n=1000,
        epochs=0,
        seconds=1.0,
    )


def falling(curve: Callable[[float], float]) -> Callable[[float], SearchPoint]:
    return lambda share: point(share, curve(share))


@given(st.floats(0.08, 0.95), st.integers(4, 9))
def test_the_search_closes_in_on_where_the_drop_begins(edge: float, points: int) -> None:
    curve = falling(lambda share: 0.0 if share >= edge else 5.0)
    found = search(curve, SearchSection(points=points), limit_pp=1.0, least=0.05)
    assert len(found.points) <= points
    assert found.points[0].asked_macs == 0.5
    tried = [p.asked_macs for p in found.points]
    if any(share >= edge for share in tried):
        assert found.met
        chosen = found.points[found.chosen].asked_macs
        assert chosen == min(share for share in tried if share >= edge)
        # Each point halves the interval, on a logarithmic scale, that began between 0.05 and 1.
        assert chosen / edge <= max(1.11, (1.0 / 0.05) ** (0.5 ** (points - 1)) * 1.001)
    else:
        assert not found.met


@given(st.floats(0.4, 3.0), st.floats(0.55, 0.95))
def test_drops_within_reach_say_where_to_look_next(bend: float, edge: float) -> None:
    """A convex curve that meets the limit at `edge`: three points come as near as five that halve the interval."""

    def lost(share: float) -> float:
        return ((1.0 / share) ** bend - 1.0) / ((1.0 / edge) ** bend - 1.0)

    assume(lost(0.5) <= 4.0)
    found = search(falling(lost), SearchSection(points=3), limit_pp=1.0, least=0.05)
    assert found.met
    assert edge * 0.999 <= found.points[found.chosen].asked_macs <= edge * 1.1


@pytest.mark.parametrize(("confidence", "beyond"), [(0.5, 0.0), (0.84134, 0.102), (0.975, 0.2)])
def test_a_search_that_has_to_be_surer_leaves_room_for_chance(confidence: float, beyond: float) -> None:
    """Drops are known to 0.2 pp to both sides with 97.5 %, each."""
    curve = falling(lambda share: 2.0 * (1.0 - share))
    found = search(curve, SearchSection(points=9, confidence=confidence), limit_pp=0.5, least=0.05)
    edge = 0.75 + beyond / 2.0
    assert edge - 1e-3 <= found.points[found.chosen].asked_macs <= edge * 1.1
    assert ("with the confidence asked for at most" in found.reason) == (confidence > 0.5)


def test_where_nothing_holds_the_point_that_lost_least_is_kept() -> None:
    found = search(falling(lambda share: 9.0 - 5.0 * share), SearchSection(points=4), limit_pp=1.0, least=0.1)
    assert not found.met
    assert found.chosen == max(range(4), key=lambda index: found.points[index].asked_macs)
    assert "none of 4 sizes" in found.reason


def test_sizes_that_cannot_be_carried_out_count_as_too_small() -> None:
    found = search(
        lambda share: None if share < 0.4 else point(share, 0.0), SearchSection(points=6), limit_pp=1.0, least=0.05
    )
    assert found.met
    assert 0.4 <= found.points[found.chosen].asked_macs < 0.45
    with pytest.raises(BudgetError, match="no size"):
        search(lambda _: None, SearchSection(points=3), limit_pp=1.0, least=0.05)


@pytest.mark.parametrize("limit", [0.3, 1.0, 1.5, 3.0])
def test_where_few_plans_exist_no_network_is_tried_under_a_second_share(limit: float) -> None:
    """Between the share that was asked for and the one that was found there is nothing else."""
    networks = {0.72: 0.1, 0.35: 0.8, 0.21: 1.2, 0.1: 2.0, 0.06: 5.0}

    def fewer(share: float) -> SearchPoint:
        macs = max(size for size in networks if size <= share)
        return replace(point(share, networks[macs]), macs=macs)

    found = search(fewer, SearchSection(points=6), limit_pp=limit, least=0.06)
    held = [p.macs for p in found.points if p.drop_pp <= limit]
    assert len(held) == len(set(held))
    assert found.points[found.chosen].macs == min(size for size, drop in networks.items() if drop <= limit)


def test_no_point_below_what_is_possible() -> None:
    found = search(falling(lambda _: 0.0), SearchSection(points=8), limit_pp=1.0, least=0.4)
    assert all(p.asked_macs >= 0.4 for p in found.points)
    assert found.points[found.chosen].asked_macs < 0.45
    assert len(found.points) < 8


@pytest.mark.parametrize("healing", [0.2, 0.5, 1.0])
def test_a_full_recovery_at_one_size_says_what_is_left_of_the_others(healing: float) -> None:
    short = falling(lambda share: 8.0 * (1.0 - share))
    fully: list[float] = []

    def in_full(share: float) -> SearchPoint:
        fully.append(share)
        return replace(short(share), drop_pp=healing * short(share).drop_pp, epochs=20)

    found = search(short, SearchSection(points=7), limit_pp=1.0, least=0.01, in_full=in_full)
    chosen = found.points[found.chosen]
    assert fully == [0.5, chosen.asked_macs]
    assert found.remains == pytest.approx(healing)
    edge = 1.0 - 1.0 / (8.0 * healing)  # here the drop that is left is the limit
    assert found.met
    assert edge <= chosen.asked_macs <= edge * 1.1
    assert chosen.judged_pp <= 1.0
    assert chosen.epochs == 20
    assert "validation drop" in found.reason
    whole = next(p for p in found.points if p.epochs == 20)
    assert whole.expected_drop_pp is None
    assert next(p for p in found.points if p.asked_macs == 0.5).expected_drop_pp == whole.drop_pp


def test_one_size_that_heals_completely_is_no_promise_for_smaller_ones() -> None:
    """0.5 loses 1.2 pp after a short recovery and nothing after a full one; below 0.3 half of a large drop stays."""

    def lost(share: float) -> float:
        return 1.2 if share >= 0.5 else 60.0 * (1.0 - share)

    def in_full(share: float) -> SearchPoint:
        return replace(point(share, -0.05 if share >= 0.5 else lost(share) / 2), epochs=20)

    found = search(falling(lost), SearchSection(points=5), limit_pp=1.0, least=0.02, in_full=in_full)
    chosen = found.points[found.chosen]
    assert found.met
    assert (chosen.asked_macs, chosen.epochs, chosen.drop_pp) == (0.5, 20, -0.05)
    assert found.remains == pytest.approx(0.5)


def test_a_size_that_cannot_be_recovered_in_full_is_never_chosen() -> None:
    def in_full(share: float) -> SearchPoint | None:
        return point(share, 0.5) if share > 0.6 else None

    found = search(falling(lambda _: 2.0), SearchSection(points=4), limit_pp=1.0, least=0.1, in_full=in_full)
    assert found.met
    assert found.points[found.chosen].asked_macs > 0.6
    assert all(p.asked_macs > 0.6 for p in found.points)
    with pytest.raises(BudgetError, match="no size could be carried out"):
        search(falling(lambda _: 2.0), SearchSection(points=2), limit_pp=1.0, least=0.1, in_full=lambda _: None)


@pytest.mark.parametrize("drop", [0.0, 0.6, 50.0])
def test_a_network_that_cannot_shrink_is_tried_once(drop: float) -> None:
    found = search(falling(lambda _: drop), SearchSection(points=5), limit_pp=0.3, least=1.0)
    assert [p.asked_macs for p in found.points] == [1.0]
    assert found.met == (drop <= 0.3)


def test_a_size_is_judged_by_its_full_recovery_and_not_by_the_narrower_interval_of_the_short_one() -> None:
    def in_full(share: float) -> SearchPoint:
        return replace(point(share, 0.6), drop_ci_pp=(0.0, 1.2), epochs=20)

    section = SearchSection(points=1, confidence=0.975)
    found = search(falling(lambda _: 1.0), section, limit_pp=0.9, least=0.5, in_full=in_full)
    assert not found.met  # 0.6 + 0.6


def test_where_nothing_can_be_told_the_largest_is_kept() -> None:
    found = search(falling(lambda _: 5.0), SearchSection(points=4), limit_pp=1.0, least=0.05)
    assert not found.met
    assert found.points[found.chosen].asked_macs == max(p.asked_macs for p in found.points)


def test_shares_have_four_digits_and_a_network_without_macs_can_be_searched() -> None:
    found = search(falling(lambda _: 0.0), SearchSection(points=9), limit_pp=1.0, least=0.0)
    assert all(p.asked_macs == round(p.asked_macs, 4) > 0 for p in found.points)


def test_the_front_leaves_out_what_is_beaten() -> None:
    points = [point(0.5, 0.1), point(0.3, 2.0), point(0.4, 2.5), point(0.2, 4.0)]
    assert front_of(points) == (3, 1, 0)


def test_only_a_drop_alone_leaves_the_size_open() -> None:
    assert searches(BudgetSection(max_accuracy_drop=0.5))
    assert not searches(BudgetSection())
    assert not searches(BudgetSection(max_accuracy_drop=0.5, macs=0.5))
    assert not searches(BudgetSection(max_accuracy_drop=0.5, params=0.5))
    assert not searches(BudgetSection(max_accuracy_drop=0.5, latency_ms=LatencySection(keep=0.5)))


@pytest.mark.parametrize(("epochs", "share"), [(20, 1.0), (5, 0.5), (1, 20**-0.5)])
def test_a_short_recovery_is_gentle(epochs: int, share: float) -> None:
    whole = DistillSection(epochs=20, learning_rate=0.04, relative_rate=0.008, temperature=3.0)
    short = shortened(whole, epochs)
    assert (short.learning_rate, short.relative_rate) == pytest.approx((0.04 * share, 0.008 * share))
    assert short.model_copy(update={"learning_rate": 0.04, "relative_rate": 0.008, "epochs": 20}) == whole
    assert shortened(whole, 20) == whole  # a search takes over what was recovered in full


def begun(folder: Path) -> list[str]:
    """When the stages of an analysis began."""
    stages = json.loads((folder / "run.json").read_text())["stages"]
    return [stage["started"] for stage in stages if stage["stage"] in {"teacher", "intervene", "group", "candidates"}]


def test_the_whole_way_from_a_drop_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = train(digits_recipe(None), tmp_path / "teacher.safetensors", epochs=3)
    recipe = digits_recipe(
        weights,
        budget={"macs": None, "max_accuracy_drop": 30.0},
        search={"points": 2, "epochs": 0},
        distill=None,
        benchmark={"runtimes": ["torch"], "batches": [1]},
    )
    outcome = compress(recipe, tmp_path / "run")
    pareto = read_result(tmp_path / "run", "search", Pareto)
    assert len(pareto.points) == 2
    assert {path.name for path in (tmp_path / "run" / "points").iterdir()} == {
        f"{p.asked_macs:.4f}-{p.epochs}" for p in pareto.points
    }
    student = next(row for row in outcome.scorecard.rows if row.model == "student")
    teacher = next(row for row in outcome.scorecard.rows if row.model == "teacher")
    assert student.macs / teacher.macs == pytest.approx(pareto.points[pareto.chosen].macs, abs=0.01)
    assert begun(tmp_path / "run" / "points" / "0.5000-0") == begun(tmp_path / "run")  # taken over, not repeated

    def again(*_: object) -> None:
        raise AssertionError("a finished search was done again")

    monkeypatch.setattr("causal_compress.searching.attempt", again)
    (tmp_path / "run" / "scorecard.json").unlink()
    assert compress(recipe, tmp_path / "run").scorecard == outcome.scorecard
