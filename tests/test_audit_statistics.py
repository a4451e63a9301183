"""The audit's statistics against answers known by hand, and what its findings may say of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from audit_sample import audit_of, pair_of
from hypothesis import given
from hypothesis import strategies as st

from causal_compress.commands.auditing import _audit_rows
from causal_compress.explain.findings import findings
from causal_compress.explain.paired import (
    Answers,
    Pair,
    calibration_error,
    compare,
    flips,
    holm,
    mean_interval,
    quality,
)
from causal_compress.results import CorruptionRow, Estimate, MapDrift, NodeDrift, Quality


def test_mcnemar_is_exact() -> None:
    right = np.array([True] * 5 + [True] * 20 + [False] * 3)
    still = np.array([False] * 5 + [True] * 20 + [False] * 3)
    found = compare(right, still)
    assert (found.teacher_only, found.student_only) == (5, 0)
    assert found.p_value == pytest.approx(2 * 0.5**5)
    assert found.drop_pp == pytest.approx(500 / 28)
    assert compare(right, right).p_value == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_only_raises_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def test_flips_add_up_and_name_the_commonest() -> None:
    pair = pair_of([0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 2], [0, 1, 1, 0, 1, 1, 2])
    found = flips(pair, ("a", "b", "c"))
    counts = (
        found.both_right,
        found.right_to_wrong,
        found.wrong_to_right,
        found.wrong_to_other_wrong,
        found.same_wrong,
    )
    assert counts == (2, 2, 1, 1, 1)
    assert sum(counts) == found.n == 7
    first = found.commonest[0]
    assert (first.true_class, first.teacher_class, first.student_class, first.count) == ("a", "a", "b", 2)
    assert found.agreement.pct == pytest.approx(300 / 7)


def test_calibration_error_by_hand() -> None:
    sure, right = np.ones(30), np.arange(30) < 15
    assert calibration_error(sure, np.ones(30, bool)) == 0.0
    assert calibration_error(sure, right, bins=1) == pytest.approx(0.5)
    two = np.array([0.9, 0.5, 0.5, 0.9])
    assert calibration_error(two, np.array([True, True, False, False]), bins=2) == pytest.approx((0 + 0.4) / 2)


def test_the_calibration_error_is_that_of_any_order_of_inputs_that_tie() -> None:
    right = np.random.default_rng(0).random(1000) < 0.7
    sure = np.full(1000, right.mean())
    assert calibration_error(sure, right) == pytest.approx(0.0, abs=1e-9)
    assert calibration_error(sure, np.sort(right)) == pytest.approx(0.0, abs=1e-9)


def test_one_input_has_no_interval() -> None:
    found = mean_interval(np.array([0.3]), 100, seed=0)
    assert found.value == 0.3
    assert np.isnan([found.low, found.high]).all()


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 800)
    found = mean_interval(values, 2000, seed=1)
    half = 1.96 * values.std() / np.sqrt(800)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.n == 800


def answered(confidence: np.ndarray, right: np.ndarray) -> Answers:
    return Answers(np.where(right, 0, 1), confidence, np.zeros(len(right)), np.zeros(len(right)))


def test_the_interval_of_overconfidence_covers_the_true_change() -> None:
    rng, covered = np.random.default_rng(0), 0
    for round_ in range(40):
        sure = rng.uniform(0.5, 1, 400)
        right = rng.random(400) < sure  # the teacher is calibrated, the student too sure by 0.03
        pair = Pair(
            np.zeros(400, int), answered(sure, right), answered(sure + 0.03, rng.random(400) < sure), np.zeros(400)
        )
        found = {one.measure: one for one in quality(pair, 200, round_)}
        change = found["overconfidence"].change
        assert change is not None
        covered += change.low <= 0.03 <= change.high
        assert found["ece"].change is None
    assert covered >= 33


# findings


def test_a_close_call_is_not_called_sure() -> None:
    pair = pair_of([0] * 1000, [0] * 1000, [0] * 1000)
    whole = audit_of(pair)
    torn = dataclasses.replace(whole.overall, drop_ci_pp=(0.01, 0.4), p_value=0.06)
    assert findings(dataclasses.replace(whole, overall=torn))[0].sign == "unclear"
    sure = dataclasses.replace(torn, p_value=0.04)
    assert findings(dataclasses.replace(whole, overall=sure))[0].sign == "worse"


def test_nothing_is_said_of_one_input() -> None:
    alone = mean_interval(np.array([0.3]), 100, seed=0)
    pair = pair_of([0], [0], [0])
    node = NodeDrift(node="a", teacher=1.0, again=1.0, student=1.3, change=alone)
    row = CorruptionRow(corruption="blur", severity=1, setting="s", compared=pair.compared(), extra_drop_pp=alone)
    quality = Quality(measure="overconfidence", unit="share", teacher=0.0, student=0.3, change=alone)
    whole = dataclasses.replace(
        audit_of(pair),
        quality=(quality,),
        corruptions=(row,),
        causal_map=MapDrift(nodes=(node,), inputs=1, student=None, floor=None),
    )
    assert [found.sign for found in findings(whole)[1:]] == ["unclear"] * 3
    assert "nan" not in str(list(_audit_rows(whole, "audit.json")))


def test_surer_is_worse_only_where_confidence_exceeds_accuracy() -> None:
    whole = audit_of(pair_of([0] * 10, [0] * 10, [0] * 10))
    for ends, change, sign in (
        ((0.0, 0.1), (0.05, 0.15), "worse"),
        ((-0.2, -0.1), (0.05, 0.15), "better"),
        ((0.2, 0.1), (-0.15, -0.05), "better"),
        ((0.0, -0.1), (-0.15, -0.05), "unclear"),
    ):
        change = Estimate(value=sum(change) / 2, low=change[0], high=change[1], n=10)
        one = Quality(measure="overconfidence", unit="share", teacher=ends[0], student=ends[1], change=change)
        assert findings(dataclasses.replace(whole, quality=(one,)))[1].sign == sign
