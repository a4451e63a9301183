"""The audit in plain words: one question per line, an answer, and the numbers that it stands on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from causal_compress.explain import formats
from causal_compress.explain.audit_drawings import SURE
from causal_compress.results import Audit, CorruptionRow, Estimate, GroupChange, Quality

Sign = Literal["worse", "same", "better", "unclear"]

_TOO_FEW = "Too few inputs to tell"


@dataclass(frozen=True)
class Finding:
    """One question that the audit answers; `sign` says in one word what the intervals allow to say."""

    question: str
    sign: Sign
    answer: str
    evidence: str


def findings(audit: Audit) -> tuple[Finding, ...]:
    """What the audit found, the most important question first; what was not measured is not among them.

    Args:
        audit: Teacher and student on the same inputs.

    Limits: "no difference found" is said where an interval holds 0; with few inputs that means little.
    """
    return tuple(_found(audit))


def _found(audit: Audit) -> Iterator[Finding]:
    yield _accuracy(audit)
    if audit.per_class:
        yield _classes(audit.per_class)
    for quality in audit.quality:
        if quality.measure == "overconfidence" and quality.change is not None:
            yield _confidence(quality, quality.change)
    disturbed = [row for row in audit.corruptions if row.severity > 0]
    if disturbed:
        yield _corrupted(disturbed)
    if audit.groups:
        gap = f"gap between the best and the worst group of “{audit.groups.column}”"
        values = (
            f"{gap} {formats.fixed(audit.groups.teacher_gap_pp)} → {formats.fixed(audit.groups.student_gap_pp)} points"
        )
        yield _estimated("Do some groups fall further behind?", audit.groups.growth_pp, values, 2)
    if audit.attribution:
        drift = audit.attribution
        agree = (
            f"rank agreement {formats.fixed(drift.student.value)} with the teacher, {formats.fixed(drift.floor.value)}"
        )
        values = f"{agree} of the teacher with itself"
        yield _estimated("Does it decide for other reasons?", drift.beyond_floor, values, 3)
    if audit.causal_map and audit.causal_map.nodes:
        yield _mapped(audit)


def _accuracy(audit: Audit) -> Finding:
    both, (low, high) = audit.overall, audit.overall.drop_ci_pp
    evidence = (
        f"{formats.signed(-both.drop_pp)} points (95 % interval {formats.opposite(low, high)}, n = {audit.n:,}); "
        f"p {formats.p_value(both.p_value)}"
    )
    judged = _judged(low, high)
    if (low > 0 or high < 0) and both.p_value >= SURE:  # interval and exact test disagree: a close call
        judged = ("unclear", "Perhaps")
    return Finding("Is it right less often?", *judged, evidence)


def _judged(low: float, high: float) -> tuple[Sign, str]:
    """Of an interval whose positive side is harm; without ends (one input) nothing can be said."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unclear", _TOO_FEW
    if low > 0:
        return "worse", "Yes"
    return ("better", "No, better") if high < 0 else ("same", "No difference found")


def _confidence(quality: Quality, change: Estimate) -> Finding:
    """Surer than before is harm only where confidence exceeds accuracy; less sure is good only down to there."""
    values = f"confidence beyond accuracy {formats.signed(quality.teacher, 4)} → {formats.signed(quality.student, 4)}"
    found = _estimated("Is it surer of itself than it is right?", change, values, 4)
    match found.sign:
        case "worse" if quality.student <= 0:
            return replace(found, sign="better", answer="No, and less underconfident")
        case "better" if quality.student < 0:
            return replace(found, sign="unclear", answer="No, but now it is underconfident")
    return found


def _estimated(question: str, change: Estimate, values: str, places: int) -> Finding:
    interval = formats.interval(change.low, change.high, places)
    change_text = formats.signed(change.value, places)
    evidence = f"{values}; difference {change_text} (95 % interval {interval}, n = {change.n:,})"
    return Finding(question, *_judged(change.low, change.high), evidence)


def _classes(rows: tuple[GroupChange, ...]) -> Finding:
    sure = [row for row in rows if row.p_holm < SURE]
    lost = [row.name for row in sure if row.compared.drop_pp > 0]
    gained = [row.name for row in sure if row.compared.drop_pp < 0]
    least = min(row.compared.teacher.n for row in rows)
    of = f"{formats.count(len(rows), 'class', 'classes')}, at least {least:,} inputs each"
    if lost:
        return Finding(
            "Does one class pay for it?", "worse", f"Yes: {_listed(lost)}", f"beyond chance in {len(lost)} of {of}"
        )
    sign: Sign = "better" if gained else "same"
    answer = f"No; better: {_listed(gained)}" if gained else "No difference found"
    return Finding("Does one class pay for it?", sign, answer, f"none of {of}, lost more than chance explains")


def _corrupted(rows: list[CorruptionRow]) -> Finding:
    worse = [row for row in rows if row.extra_drop_pp.low > 0]
    largest = max(rows, key=lambda row: row.extra_drop_pp.value)
    extra = largest.extra_drop_pp
    # one interval in forty lies above 0 by chance alone, so one of a dozen proves nothing
    signs: dict[int, tuple[Sign, str]] = {0: ("same", "No difference found"), 1: ("unclear", "In one case")}
    sign, answer = signs.get(len(worse), ("worse", f"Yes, in {len(worse)} cases"))
    if not _known([row.extra_drop_pp for row in rows]):
        sign, answer = "unclear", _TOO_FEW
    chance = formats.fixed(len(rows) / 40, 1)
    evidence = (
        f"loses more than the teacher in {len(worse)} of {len(rows)} disturbances (by chance: {chance}); "
        f"most under {largest.corruption} {largest.severity}: {formats.fixed(extra.value)} points more "
        f"(95 % interval {formats.interval(extra.low, extra.high)}, n = {extra.n:,})"
    )
    return Finding("Is it more fragile when inputs are disturbed?", sign, answer, evidence)


def _mapped(audit: Audit) -> Finding:
    drift = audit.causal_map
    assert drift is not None
    moved = [node for node in drift.nodes if node.change.low > 0 or node.change.high < 0]
    of = len(drift.nodes)
    ranks = ""
    if drift.student is not None and drift.floor is not None:
        ranks = (
            f"; rank agreement {formats.fixed(drift.student)}, of the teacher with itself {formats.fixed(drift.floor)}"
        )
    sign: Sign = "same" if not moved else "unclear"
    answer = f"At {formats.count(len(moved), 'place')}" if moved else "No difference found"
    if not _known([node.change for node in drift.nodes]):
        sign, answer = "unclear", _TOO_FEW
    chance = formats.fixed(of / 20, 1)  # at most: intervals of the changes are not paired, so too wide
    evidence = (
        f"effect changed at {len(moved)} of {of} places (by chance: at most {chance}){ranks}; n = {drift.inputs:,}"
    )
    return Finding("Do other parts of the network carry the decision?", sign, answer, evidence)


def _known(changes: list[Estimate]) -> bool:
    """Whether any of them has an interval."""
    return any(math.isfinite(change.low) and math.isfinite(change.high) for change in changes)


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
