"""Fills the marked blocks of README.md and docs/*.md: tables from benchmarks/results/*.json, the tree from the modules.

    python benchmarks/tables.py            # writes
    python benchmarks/tables.py --check    # says what would change; exit code 1 if anything would

A block stands between `<!-- table:NAME [COLUMN | COLUMN=VALUE]... -->` and `<!-- /table -->`, or `<!-- tree -->` and
`<!-- /tree -->`. Named columns are shown in that order, all of them where none is named; COLUMN=VALUE,VALUE... shows
only the rows where one of them holds. A table whose results are not there yet is left empty, so that no document shows
a number that nobody measured.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGE = ROOT / "causal_compress"

_TABLE = re.compile(r"(<!-- table:([\w-]+)((?: [\w=.,@-]+)*) -->\n).*?(<!-- /table -->)", re.DOTALL)
_TREE = re.compile(r"(<!-- tree -->\n).*?(<!-- /tree -->)", re.DOTALL)
_READING_ORDER = (
    "results",
    "inputs",
    "understand",
    "shrink",
    "recover",
    "deploy",
    "explain",
    "counterfactual",
    "commands",
)
_FIRST_FILES = ("errors", "recipe", "recipe_file", "recipe_faults", "files", "progress", "provenance")
_WIDEST = 100
_OTHER_FOLDERS = (
    ("recipes/", "one YAML per architecture family (a link into the package)"),
    ("examples/", "architectures for --arch FILE.py:CALLABLE"),
    ("benchmarks/", "one script per table; results/*.json with machine and versions"),
    ("tests/", "test_<module>.py, tiny.py (networks with answers known by hand), golden/"),
    ("docs/", "pictures and longer texts"),
)


def main() -> int:
    """Write the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a document is stale")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        filled = fill(text, RESULTS)
        if filled != text:
            stale.append(path)
            if not check:
                path.write_text(filled, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: " + ("stale; run python benchmarks/tables.py" if check else "written"))
    return int(check and bool(stale))


def fill(text: str, results: Path) -> str:
    """A document with all its blocks made anew.

    Args:
        text: Markdown.
        results: The folder of NAME.json files.
    """
    with_tables = _TABLE.sub(
        lambda found: found[1] + table(results / f"{found[2]}.json", found[3].split()) + found[4], text
    )
    return _TREE.sub(lambda found: found[1] + tree() + found[2], with_tables)


def table(path: Path, columns: Sequence[str] = ()) -> str:
    """Rows as a Markdown table, then the command and the machine; nothing where there is no such file.

    Rows with the same keys share a table; a file may hold several kinds.

    Args:
        path: NAME.json.
        columns: Which keys are shown, in this order; none: all. KEY=VALUE,VALUE...: only rows where one of
            them holds. @LIST: that list of the file instead of its rows.
    """
    if not path.is_file():
        return ""
    content = json.loads(path.read_text(encoding="utf-8"))
    asked = dict(column.split("=", 1) for column in columns if "=" in column)
    (wanted,) = [column[1:] for column in columns if column.startswith("@")] or ["rows"]
    columns = [column for column in columns if "=" not in column and not column.startswith("@")]
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in content[wanted]:
        if any(str(row.get(key)) not in values.split(",") for key, values in asked.items()):
            continue
        row = {key: row.get(key) for key in columns} if columns else row
        kinds.setdefault(tuple(row), []).append(row)
    parts = [_rows(titles, rows) for titles, rows in kinds.items()]
    return "\n\n".join([*parts, f"`{content['command']}`<br>{_machine(content['machine'])}"]) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    """What a reader needs to know of it; the results file has the rest."""
    cores = machine["cores"]
    told = [machine["cpu"], f"{cores} {'core' if cores == 1 else 'cores'}"]
    if "memory_bytes" in machine:
        told.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
    told += machine.get("gpus", [])
    versions = {key: machine[key] for key in ("python", "torch", "ckatorch") if key in machine}
    known = {**versions, **machine.get("versions", {})}
    return ", ".join([*told, *(f"{name} {version}" for name, version in known.items())])


def _rows(titles: Iterable[str], rows: Iterable[dict[str, Any]]) -> str:
    titles = tuple(titles)
    numeric = [all(isinstance(row[title], int | float | None) for row in rows) for title in titles]
    lines = [
        f"| {' | '.join(_title(title) for title in titles)} |",
        f"|{'|'.join('---:' if is_number else '---' for is_number in numeric)}|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row[title], title) for title in titles)} |" for row in rows)])


_UNITS = {
    "pct": "%",
    "pp": "pp",
    "ms": "ms",
    "s": "s",
    "bytes": "bytes",
    "nats": "nats",
    "per_s": "1/s",
    "per_cpu_s": "1/CPU s",
}
_WORD = re.compile(r"per_(?:cpu_)?s(?![a-z])|[^_]+")


def _title(key: str) -> str:
    """`latency_ms_p50` -> `latency p50 [ms]`: the unit that a key names stands in brackets."""
    words = ["(95 % interval)" if word == "ci" else word for word in _WORD.findall(key)]
    unit = next((word for word in words[1:] if word in _UNITS), None)
    plain = " ".join(word for word in words if word != unit)
    return plain if unit is None else f"{plain} [{_UNITS[unit]}]"


def _cell(value: Any, key: str = "") -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return _number(value, key.split("_"))
        case list() | tuple():
            if value and all(item is None for item in value):  # no interval
                return ""
            return (" to " if len(value) == 2 else ", ").join(_cell(item, key) for item in value)
        case dict():
            return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
        case _:
            return str(value).replace("|", "\\|")


def _number(value: float, words: Sequence[str]) -> str:
    """Four digits; accuracies and points to the hundredth, which is one input of 10,000."""
    if {"pp", "accuracy", "validation"} & set(words):
        return f"{round(value, 2) + 0.0:.2f}"  # no -0.00
    if 99 < value < 100:
        return f"{value:,.5g}"  # a share in percent: what is left of it counts
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:,.4g}"


def tree() -> str:
    """The package as a tree, each module with the beginning of its docstring."""
    names = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    last = [
        name
        for name in ("runfolder", "runs", "pipeline", "demo", "doctor", "shipped", "console", "cli")
        if name in names
    ]
    middle = [name for name in names if name not in _FIRST_FILES and name not in last]
    lines = ["causal_compress/"]
    lines += [_line(PACKAGE / f"{name}.py", 2) for name in _FIRST_FILES if name in names]
    for room in _READING_ORDER:
        lines.append(_line(PACKAGE / room, 2))
        lines += [_line(path, 4) for path in sorted((PACKAGE / room).glob("*.py")) if path.stem != "__init__"]
    lines += [_line(PACKAGE / f"{name}.py", 2) for name in (*middle, *last)]
    lines += [f"{name:<32}{what}" for name, what in _OTHER_FOLDERS if (ROOT / name).is_dir()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _line(path: Path, indent: int) -> str:
    source = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=\w)[.;](?:\s|$)", first)[0].rstrip(".")
    beginning = sentence if len(sentence) <= _WIDEST else re.split(r"[,:] (?!.*[,:] )", sentence[:_WIDEST])[0]
    name = " " * indent + path.name + ("/" if path.is_dir() else "")
    return f"{name:<32}{beginning}"


if __name__ == "__main__":
    sys.exit(main())
