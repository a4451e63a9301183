"""Gives the command line inputs that are wrong in many ways, and records what it says, its exit code, and what is lost.

    python benchmarks/bad_inputs.py            # writes benchmarks/results/bad_inputs.json and docs/bad-inputs.md
    python benchmarks/bad_inputs.py --quick    # all in one process, without mounts; prints, writes nothing
    python benchmarks/bad_inputs.py --only tab # the cases whose title holds `tab`; prints, writes nothing

The cases stand in `bad_input_cases.py`. Each gets a folder of its own with a small network for scikit-learn's digits,
its weights and a quick recipe, makes its bad input there, and runs one command. Most run in this process through
`causal_compress.cli.main`, some as a process of their own. Full and read-only disks are small mounts; where mounting is
not allowed, or not wanted, the system call that would fail is made to fail instead.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bad_input_cases import CASES
from bad_input_parts import RECIPE, Case, Place, compress, mounted, start

from causal_compress.cli import main as command_line
from causal_compress.provenance import machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "bad_inputs.json"
DOCUMENT = ROOT / "docs" / "bad-inputs.md"
MOST_LINES = 25
LONGEST_S = 300


@dataclass(frozen=True)
class Row:
    """What one bad input got.

    `lines` counts all of stderr, progress included; `message` begins where the error does. `lost` names files that
    were changed, removed or left half written; `faults` says what else is wrong with the answer. Both should be empty.
    """

    group: str
    input: str
    command: str
    exit_code: int
    message: str
    lines: int
    traceback: bool
    lost: tuple[str, ...]
    faults: tuple[str, ...]
    process: str


def main() -> int:
    """Run the cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="only titles that hold it; nothing is written then")
    parser.add_argument("--quick", action="store_true", help="one process, no mounts; nothing is written then")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sound = prepare(Path(temporary) / "sound")
        rows = []
        for number, (group, case) in enumerate(cases()):
            if given.only is not None and given.only not in case.title:
                continue
            rows.append(run_case(group, case, Path(temporary) / str(number), sound, quick=given.quick))
            print(_told(rows[-1], whole=given.only is not None), flush=True)
    if given.only is None and not given.quick:
        write(rows)
    return int(any(row.faults or row.lost for row in rows))


def cases() -> list[tuple[str, Case]]:
    """All cases with their groups."""
    return [(group, case) for group, members in CASES.items() for case in members]


def prepare(folder: Path) -> Path:
    """A folder with weights, recipe, and a finished run.

    Args:
        folder: Is made.
    """
    folder.mkdir()
    start(folder)
    code, said = _in_process(compress(), folder, ())
    if code not in (0, 4):  # nothing is benchmarked, so the verdict is INCONCLUSIVE
        raise RuntimeError(f"the sound run failed: {said}")
    return folder


def run_case(group: str, case: Case, folder: Path, sound: Path, *, quick: bool) -> Row:
    """Make one bad input and run its command.

    Args:
        group: Heading of the case.
        case: What is wrong.
        folder: Is made.
        sound: From `prepare`.
        quick: Whether to start no process and mount nothing.
    """
    folder.mkdir()
    for name in ("teacher.pt", "recipe.yaml"):
        shutil.copyfile(sound / name, folder / name)
    with ExitStack() as undo:
        may_mount = not quick and _can_mount(folder / "trial")
        arguments = case.make(Place(folder, undo, sound / "run", may_mount))
        before = fingerprints(folder)
        own = case.child and not quick
        code, said = (_child if own else _in_process)(arguments, folder, case.absent)
        lost = tuple(losses(folder, before))
    message = _message(said).replace(str(folder), "$PWD").replace(str(ROOT), "$ROOT")
    return Row(
        group=group,
        input=case.title,
        command="causal-compress " + shlex.join(arguments),
        exit_code=code,
        message=message,
        lines=len(said.splitlines()),
        traceback="Traceback" in said,
        lost=lost,
        faults=tuple(_faults(case, code, said)),
        process="own" if own else "shared",
    )


def fingerprints(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder; who works in a run folder signs its .lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(folder: Path, before: dict[str, str]) -> Iterator[str]:
    """What is not as it was, and finished stages of which a file is not as recorded."""
    after = fingerprints(folder)
    if "PICKLE-WAS-RUN" in after:
        yield "code from the input was run"
    for name, digest in before.items():
        if after.get(name) != digest:
            yield f"{name} was " + ("changed" if name in after else "removed")
    for name in after.keys() - before.keys():
        path = folder / name
        if path.name == "run.json":
            yield from _unsound(path, after, folder)
        elif path.name.endswith(".tmp"):
            yield f"{name} was left behind"


def _unsound(record: Path, after: dict[str, str], folder: Path) -> Iterator[str]:
    for stage in json.loads(record.read_text(encoding="utf-8"))["stages"]:
        for name, digest in stage["files"].items():
            file = str((record.parent / name).relative_to(folder))
            if after.get(file) != digest:
                yield f"{file} is not as {stage['stage']} recorded it"


def _faults(case: Case, code: int, said: str) -> Iterator[str]:
    message = _message(said)
    if code != case.code:
        yield f"exit code {code}, wanted {case.code}"
    if "Traceback" in said:
        yield "a traceback"
    if (lines := len(said.splitlines())) > MOST_LINES:
        yield f"{lines} lines"
    if "our bug" in said:
        yield "it is called our bug"
    if "remedy:" not in message and "Try '" not in message:
        yield "no remedy"
    yield from (f"it does not say {word!r}" for word in case.says if word not in message)


def _message(said: str) -> str:
    """From the error on; before it stand log lines."""
    lines = said.splitlines()
    first = next((number for number, line in enumerate(lines) if line.lower().startswith(("error:", "usage:"))), 0)
    return "\n".join(line.rstrip() for line in lines[first:])


def _in_process(arguments: Sequence[str], folder: Path, absent: Sequence[str]) -> tuple[int, str]:
    before, said = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
            _hidden(absent),
        ):
            return command_line(list(arguments)), said.getvalue()
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _hidden(packages: Sequence[str]) -> Iterator[None]:
    """Importing these fails as if they were not installed."""
    before = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(before)


def _child(arguments: Sequence[str], folder: Path, absent: Sequence[str]) -> tuple[int, str]:
    hide = f"import sys; sys.modules.update(dict.fromkeys({list(absent)}))"
    code = f"{hide}; from causal_compress.cli import main; sys.exit(main())"
    start_as = ["-c", code] if absent else ["-m", "causal_compress"]
    done = subprocess.run(
        [sys.executable, *start_as, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    return done.returncode, done.stderr


def _can_mount(folder: Path) -> bool:
    try:
        with mounted(folder, "size=4k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _told(row: Row, *, whole: bool) -> str:
    wrong = [*row.faults, *row.lost]
    told = f"{'WRONG' if wrong else 'ok':<6}{row.exit_code}  {row.group}: {row.input}"
    return "\n".join([told, *(f"        {fault}" for fault in wrong), *([row.message, ""] if whole or wrong else [])])


def write(rows: Sequence[Row]) -> None:
    """Write the results, and the document from them.

    Args:
        rows: Of all cases.
    """
    content = {
        "schema": 1,
        "machine": machine(),
        "command": "python benchmarks/bad_inputs.py",
        "rows": [asdict(row) for row in rows],
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document([asdict(row) for row in rows]), encoding="utf-8")


def document(rows: Sequence[dict[str, object]]) -> str:
    """The results as Markdown.

    Args:
        rows: As they stand in the results.
    """
    parts = [
        "# What bad inputs get",
        "<!-- Written by benchmarks/bad_inputs.py from benchmarks/results/bad_inputs.json: change those, not this. -->",
        f"{len(rows)} inputs, each wrong in one way, given to the real command line. Each must end with the right exit "
        f"code (1 error, 2 wrong usage or recipe, 3 budget) and at most {MOST_LINES} lines that say what is wrong and "
        "what to do, without a traceback. Every file must stay as it was, and every finished stage of a run whole. "
        "`$PWD` stands for the folder in which the command ran.",
        "\n".join(
            ["| input | exit code | lines | traceback | lost |", "|---|---:|---:|---|---|", *map(_table_row, rows)]
        ),
        "What a command does not name comes from this `recipe.yaml`; its `teacher.pt` is sound:",
        f"```yaml\n{RECIPE}```",
    ]
    for group in CASES:
        parts.append(f"## {group}")
        for row in rows:
            if row["group"] == group:
                parts += [f"### {row['input']}", f"```text\n$ {row['command']}\n{row['message']}\n```"]
    return "\n\n".join(parts) + "\n"


def _table_row(row: dict[str, object]) -> str:
    lost = ", ".join(row["lost"]) or "nothing"  # type: ignore[call-overload]
    return (
        f"| {row['group']}: {row['input']} | {row['exit_code']} | {row['lines']} "
        f"| {'yes' if row['traceback'] else 'no'} | {lost} |"
    )


if __name__ == "__main__":
    sys.exit(main())
