"""What the command line shows: results on stdout, log and errors on stderr; tables on a terminal, columns in a pipe."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from causal_compress.errors import CausalCompressError
from causal_compress.progress import enabled

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from causal_compress.doctor import Diagnosis
    from causal_compress.results import Plan, Scorecard, ScoreRow

TRACEBACKS = 5
"""Logging level below DEBUG at which faults are shown with their traceback (`-vv`)."""

_PROSE = 24
"""Cells of a table on a terminal are broken, between words, only where they are longer: figures stay on one line."""

_KEPT = "  nothing is lost: finished stages are in the run folder, the same command goes on after them\n"

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters but the line feed, and what ends a line or turns its direction."""

_Column = Sequence[str]  # its heading, then its cells


@contextmanager
def speaking(verbosity: int) -> Iterator[None]:
    """Lets the package's log and progress reach stderr while the block runs.

    Args:
        verbosity: -1 warnings only, 0 what is going on, 1 details, 2 or more tracebacks as well.
    """
    from rich.console import Console

    logger, console = logging.getLogger("causal_compress"), Console(stderr=True)
    level = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}.get(verbosity, TRACEBACKS)
    before, handler = logger.level, _handler(console)
    logger.setLevel(level)
    logger.addHandler(handler)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a missing GPU while compiling
    try:
        with enabled(console):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _handler(console: Console) -> logging.Handler:
    if console.is_terminal:
        from rich.logging import RichHandler

        return RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


def tell(line: str) -> None:
    """Prints a line of a result; what would break it or steer a terminal is escaped, and so is what stdout lacks."""
    sys.stdout.write(_line(line) + "\n")


def tell_lines(text: str) -> None:
    """Prints a result of several lines, such as JSON, which the escapes of `tell` leave JSON."""
    sys.stdout.write(_sayable(_harmless(text)) + "\n")


def _line(text: str) -> str:
    return _sayable(_harmless(text).replace("\n", "\\n"))


def _harmless(text: str) -> str:
    """Text whose control characters, which names of classes and columns may hold, are escaped; but line feeds."""
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _sayable(text: str) -> str:
    """Text in which the characters that the encoding of stdout lacks are escaped as in JSON."""
    encoding = sys.stdout.encoding or "utf-8"  # None: a StringIO
    if _exists(text, encoding):
        return text
    return "".join(char if _exists(char, encoding) else json.dumps(char)[1:-1] for char in text)


def _exists(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def complain(error: CausalCompressError) -> int:
    """Prints an error that is the user's to mend; returns the exit code."""
    sys.stderr.write(f"error: {_harmless(str(error))}\n")
    _trace(error)
    return error.exit_code


def confess(error: BaseException, *, resumes: bool) -> int:
    """Prints an error that is our bug: what, where, how to report it; returns the exit code.

    Args:
        error: What nobody foresaw.
        resumes: Whether the command keeps finished stages.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "unknown"
    what = "".join(traceback.format_exception_only(error)).strip()
    sys.stderr.write(
        "error: causal-compress failed in a way it should not: this is our bug, not yours.\n"
        f"  what: {_shortened(what, 600)}\n"
        f"  where: {where}\n"
        f"{_KEPT if resumes else ''}"
        "  to report it, send this text, the output of the same command with -vv, and of 'causal-compress doctor'\n"
    )
    _trace(error)
    return 1


def _trace(error: BaseException) -> None:
    if logging.getLogger("causal_compress").isEnabledFor(TRACEBACKS):
        sys.stderr.write("".join(traceback.format_exception(error)))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " ..."


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on a terminal, aligned columns in a pipe, however wide they are.

    On a terminal too narrow for it the table is cut between columns, or turned on its side, rows next to each other,
    and cut between them: nothing in it is left out.
    """
    from rich.console import Console

    console, table = Console(), [[_line(cell) for cell in row] for row in (header, *rows)]
    if console.is_terminal:
        for part in _parts_that_fit(table, console.width):
            console.print(_drawn(part, console.width))
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def _parts_that_fit(table: Sequence[_Column], width: int) -> list[list[_Column]]:
    """The table's columns as one table or several, each beginning with what tells its rows apart."""
    columns: list[_Column] = list(zip(*table, strict=True))
    upright = _cut(columns, _identifying(columns), width)
    if len(table) == 1 or (len(upright) == 1 and _fits(upright[0], width)):
        return upright
    sideways = _cut(table, 1, width)
    return upright if len(upright) < len(sideways) and all(_fits(part, width) for part in upright) else sideways


def _identifying(columns: Sequence[_Column]) -> int:
    """How many columns, from the left, are needed for no two rows to be alike in them."""
    for count in range(1, len(columns)):
        if len(set(zip(*columns[:count], strict=True))) == len(columns[0]):
            return count
    return 1


def _cut(columns: Sequence[_Column], repeated: int, width: int) -> list[list[_Column]]:
    """As few parts as fit, of about equal numbers of columns, the first columns in each; single ones if none fit."""
    first, rest = columns[:repeated], columns[repeated:]
    parts = [list(columns)]
    for count in range(1, len(rest) + 1):
        size = -(-len(rest) // count)
        parts = [[*first, *rest[start : start + size]] for start in range(0, len(rest), size)]
        if all(_fits(part, width) for part in parts):
            break
    return parts


def _fits(columns: Sequence[_Column], width: int) -> bool:
    return sum(map(_least, columns)) <= _inside(columns, width)


def _inside(columns: Sequence[_Column], width: int) -> int:
    return width - 3 * len(columns) - 1  # a cell has a blank on either side and a line on its right


def _least(column: _Column) -> int:
    """Width below which a figure or a word would be broken."""
    return min(_most(column), max(_PROSE, _most([word for cell in column for word in cell.split()])))


def _most(texts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts), default=0)


def _drawn(columns: Sequence[_Column], width: int) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    room, widths = _inside(columns, width), [_most(column) for column in columns]
    least = [_least(column) if _fits(columns, width) else 1 for column in columns]
    while sum(widths) > room and widths != least:
        widest = max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n], n))
        widths[widest] -= 1
    heads = [Text(column[0]) for column in columns]
    table = Table(*(Column(head, width=wide, overflow="fold") for head, wide in zip(heads, widths, strict=True)))
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def show_scorecard(scorecard: Scorecard) -> None:
    """Prints the scorecard: one row for each model, runtime, batch size and number of threads; then the verdict."""
    header = (
        "model",
        "runtime",
        "batch",
        "threads",
        "accuracy",
        "drop [pp]",
        "MACs",
        "params",
        "size",
        "p50",
        "speed-up",
    )
    show_table(header, [_score_cells(row) for row in scorecard.rows])
    tell(f"verdict: {scorecard.verdict}")
    for line in (*scorecard.reasons, *(f"note: {note}" for note in scorecard.notes)):
        tell(f"  {line}")


def _score_cells(row: ScoreRow) -> tuple[str, ...]:
    teacher = row.model == "teacher"
    low, high = row.drop_ci_pp
    slow, fast = row.speedup_ci
    return (
        row.model,
        f"{row.runtime} {row.precision}",
        str(row.batch),
        str(row.threads),
        f"{row.accuracy_pct:.2f} % of {row.n}",
        "" if teacher else f"{row.drop_pp:.2f} ({low:.2f} to {high:.2f})",
        _count(row.macs),
        _count(row.params),
        f"{_count(row.size_bytes)}B",
        f"{row.latency_ms_p50:.3g} ms",
        "" if teacher else f"{row.speedup:.2f}x ({slow:.2f} to {fast:.2f})",
    )


def show_plan(plan: Plan) -> None:
    """Prints a plan: what would merge and narrow, what it would save, and what was left whole and why."""
    header = ("node", "what", "stays", "MACs", "params", "predicted harm")
    rows = [
        (
            decision.node,
            decision.kind,
            f"region {decision.candidate.representative} of {decision.candidate.first}-{decision.candidate.last}",
            f"{_count(decision.macs_before)} -> {_count(decision.macs_after)}",
            f"{_count(decision.params_before)} -> {_count(decision.params_after)}",
            f"{decision.predicted_harm_kl:.3g} nats",
        )
        for decision in plan.decisions
    ]
    show_table(header, rows)
    tell(
        f"predicted: {plan.macs:.3g} of the MACs, {plan.params:.3g} of the parameters, "
        f"harm {plan.predicted_harm_kl:.3g} nats (output KL)"
    )
    if plan.latency_measured is not None:
        tell(f"latency of the plan's network as timed here: {plan.latency_measured:.3f} of the teacher's")
    if plan.size_bytes is not None:
        tell(f"file of the plan's network: {plan.size_bytes:,} bytes")
    for skip in plan.skipped:
        tell(f"  left whole: {skip.what}: {skip.reason}")


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Prints what the doctor found, with a remedy for all that is absent or broken."""
    place = diagnosis.machine
    memory = f"{place['memory_bytes'] / 2**30:.1f} GiB of memory"
    tell(f"{place['platform']}, {place['cpu']}, {place['cores']} cores, {memory}")
    tell("  ".join(f"{name} {version}" for name, version in diagnosis.versions.items()))
    rows = [
        (check.name, check.status, check.version or "", check.detail + (f"; {check.remedy}" if check.remedy else ""))
        for check in diagnosis.checks
    ]
    show_table(("what", "status", "version", "detail"), rows)


def _count(number: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:  # three digits of it make it one
            return f"{number / factor:.3g} {letter}"
    return f"{number:.0f} "
