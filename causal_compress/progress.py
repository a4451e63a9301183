"""Progress of long loops: bars on a terminal, a log line now and then elsewhere, nothing in library use."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

logger = logging.getLogger(__name__)
_LINE_SECONDS = 10.0
_console: ContextVar[Console | None] = ContextVar("causal_compress_progress_console", default=None)
_bars: ContextVar[Progress | None] = ContextVar("causal_compress_progress_bars", default=None)


@contextmanager
def enabled(console: Console | None) -> Iterator[None]:
    """Shows the progress of loops inside the block; the command line does this, libraries do not.

    Args:
        console: Where to; bars if it is a terminal, else log lines. None switches progress off.
    """
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


def progress(iterable: Iterable[T], *, label: str, total: int | None = None, unit: str = "batch") -> Iterator[T]:
    """Passes the items on and shows how far the loop is, at what rate, and how long it will take.

    Silent unless the command line switched it on, and where the `causal_compress` logger is above INFO. Loops may be
    nested.

    Args:
        iterable: What the loop is over.
        label: What is being done, as the user should read it.
        total: Number of items; None: asked of the iterable, unknown if it can't tell.
        unit: What an item is.
    """
    console = _console.get()
    if console is None or not logger.isEnabledFor(logging.INFO):
        return iter(iterable)
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if console.is_terminal:
        return _with_bar(iterable, console, label, total, unit)
    return _with_lines(iterable, label, total, unit)


def _with_lines(iterable: Iterable[T], label: str, total: int | None, unit: str) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_SECONDS:
            last = now
            logger.info("%s: %s", label, _state(done, total, unit, now - start))
    if last > start:  # only loops that have said something need an end
        logger.info("%s: done, %s", label, _state(done, None, unit, time.monotonic() - start))


def _state(done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    count = f"{done}/{total} {unit}" if total is not None else f"{done} {unit}"
    left = f", {max(total - done, 0) / rate:.0f} s left" if total is not None else f", {seconds:.0f} s"
    return f"{count}, {rate:.3g} {unit}/s{left}"


def _with_bar(iterable: Iterable[T], console: Console, label: str, total: int | None, unit: str) -> Iterator[T]:
    # rich allows one live display at a time, so loops inside a loop add their bars to the outer one's.
    outer = _bars.get()
    if outer is not None:
        yield from _advance(iterable, outer, label, total, unit)
        return
    with _new_bars(console) as bars:
        _bars.set(bars)
        try:
            yield from _advance(iterable, bars, label, total, unit)
        finally:
            _bars.set(None)  # not reset(token): a generator may be closed in another context than it began in


def _new_bars(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def _advance(iterable: Iterable[T], bars: Progress, label: str, total: int | None, unit: str) -> Iterator[T]:
    task = bars.add_task(label, total=total, rate="")
    start = time.monotonic()
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            rate = done / max(time.monotonic() - start, 1e-9)
            bars.update(task, completed=done, rate=f"{rate:.3g} {unit}/s")
    finally:
        bars.remove_task(task)
