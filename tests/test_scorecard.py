"""The scorecard: verdicts are judged by intervals, notes say what a reader must know, and its forms read back."""

import csv
import io

import pytest

from causal_compress.deploy.scorecard import measured_notes, scorecard_csv, scorecard_markdown, verdict
from causal_compress.recipe import BudgetSection
from causal_compress.results import Scorecard, ScoreRow


def row(model, **changes) -> ScoreRow:
    plain = {
        "model": model,
        "runtime": "torch",
        "precision": "fp32",
        "batch": 1,
        "threads": 1,
        "accuracy_pct": 90.0,
        "n": 1000,
        "drop_pp": 0.0,
        "drop_ci_pp": (0.0, 0.0),
        "params": 1000,
        "macs": 10000,
        "size_bytes": 4000,
        "latency_ms_p50": 1.0,
        "latency_ms_p95": 1.0,
        "latency_ms_p99": 1.0,
        "throughput_per_s": 1000.0,
        "peak_memory_bytes": 10**6,
        "speedup": 1.0,
        "speedup_ci": (1.0, 1.0),
        "rounds": 100,
    }
    return ScoreRow(**{**plain, **changes})


def student(**changes) -> ScoreRow:
    half = {"params": 500, "macs": 5000, "speedup": 1.9, "speedup_ci": (1.8, 2.0)}
    return row("student", **{**half, **changes})


# ---- the verdict


def test_no_budget_passes():
    assert verdict([row("teacher"), student()], BudgetSection()) == ("PASS", ("no budget was set",))


@pytest.mark.parametrize(
    ("interval", "limit", "expected"),
    [
        ((0.1, 0.9), 1.0, "PASS"),
        ((0.1, 1.0), 1.0, "PASS"),
        ((0.1, 1.1), 1.0, "INCONCLUSIVE"),
        ((1.0, 2.0), 1.0, "INCONCLUSIVE"),
        ((1.1, 2.0), 1.0, "FAIL"),
        ((-0.5, 0.4), 0.0, "INCONCLUSIVE"),
    ],
)
def test_drop_is_judged_by_its_interval(interval, limit, expected):
    rows = [row("teacher"), student(drop_pp=sum(interval) / 2, drop_ci_pp=interval)]
    outcome, reasons = verdict(rows, BudgetSection(max_accuracy_drop=limit))
    assert outcome == expected
    assert "95 % interval" in reasons[0]
    assert "n = 1,000" in reasons[0]


def test_worst_runtime_counts():
    good = student(drop_pp=0.1, drop_ci_pp=(0.0, 0.2))
    bad = student(runtime="onnxruntime", drop_pp=5.0, drop_ci_pp=(4.0, 6.0))
    rows = [row("teacher"), good, row("teacher", runtime="onnxruntime"), bad]
    outcome, reasons = verdict(rows, BudgetSection(max_accuracy_drop=1))
    assert outcome == "FAIL"
    assert "on onnxruntime" in reasons[0]


@pytest.mark.parametrize(
    ("interval", "expected"), [((-0.3, 1.1), "INCONCLUSIVE"), ((1.01, 1.1), "FAIL"), ((-0.3, 1.0), "PASS")]
)
def test_the_worst_verdict_counts_not_the_largest_drop(interval, expected):
    largest = student(runtime="onnxruntime", drop_pp=0.9, drop_ci_pp=(0.8, 1.0))
    other = student(runtime="onnxruntime", precision="int8", drop_pp=0.4, drop_ci_pp=interval)
    rows = [row("teacher", runtime="onnxruntime"), largest, other]
    outcome, (reason,) = verdict(rows, BudgetSection(max_accuracy_drop=1))
    assert outcome == expected
    assert reason.startswith(f"drop of accuracy {'0.90' if expected == 'PASS' else '0.40'} pp")


@pytest.mark.parametrize(
    ("key", "limit", "expected"), [("macs", 0.5, "PASS"), ("macs", 0.49, "FAIL"), ("params", 0.4, "FAIL")]
)
def test_costs_are_judged(key, limit, expected):
    outcome, reasons = verdict([row("teacher"), student()], BudgetSection(**{key: limit}))
    assert outcome == expected
    assert "0.5000" in reasons[0]


def test_small_shares_keep_their_digits():
    rows = [row("teacher", params=57_044_810), student(params=5_609)]
    outcome, (reason,) = verdict(rows, BudgetSection(params=0.0001))
    assert outcome == "PASS"
    assert reason.startswith("9.83e-05 of the teacher's parameters kept (5,609 of 57,044,810)")


def test_latency_is_judged_on_int8_where_that_was_chosen():
    rows = [
        row("teacher", runtime="onnxruntime"),
        student(runtime="onnxruntime", speedup=1.2, speedup_ci=(1.1, 1.3)),
        student(runtime="onnxruntime", precision="int8", speedup=2.0, speedup_ci=(1.9, 2.1)),
    ]
    budget = BudgetSection(latency_ms={"keep": 0.6})
    outcome, (reason,) = verdict(rows, budget)
    assert outcome == "PASS"
    assert reason.startswith("0.500 of the teacher's latency kept on onnxruntime int8, batch 1")
    assert verdict(rows[:2], budget)[0] == "FAIL"


def test_missed_cost_outweighs_an_inconclusive_drop():
    rows = [row("teacher"), student(drop_pp=1, drop_ci_pp=(0, 2))]
    outcome, reasons = verdict(rows, BudgetSection(macs=0.4, max_accuracy_drop=1))
    assert outcome == "FAIL"
    assert len(reasons) == 2


# ---- notes and forms


def test_speed_within_noise_is_said():
    (note, shortfall) = measured_notes([row("teacher"), student(speedup=1.04, speedup_ci=(0.98, 1.1))])
    assert "no difference in latency" in note
    assert "MACs fell 2.0x, latency 1.04x" in shortfall


def test_latency_that_falls_short_of_the_macs_is_said_once():
    batches = [(1, 1.2, (1.1, 1.3)), (64, 1.3, (1.2, 1.4)), (256, 1.9, (1.8, 2.0))]
    rows = [
        each
        for batch, speedup, interval in batches
        for each in (row("teacher", batch=batch), student(batch=batch, speedup=speedup, speedup_ci=interval))
    ]
    (note,) = measured_notes(rows)
    assert "1.20x on" in note
    assert "1.30x on" in note
    assert "1.90x" not in note  # nearly what the MACs promise
    assert note.count("MACs are not speed") == 1


def test_slower_student_is_said():
    assert "slower" in measured_notes([row("teacher"), student(speedup=0.8, speedup_ci=(0.7, 0.9))])[0]


def test_honest_speedup_needs_no_note():
    assert measured_notes([row("teacher"), student()]) == ()


def test_disagreeing_runtimes_are_said():
    rows = [
        row("teacher"),
        student(),
        row("teacher", runtime="onnxruntime"),
        student(runtime="onnxruntime", accuracy_pct=80),
    ]
    (note,) = measured_notes(rows)
    assert "disagree on the student" in note


def int8(**changes) -> ScoreRow:
    return student(runtime="onnxruntime", precision="int8", **changes)


def test_int8_that_answers_otherwise_than_fp32_is_no_disagreement_of_runtimes():
    fp32 = [row("teacher"), student(), row("teacher", runtime="onnxruntime"), student(runtime="onnxruntime")]
    assert measured_notes([*fp32, int8(accuracy_pct=86)]) == ()
    there = [row("teacher", runtime="openvino"), student(runtime="openvino")]
    eight = [int8(accuracy_pct=86), student(runtime="openvino", precision="int8", accuracy_pct=88)]
    (note,) = measured_notes([*fp32, *there, *eight])
    assert note == "the runtimes disagree on the student's int8 accuracy: 86.00 % on onnxruntime, 88.00 % on openvino"


def test_notes_and_reasons_name_the_precision():
    rows = [
        row("teacher", runtime="onnxruntime"),
        student(runtime="onnxruntime"),
        int8(speedup=0.8, speedup_ci=(0.7, 0.9), drop_pp=2.0, drop_ci_pp=(1.5, 2.5)),
    ]
    assert measured_notes(rows)[0].startswith("onnxruntime int8, batch 1, 1 thread(s): the student is slower")
    _, (reason,) = verdict(rows, BudgetSection(max_accuracy_drop=1))
    assert "2.00 pp on onnxruntime int8 (95 %" in reason


def test_unmeasured_memory_is_said():
    assert "peak memory" in measured_notes([row("teacher"), student(peak_memory_bytes=None)])[0]


def card(rows) -> Scorecard:
    return Scorecard(verdict="PASS", reasons=("because",), notes=("beware",), rows=tuple(rows), runtimes=("torch 2",))


def test_csv_reads_back():
    rows = list(csv.DictReader(io.StringIO(scorecard_csv(card([row("teacher"), student(drop_ci_pp=(-1.5, 2.5))])))))
    assert [line["model"] for line in rows] == ["teacher", "student"]
    assert (rows[1]["drop_ci_pp_low"], rows[1]["drop_ci_pp_high"], rows[1]["macs"]) == ("-1.5", "2.5", "5000")
    assert scorecard_csv(card([])).startswith("model,")


def test_markdown_is_a_table_with_verdict_and_notes():
    text = scorecard_markdown(card([row("teacher"), student(peak_memory_bytes=None)]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    for part in ("**PASS**", "- because", "beware", "1.90x [1.80, 2.00]", "torch 2"):
        assert part in text
