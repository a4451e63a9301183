"""Progress: bars on a terminal, lines in a pipe, nothing in library use."""

import io
import logging

import pytest
from rich.console import Console

from causal_compress import progress as room
from causal_compress.progress import enabled, progress


@pytest.fixture(autouse=True)
def _informed():
    logger = logging.getLogger("causal_compress")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock finds four seconds gone."""
    ticks = iter(range(0, 10_000, 4))
    monkeypatch.setattr(room.time, "monotonic", lambda: float(next(ticks)))


def terminal(*, is_one):
    return Console(file=io.StringIO(), force_terminal=is_one, width=120)


def test_silent_in_library_use(capfd, caplog, clock):
    assert list(progress([1, 2, 3], label="train")) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_lines_every_ten_seconds_in_a_pipe(caplog, clock):
    with enabled(terminal(is_one=False)):
        assert list(progress(range(9), label="train", unit="image")) == list(range(9))
    assert "train: 3/9 image, 0.25 image/s, 24 s left" in caplog.messages
    assert len(caplog.messages) == 4
    assert caplog.messages[-1].startswith("train: done, 9 image")


def test_bars_on_a_terminal_may_be_nested():
    console = terminal(is_one=True)
    with enabled(console):
        for _ in progress(range(2), label="epochs", unit="epoch"):
            for _ in progress(iter("ab"), label="batches"):
                console.print("a log line")
            for bars in [room._bars.get()]:
                bars.refresh()
    shown = console.file.getvalue()
    assert "epochs" in shown
    assert "a log line" in shown
    assert room._bars.get() is None


def test_quiet_means_quiet(caplog, clock):
    logging.getLogger("causal_compress").setLevel(logging.WARNING)
    console = terminal(is_one=True)
    with enabled(console):
        assert list(progress(range(9), label="train")) == list(range(9))
    assert console.file.getvalue() == ""
    assert not caplog.records


def test_a_loop_that_is_left_early_closes_its_bar():
    with enabled(terminal(is_one=True)):
        loop = progress(range(3), label="train")
        next(loop)
        loop.close()
    assert room._bars.get() is None
