"""Changes left out: nodes that the user wants whole, and a plan with one of its decisions taken back."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from causal_compress.errors import UsageError
from causal_compress.results import Candidate, Candidates, Decision, Evidence, Plan, RegionInfo

_UNKNOWN = Evidence(cka=None, same_node_share=None, ace=None, relative_error=None)


def whole_regions(names: Sequence[str], regions: Sequence[RegionInfo]) -> frozenset[int]:
    """The regions that stay whole.

    Args:
        names: Nodes as plan and ledger show them: a region's name, or FIRST..LAST for a span.
        regions: Of the teacher.

    Returns:
        Their numbers, those inside spans included.

    Raises:
        UsageError: a name that no region has, or a span that runs backwards.
    """
    number = {region.name: region.index for region in regions}
    found: set[int] = set()
    for name in names:
        ends = [name] if name in number else name.split("..")
        if len(ends) > 2 or any(end not in number for end in ends) or number[ends[0]] > number[ends[-1]]:
            raise _unknown(name, ends, list(number))
        found.update(range(number[ends[0]], number[ends[-1]] + 1))
    return frozenset(found)


def _unknown(name: str, ends: Sequence[str], known: list[str]) -> UsageError:
    strangers = [end for end in ends if end not in known]
    close = [match for end in strangers for match in difflib.get_close_matches(end, known, n=1)]
    shown = f"{', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"
    return UsageError(
        f"plan.undo: no node is called '{name}'" if strangers else f"plan.undo: '{name}' runs backwards",
        wanted=f"a region ({shown}), or FIRST..LAST",
        remedy=f"did you mean '{close[0]}'?" if close else "name a node as `analyze` or the report's ledger shows it",
    )


def leaves_whole(row: Candidate, whole: frozenset[int]) -> bool:
    """Whether a candidate changes none of the regions that stay whole: no merge, no channel inside, before or behind.

    Args:
        row: The candidate.
        whole: Numbers of regions.
    """
    touched = not whole.isdisjoint(range(row.first, row.last + 1))
    narrows_behind = row.inputs_kept < 1.0 and row.first - 1 in whole
    return not narrows_behind and (not touched or is_whole(row))


def is_whole(row: Candidate) -> bool:
    """Whether a candidate is a region as the teacher has it."""
    return row.first == row.last and not row.widths and not row.ranks and row.inputs_kept == 1.0


def taken_back(plan: Plan, position: int, candidates: Candidates, regions: Sequence[RegionInfo]) -> Plan:
    """The plan with one decision undone: its regions are the teacher's own again, every other decision stays.

    Args:
        plan: What was decided.
        position: Of the decision.
        candidates: Hold each region as it is.
        regions: Of the teacher.

    Limits: channels that the next decision takes from this one's output stay away: they are that decision's.
    """
    decision = plan.decisions[position]
    rows = {row.first: row for row in candidates.rows if is_whole(row)}
    span = range(decision.candidate.first, decision.candidate.last + 1)
    whole = [_kept(rows[index], regions[index], decision.outputs_kept if index == span[-1] else 1.0) for index in span]
    before = list(plan.decisions[:position])
    if before and decision.candidate.inputs_kept < 1.0:
        before[-1] = _with_outputs(before[-1], 1.0)
    decisions = (*before, *whole, *plan.decisions[position + 1 :])
    return replace(
        plan,
        decisions=decisions,
        macs=sum(d.macs_after for d in decisions) / max(candidates.macs, 1),
        params=sum(d.params_after for d in decisions) / max(candidates.params, 1),
        predicted_harm_kl=sum(d.predicted_harm_kl for d in decisions),
    )


def _kept(row: Candidate, region: RegionInfo, outputs_kept: float) -> Decision:
    whole = Decision(
        node=region.name,
        kind="keep",
        candidate=row,
        outputs_kept=1.0,
        evidence=_UNKNOWN,
        predicted_harm_kl=0.0,
        macs_before=region.macs,
        macs_after=region.macs,
        params_before=region.params,
        params_after=region.params,
        refused=(),
    )
    return whole if outputs_kept == 1.0 else _with_outputs(whole, outputs_kept)


def _with_outputs(decision: Decision, outputs_kept: float) -> Decision:
    row = decision.candidate
    return replace(
        decision,
        outputs_kept=outputs_kept,
        macs_after=round(row.macs_fixed + outputs_kept * row.macs_out),
        params_after=round(row.params_fixed + outputs_kept * row.params_out),
    )
