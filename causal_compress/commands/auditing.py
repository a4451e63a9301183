"""audit and bisect: what compression harmed, and which change did it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.commands.shared import FOLDER, as_json_text, talks
from causal_compress.console import show_table, tell, tell_lines

if TYPE_CHECKING:
    from causal_compress.results import Audit, Bisection, Compared, Estimate, GroupChange, GroupGaps

_MOST_ROWS = 12
Row = tuple[str, str, str, str, str]


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--inputs", type=click.IntRange(min=1), metavar="N", help="Audit so many inputs of the split only.")
@click.option("--groups", metavar="COLUMN", help="Gaps over a table's column, `class`, or FILE.py:CALLABLE.")
@click.option("--split", type=click.Choice(["validation", "test"]), help="Which inputs; default: validation.")
@click.option("--apart", type=FOLDER, metavar="FILE", help="Weights of a second training, a yardstick for drift.")
@click.option("--json", "as_json", is_flag=True, help="Print the audit as JSON.")
@talks
def audit(*, run: Path, apart: Path | None, as_json: bool, **chosen: Any) -> int:
    """Measures in what the student of a RUN differs from its teacher."""
    from causal_compress.afterwards import audit_file, audit_run

    found = audit_run(run, {key: value for key, value in chosen.items() if value is not None}, apart=apart)
    if as_json:
        tell_lines(as_json_text(found))
    else:
        written = audit_file(run)
        _show_audit(found, written.name)
        tell(f"audit: {written}")
    return 0


@click.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--inputs", type=click.IntRange(min=1), metavar="N", help="Calibration inputs for each refit; fewer: faster."
)
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Only the K changes with most harm in the ledger.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@talks
def bisect(*, run: Path, inputs: int | None, top: int | None, as_json: bool) -> int:
    """Finds which change of a RUN costs the most, by undoing each."""
    from causal_compress.afterwards import bisect_run

    found = bisect_run(run, inputs=inputs, top=top)
    if as_json:
        tell_lines(as_json_text(found))
    else:
        _show_bisection(found, run)
        tell(f"bisection: {run / 'bisect.json'}")
    return 0


def _show_audit(found: Audit, file: str) -> None:
    show_table(("what", "teacher", "student", "change (95 %)", "p or n"), list(_audit_rows(found, file)))
    flips = found.flips
    tell(
        f"of {flips.n} {found.split} inputs: {flips.right_to_wrong} right -> wrong, "
        f"{flips.wrong_to_right} wrong -> right, {flips.wrong_to_other_wrong} wrong -> otherwise wrong; "
        f"agreement {flips.agreement.pct:.2f} %"
    )
    for skip in found.skipped:
        tell(f"  not measured: {skip.what}: {skip.reason}")


def _audit_rows(found: Audit, file: str) -> Iterator[Row]:
    yield _accuracies("accuracy", found.overall, f"p = {found.overall.p_value:.3g} (McNemar)")
    for one in found.quality:
        change = f"{one.student - one.teacher:+.4f}"
        if one.change is not None:
            change += "" if one.change.low != one.change.low else f" ({one.change.low:+.4f} to {one.change.high:+.4f})"
        name = one.measure.upper() if len(one.measure) < 4 else one.measure
        yield name, f"{one.teacher:.4f}", f"{one.student:.4f}", change, f"n = {found.n}"
    yield from _changed("class", found.per_class, file)
    if found.groups is not None:
        yield from _changed(found.groups.column, _not_classes(found, found.groups), file)
        gaps = (f"{found.groups.teacher_gap_pp:.2f} pp", f"{found.groups.student_gap_pp:.2f} pp")
        growth = found.groups.growth_pp
        yield f"gap over {found.groups.column}", *gaps, _interval(growth, "pp"), f"n = {growth.n}"
    for row in found.corruptions:
        name = row.corruption if not row.severity else f"{row.corruption} {row.severity}"
        yield _accuracies(name, row.compared, f"beyond clean: {_interval(row.extra_drop_pp, 'pp')}")
    yield from _drifts(found)


def _not_classes(found: Audit, groups: GroupGaps) -> tuple[GroupChange, ...]:
    """The groups but those that stand among the classes already; a table may have a column `class` of another kind."""
    known = {row.name: row.compared for row in found.per_class}
    return tuple(row for row in groups.rows if groups.column != "class" or known.get(row.name) != row.compared)


def _drifts(found: Audit) -> Iterator[Row]:
    """Rank agreements: the floor (teacher against itself) stands in the teacher's column."""
    if (drift := found.attribution) is not None:
        below = f"{_interval(drift.beyond_floor, '')} below the floor"
        yield (
            "attributions, rho",
            f"{drift.floor.value:.3f}",
            f"{drift.student.value:.3f}",
            below,
            f"n = {drift.student.n}",
        )
        if drift.apart is not None:
            yield "  a second training", "", f"{drift.apart.value:.3f}", "", f"n = {drift.apart.n}"
    if (nodes := found.causal_map) is not None and nodes.student is not None and nodes.floor is not None:
        yield "causal map, rho", f"{nodes.floor:.3f}", f"{nodes.student:.3f}", "", f"{len(nodes.nodes)} nodes"


def _changed(what: str, rows: tuple[GroupChange, ...], file: str) -> Iterator[Row]:
    """The groups that changed most, worst first; the file holds all."""
    ordered = sorted(rows, key=lambda row: (row.p_holm, -row.compared.drop_pp))
    for row in ordered[:_MOST_ROWS]:
        yield _accuracies(
            f"{what} {row.name}", row.compared, f"p = {row.p_holm:.3g} (Holm), n = {row.compared.teacher.n}"
        )
    if len(ordered) > _MOST_ROWS:
        yield f"... {len(ordered) - _MOST_ROWS} more", "", "", "", f"all in {file}"


def _accuracies(name: str, compared: Compared, note: str) -> Row:
    low, high = compared.drop_ci_pp
    change = f"{0.0 - compared.drop_pp:+.2f} pp ({0.0 - high:+.2f} to {0.0 - low:+.2f})"
    return name, f"{compared.teacher.pct:.2f} %", f"{compared.student.pct:.2f} %", change, note


def _interval(one: Estimate, unit: str) -> str:
    value = f"{one.value:+.3g} {unit}".rstrip()
    return value if one.low != one.low else f"{value} ({one.low:+.3g} to {one.high:+.3g})"  # NaN: no interval


def _show_bisection(found: Bisection, run: Path) -> None:
    header = (
        "undone",
        "kind",
        "harm removed [nats] (95 %)",
        "accuracy",
        "gain [pp] (95 %)",
        "MACs back",
        "params back",
    )
    rows = [
        (
            one.node,
            one.kind,
            _interval(one.harm_removed_kl, ""),
            f"{one.accuracy.pct:.2f} %",
            "{:+.2f} ({:+.2f} to {:+.2f})".format(one.accuracy_gained_pp, *one.accuracy_gained_ci_pp),
            f"{one.macs_given_back:,}",
            f"{one.params_given_back:,}",
        )
        for one in found.undone
    ]
    show_table(header, rows)
    tell(
        f"as planned: harm {found.heldout_kl:.4f} nats on {found.heldout} held-out inputs, accuracy "
        f"{found.accuracy.pct:.2f} % of {found.accuracy.n}, {found.macs:,} MACs; refits on {found.refit_inputs} inputs"
    )
    for note in found.notes:
        tell(f"  note: {note}")
    for skip in found.skipped:
        tell(f"  not tried: {skip.what}: {skip.reason}")
    if found.undone:
        tell(f"to leave it out: causal-compress compress ... --undo {found.undone[0].node} --out NEW --reuse {run}")
