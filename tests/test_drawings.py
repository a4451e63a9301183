"""Which numbers a figure shows: accuracy against time."""

from __future__ import annotations

import dataclasses

from report_sample import sample

from causal_compress.explain.drawings import accuracy_and_time, model_name, quickest
from causal_compress.explain.report import build_report


def measured(*points):
    """A scorecard with one row for each (time, accuracy), all at batch 1, and a slow large batch."""
    scorecard = sample().scorecard
    row = scorecard.rows[0]
    rows = [dataclasses.replace(row, batch=1, latency_ms_p50=ms, accuracy_pct=pct) for ms, pct in points]
    return dataclasses.replace(scorecard, rows=(*rows, dataclasses.replace(row, batch=64, accuracy_pct=99.9)))


def test_only_what_no_other_beats_is_on_the_front():
    found = quickest(measured((2.0, 93.0), (1.0, 92.0), (3.0, 92.5), (2.5, 93.0), (4.0, 93.1)))
    assert [(row.latency_ms_p50, best) for row, best in found] == [
        (1.0, True), (2.0, True), (2.5, False), (3.0, False), (4.0, True),
    ]  # fmt: skip


def test_of_two_as_fast_the_better_one_is_on_the_front():
    found = quickest(measured((1.0, 92.0), (1.0, 93.0)))
    assert [(row.accuracy_pct, best) for row, best in found] == [(93.0, True), (92.0, False)]


def test_every_model_of_the_smallest_batch_has_its_number_and_name():
    card = sample().scorecard
    drawn = accuracy_and_time(card)
    assert quickest(None) == ()
    assert all(f">{number + 1}<" in drawn for number in range(len(quickest(card))))
    assert 1 < len(quickest(card)) < len(card.rows)
    assert model_name(card.rows[0]) in build_report(sample())
