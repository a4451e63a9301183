"""What is printed: no table loses anything, however narrow the terminal, and every encoding can say everything."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from causal_compress.console import _count, complain, show_table, tell, tell_lines
from causal_compress.errors import DataError

HEADER = ("model", "runtime", "batch", "accuracy", "drop [pp]", "MACs", "size", "p50", "speed-up")
ROWS = [
    (
        model,
        f"{runtime} fp32",
        "1",
        f"9{number}.39 % of 10000",
        drop,
        f"{number}.32 M",
        f"3.4{number} MB",
        "5 ms",
        speed,
    )
    for number, (model, runtime, drop, speed) in enumerate(
        [
            ("teacher", "torch", "", ""),
            ("student", "torch", "0.42 (0.11 to 0.73)", "2.04x (2.00 to 2.10)"),
            ("teacher", "onnxruntime", "", ""),
            ("student", "onnxruntime", "0.43 (0.12 to 0.74)", "1.04x (1.00 to 1.10)"),
        ]
    )
]
PROSE = (
    "not installed; it is needed only where a network is to be run on a GPU: pip install 'causal-compress[tensorrt]'"
)


class Screen(io.TextIOWrapper):
    """A stdout that says that it is a terminal, or that it is none."""

    def __init__(self, encoding: str, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def lines(self) -> list[str]:
        """What was printed, without colours."""
        return re.sub(r"\x1b\[[\d;]*m", "", self.buffer.getvalue().decode(self.encoding)).splitlines()


@pytest.fixture
def screen(monkeypatch):
    def made(columns: int = 80, encoding: str = "utf-8", *, terminal: bool = True) -> Screen:
        new = Screen(encoding, terminal=terminal)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "LINES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", new)
        return new

    return made


def tables(lines: list[str]) -> int:
    return sum(line.startswith("┏") for line in lines)


def unwrapped(lines: list[str]) -> str:
    """The letters of a table of one row on its side, without lines and blanks."""
    cells = [line.strip("│┃").split("│" if "│" in line else "┃") for line in lines if line[0] in "│┃"]
    return "".join("".join(cell[column].strip() for cell in cells) for column in (0, 1)).replace(" ", "")


@pytest.mark.parametrize("columns", [200, 100, 80, 60, 40])
def test_no_cell_is_cut_or_broken_on_a_terminal_that_is_too_narrow(screen, columns):
    shown = screen(columns)
    show_table(HEADER, ROWS)
    printed = shown.lines()
    assert max(map(len, printed)) <= columns
    for cell in {*HEADER, *(cell for row in ROWS for cell in row)}:
        assert cell in "\n".join(printed), cell
    assert tables(printed) == {200: 1, 100: 1, 80: 2, 60: 2, 40: 4}[columns]


def test_few_rows_stand_side_by_side_where_the_table_is_too_wide(screen):
    shown = screen(80)
    show_table(HEADER, ROWS)
    assert [line.strip("┃ ").split() for line in shown.lines() if "┃" in line[:1]] == [
        ["model", "┃", "teacher", "┃", "student"]
    ] * 2
    assert [line.count("% of") for line in shown.lines() if "accuracy" in line] == [2, 2]


def test_many_rows_stay_rows_and_what_names_them_is_repeated(screen):
    shown = screen(60)
    rows = [
        (f"layer{n}", "narrow+low rank", f"region {n} of {n}", "4.72 M -> 1.18 M", "0.00662 nats") for n in range(9)
    ]
    show_table(("node", "what", "stays", "MACs", "harm"), rows)
    assert tables(shown.lines()) == 2
    assert sum("layer7" in line for line in shown.lines()) == 2


def test_prose_is_wrapped_between_words_rather_than_the_table_cut(screen):
    shown = screen(60)
    show_table(("what", "status", "detail"), [("tensorrt", "absent", PROSE), ("onnx", "works", "")])
    assert tables(shown.lines()) == 1
    assert all(any(word in line for line in shown.lines()) for word in PROSE.split())


def test_even_a_word_wider_than_the_terminal_is_shown_whole(screen):
    shown = screen(24)
    show_table(("file", "size"), [("a/rather/long/path/of/a/model.onnx", "3.42 MB")])
    assert max(map(len, shown.lines())) <= 24
    assert "a/rather/long/path/of/a/model.onnx3.42MB" in unwrapped(shown.lines())


def test_a_table_without_rows_is_its_header(screen):
    shown = screen(80)
    show_table(HEADER, [])
    assert "speed-up" in " ".join(shown.lines())


def test_brackets_and_colons_are_text_on_a_terminal(screen):
    shown = screen(80)
    show_table(("drop [pp]", "class"), [("[bold]1", ":smile:")])
    assert all(part in " ".join(shown.lines()) for part in ("drop [pp]", "[bold]1", ":smile:"))


@pytest.mark.parametrize("terminal", [True, False])
def test_what_ascii_lacks_is_escaped_in_tables(screen, terminal):
    shown = screen(80, "ascii", terminal=terminal)
    show_table(("größe λ", "n"), [("né", "1")])
    printed = [re.split(r"\s*\|\s*|  +", line.strip("| ")) for line in shown.lines() if "\\u" in line]
    assert printed == [["gr\\u00f6\\u00dfe \\u03bb", "n"], ["n\\u00e9", "1"]]


def test_json_stays_json_where_ascii_lacks_its_characters(screen):
    shown, value = screen(80, "ascii", terminal=False), {"größe λ": "né 😀"}
    tell_lines(json.dumps(value, ensure_ascii=False))
    assert json.loads(shown.lines()[0]) == value


def test_characters_that_the_encoding_has_are_left_alone(screen):
    shown = screen(80, "latin-1", terminal=False)
    tell("né λ")
    assert shown.lines() == ["né \\u03bb"]


HOSTILE = "a\x1b[31mred\x07\nb\r\x7f\x9b2J\u2028\u202ec"
ESCAPED = r"a\u001b[31mred\u0007\nb\r\u007f\u009b2J\u2028\u202ec"


@pytest.mark.parametrize("terminal", [True, False])
def test_names_can_neither_break_a_line_nor_steer_a_terminal(screen, terminal):
    shown = screen(80, terminal=terminal)
    tell(f"class {HOSTILE}: 3 inputs")
    show_table(("class", "n"), [(HOSTILE, "1")])
    raw = shown.buffer.getvalue().decode()
    assert f"class {ESCAPED}: 3 inputs" in raw.splitlines()
    assert sum(ESCAPED in line for line in raw.splitlines()) == 2
    assert not any(char in raw for char in "\x07\r\x7f\x9b\u2028\u202e")
    assert "\x1b[31m" not in raw


def test_json_keeps_its_lines_and_its_meaning(screen):
    shown = screen(terminal=False)
    tell_lines(json.dumps({HOSTILE: 1}, ensure_ascii=False, indent=2))
    assert len(shown.lines()) == 3
    assert json.loads("\n".join(shown.lines())) == {HOSTILE: 1}


def test_errors_keep_their_lines_but_not_what_steers_a_terminal(capsys):
    complain(DataError("a column can't be read", found="x\x1b[2J", remedy="rename it"))
    assert capsys.readouterr().err == ("error: a column can't be read\n  found: x\\u001b[2J\n  remedy: rename it\n")


@pytest.mark.parametrize(
    ("number", "shown"),
    [(999, "999 "), (1000, "1 k"), (999_499, "999 k"), (999_600, "1 M"), (999_999, "1 M"), (999_600_000, "1 G")],
)
def test_a_count_that_rounds_up_to_the_next_prefix_has_that_prefix(number, shown):
    assert _count(number) == shown
