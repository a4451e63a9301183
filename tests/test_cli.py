"""The command line: help, exit codes, errors, and what goes where."""

import errno
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest

from causal_compress import shipped
from causal_compress.cli import cli, main
from causal_compress.errors import BudgetError, DataError
from causal_compress.results import Candidate, Decision, Evidence, Plan, Scorecard, ScoreRow, Skip
from causal_compress.results import FrontPoint as Point

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "help.txt"
NETWORK = ["--arch", "m.py:build", "--data", "npz:x.npz", "--out", "run"]


def row(model, **changed):
    values = {"runtime": "torch", "precision": "fp32", "batch": 1, "threads": 1, "accuracy_pct": 93.39, "n": 10_000}
    values |= {
        "drop_pp": 0.0,
        "drop_ci_pp": (0.0, 0.0),
        "params": 855_770,
        "macs": 125_485_706,
        "size_bytes": 3_423_080,
    }
    values |= {"latency_ms_p50": 5.25, "latency_ms_p95": 5.5, "latency_ms_p99": 6.0, "throughput_per_s": 190.0}
    values |= {"peak_memory_bytes": 10**8, "speedup": 1.0, "speedup_ci": (1.0, 1.0)}
    return ScoreRow(model=model, **(values | changed))


def scorecard(verdict="PASS"):
    student = row(
        "student", drop_pp=0.42, drop_ci_pp=(0.11, 0.73), macs=37_000_000, speedup=2.04, speedup_ci=(2.0, 2.1)
    )
    return Scorecard(verdict=verdict, reasons=("MACs 0.295",), notes=("one core",), rows=(row("teacher"), student))


@pytest.fixture
def rooms(monkeypatch, tmp_path):
    """Stands in for the pipeline and the demo; what it was called with is kept in `calls`."""
    monkeypatch.chdir(tmp_path)
    rooms = SimpleNamespace(calls=[], verdict="PASS", error=None)

    def answer(value):
        def call(*args, **options):
            rooms.calls.append((args, options))
            if rooms.error is not None:
                raise rooms.error
            return value()

        return call

    def outcome():
        return SimpleNamespace(scorecard=scorecard(rooms.verdict), folder=Path("run"))

    pipeline, demo = ModuleType("causal_compress.pipeline"), ModuleType("causal_compress.demo")
    afterwards = ModuleType("causal_compress.afterwards")
    pipeline.compress = answer(outcome)
    pipeline.analyze = answer(lambda: PLAN)
    afterwards.rebenchmark = answer(lambda: scorecard(rooms.verdict))
    afterwards.rebuild_report = answer(lambda: Path("run/report.html"))
    demo.demo = answer(outcome)
    monkeypatch.setitem(sys.modules, "causal_compress.pipeline", pipeline)
    monkeypatch.setitem(sys.modules, "causal_compress.afterwards", afterwards)
    monkeypatch.setitem(sys.modules, "causal_compress.demo", demo)
    return rooms


def child(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "causal_compress"]), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def helps(command, name, parent=None):
    """The help of a command and of all commands below it."""
    with click.Context(command, parent, name, terminal_width=100, **command.context_settings) as context:
        yield f"$ {context.command_path} --help\n{command.get_help(context)}\n"
        for inner, below in sorted(getattr(command, "commands", {}).items()):
            yield from helps(below, inner, context)


def test_help_is_as_it_was():
    shown = "\n".join(helps(cli, "causal-compress"))
    if os.environ.get("CAUSAL_COMPRESS_UPDATE_GOLDEN"):
        GOLDEN.write_text(shown, encoding="utf-8")
    assert shown == GOLDEN.read_text(encoding="utf-8"), "set CAUSAL_COMPRESS_UPDATE_GOLDEN=1 to accept the new help"


def test_help_comes_at_once_and_without_torch():
    code = (
        "import sys; from causal_compress.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'pandas', 'numpy', 'pydantic', 'sklearn') if m in sys.modules], file=sys.stderr)"
    )
    start = time.perf_counter()
    done = child(code=code)
    assert time.perf_counter() - start < 1.0
    assert done.stderr == "[]\n"
    assert "compress" in done.stdout


def test_a_mistyped_model_file_is_not_taken_for_a_run_folder(tmp_path, capsys):
    assert main(["benchmark", str(tmp_path / "studnet.onnx")]) == 1
    message = capsys.readouterr().err
    assert "studnet.onnx" in message
    assert "no such file" in message
    assert "run folder" not in message


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"causal-compress \d\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(("verdict", "code"), [("PASS", 0), ("FAIL", 3), ("INCONCLUSIVE", 4)])
@pytest.mark.parametrize("command", [["compress", *NETWORK], ["benchmark", "run"], ["demo"]])
def test_the_verdict_is_the_exit_code(rooms, capsys, verdict, code, command):
    rooms.verdict = verdict
    assert main(command) == code
    assert f"verdict: {verdict}" in capsys.readouterr().out


def test_flags_and_settings_lie_over_the_recipe(rooms, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {arch: 'torchvision:resnet18', weights: a.pth}\ndata: {source: 'npz:a.npz'}\nseed: 1\n")
    settings = ["--set", "plan.align=16", "--set", "distill=null", "--set", "data.normalize.mean=[0.5,0.25]"]
    flags = ["--weights", "2024", "--data", "csv:b: c.csv", "--seed", "7", "--reuse", "old", "--force"]
    assert main(["compress", "--recipe", str(recipe), "--out", "run", *settings, *flags]) == 0
    ((made, folder), options) = rooms.calls[0]
    assert (made.model.arch, made.model.weights, made.data.source) == ("torchvision:resnet18", "2024", "csv:b: c.csv")
    assert (made.plan.align, made.distill, made.data.normalize.mean, made.seed) == (16, None, [0.5, 0.25], 7)
    assert (folder, options["reuse"], options["force"]) == (Path("run"), Path("old"), True)
    assert options["command"][0] == "causal-compress"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress"], "--out"),
        (["compress", "--out", "run", "--data", "npz:a"], "model.arch"),
        (["analyze", "--out", "run", "--arch", "a:b"], "data.source"),
        (["compress", "--recipe", "restnet", "--out", "run"], "no recipe 'restnet'"),
        (["compress", *NETWORK, "--set", "plan.alline=3"], "align"),
        (["compress", *NETWORK, "--set", "plan.align=-3"], "plan.align"),
        (["compress", *NETWORK, "--seed", "x"], "--seed"),
        (["compres"], "compress"),
        (["benchmark", "run", "--batch", "1,x"], "batches"),
        (["benchmark", "run", "--batch", ""], "batches"),
        (["benchmark", "run", "--runtime", "caffe"], "runtimes"),
        (["recipes", "check", "absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_usage_is_2_and_says_what(rooms, capsys, arguments, words):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert not rooms.calls


def full(*_):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/model.onnx")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("the data is empty", remedy="give more"), 1, "remedy: give more"),
        (BudgetError("no plan fits", remedy="raise budget.macs"), 3, "no plan fits"),
        (full(), 1, "no space left"),
        (PermissionError(errno.EACCES, "denied", "run"), 1, "can't be written"),
        (MemoryError(), 1, "memory ran out"),
        (ZeroDivisionError("by zero"), 1, "our bug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (EOFError("a truncated file"), 1, "our bug"),
    ],
)
def test_errors_are_one_screen_without_traceback(rooms, capsys, error, code, words):
    rooms.error = error
    assert main(["compress", *NETWORK]) == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.err.count("\n") < 12
    assert said.out == ""


def test_a_bug_says_where_and_vv_shows_all(rooms, capsys):
    rooms.error = ZeroDivisionError("by zero")
    assert main(["compress", *NETWORK, "-vv"]) == 1
    said = capsys.readouterr().err
    assert f"{Path(__file__).name}:" in said
    assert "in call" in said
    assert "Traceback" in said


@pytest.mark.parametrize(
    ("command", "goes_on"), [(["compress", *NETWORK], True), (["demo"], True), (["report", "run"], False)]
)
def test_only_commands_with_a_run_folder_promise_to_go_on(rooms, capsys, command, goes_on):
    for error in (KeyboardInterrupt(), ZeroDivisionError("by zero")):
        rooms.error = error
        assert main(command) == (130 if isinstance(error, KeyboardInterrupt) else 1)
        said = capsys.readouterr().err
        assert ("goes on after" in said) == goes_on
        assert goes_on or "nothing is lost" not in said
        assert isinstance(error, KeyboardInterrupt) or ("our bug" in said and f"{Path(__file__).name}:" in said)


def test_json_is_the_scorecard_and_nothing_else(rooms, capsys):
    assert main(["compress", *NETWORK, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema"], printed["verdict"]) == (1, "PASS")
    assert [line["model"] for line in printed["rows"]] == ["teacher", "student"]
    assert printed["rows"][1]["drop_ci_pp"] == [0.11, 0.73]


def test_in_a_pipe_the_scorecard_is_columns(rooms, capsys):
    main(["compress", *NETWORK])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["model", "runtime", "batch", "threads"]
    assert lines[2].startswith("student  torch fp32")
    assert "0.42 (0.11 to 0.73)" in lines[2]
    assert "2.04x (2.00 to 2.10)" in lines[2]
    assert {len(line) for line in lines[:3]} != {80}
    assert lines[-1] == "report: run/report.html"


def test_analyze_shows_the_plan(rooms, capsys):
    assert main(["analyze", *NETWORK]) == 0
    shown = capsys.readouterr().out
    assert "region 2 of 1-2" in shown
    assert "predicted: 0.3 of the MACs, 0.25 of the parameters" in shown
    assert "left whole: fc: the classifier is protected" in shown
    assert main(["analyze", *NETWORK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == 0.3


def test_benchmark_sets_only_what_was_given(rooms):
    assert main(["benchmark", "run", "--batch", "1,7", "--threads", "2", "--runtime", "onnxruntime"]) == 0
    assert main(["benchmark", "run"]) == 0
    (((_, given), _), ((_, nothing), _)) = rooms.calls
    assert (given.batches, given.threads, given.runtimes) == ([1, 7], [2], ["onnxruntime"])
    assert given.model_fields_set == {"batches", "threads", "runtimes"}
    assert nothing.model_fields_set == set()


def test_report_prints_the_path(rooms, capsys):
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"


@pytest.fixture
def one_recipe(monkeypatch, tmp_path):
    path = tmp_path / "resnet.yaml"
    path.write_text("# ResNets of torchvision\nseed: 3\n")
    for module in ("causal_compress.shipped", "causal_compress.commands.about"):
        monkeypatch.setattr(f"{module}.shipped_recipes", lambda: {"resnet": path})
    return path


def test_recipes_are_listed_shown_checked_and_found_by_name(rooms, capsys, one_recipe):
    assert main(["recipes", "list"]) == 0
    assert main(["recipes", "show", "resnet"]) == 0
    assert main(["recipes", "check", str(one_recipe)]) == 0
    shown = capsys.readouterr().out
    assert shown == (
        f"resnet       ResNets of torchvision\n# ResNets of torchvision\nseed: 3\n{one_recipe}: no fault found\n"
    )
    assert main(["compress", "--recipe", "resnet", *NETWORK]) == 0
    assert rooms.calls[0][0][0].seed == 3


def test_a_recipe_with_faults_is_told_with_its_lines(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 1\nplan:\n  allign: 3\n")
    assert main(["recipes", "check", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml:3" in capsys.readouterr().err


def test_two_keys_behind_one_set_are_told_how(capsys):
    assert main(["compress", "--set", "a.b=1", "c.d=2", "--out", "x"]) == 2
    assert "write --set before each" in capsys.readouterr().err


def test_a_misspelt_recipe_name_is_guessed(capsys, one_recipe):
    assert main(["recipes", "show", "restnet"]) == 2
    assert "did you mean 'resnet'?" in capsys.readouterr().err


def test_shipped_recipes_can_be_found_and_are_those_at_the_top():
    assert (ROOT / "recipes").resolve() == (Path(shipped.__file__).parent / "recipes").resolve()
    assert [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml"))] == list(shipped.shipped_recipes())


def test_quiet_and_verbose_choose_what_is_logged(rooms, capsys):
    import logging

    afterwards = sys.modules["causal_compress.afterwards"]

    def chat(*_, **__):
        logger = logging.getLogger("causal_compress.afterwards")
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logger.log(level, "said at %d", level)
        return Path("report.html")

    afterwards.rebuild_report = chat
    heard = {}
    for flag in ("-q", "-v"):
        main(["report", "run", flag])
        heard[flag] = re.findall(r"said at (\d+)", capsys.readouterr().err)
    assert heard == {"-q": ["30"], "-v": ["10", "20", "30"]}
    assert not logging.getLogger("causal_compress").handlers


def test_a_terminal_gets_a_table():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_cli import scorecard;"
        "from causal_compress.console import show_scorecard; show_scorecard(scorecard())"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment, cwd=ROOT):
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 20)[0]:
            try:
                shown += os.read(ours, 65_536)
            except OSError:  # the other end was closed
                break
    os.close(ours)
    assert "┃" in shown.decode()
    assert "2.04x" in shown.decode()


def test_ctrl_c_ends_a_real_process_with_one_line(tmp_path):
    code = (
        "import sys, os, signal, types; from causal_compress.cli import main;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background shell hands on an ignored one
        "m = types.ModuleType('causal_compress.afterwards');"
        "m.rebuild_report = lambda _: os.kill(os.getpid(), signal.SIGINT);"
        "sys.modules['causal_compress.afterwards'] = m; sys.exit(main(['report', 'run']))"
    )
    done = child(code=code)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


CANDIDATE = Candidate(
    first=1,
    last=2,
    representative=2,
    adapter=None,
    inputs_kept=1.0,
    widths={},
    macs_fixed=0.0,
    macs_out=1.0,
    params_fixed=0.0,
    params_out=1.0,
    harm_kl=0.01,
    harm_stderr=0.001,
    relative_error=0.1,
)
PLAN = Plan(
    decisions=(
        Decision(
            node="layer1",
            kind="merge",
            candidate=CANDIDATE,
            outputs_kept=1.0,
            evidence=Evidence(cka=0.9, same_node_share=None, ace=None, relative_error=0.1),
            predicted_harm_kl=0.01,
            macs_before=2_000_000,
            macs_after=1_000_000,
            params_before=2_000,
            params_after=1_000,
            refused=(),
        ),
    ),
    macs=0.3,
    params=0.25,
    predicted_harm_kl=0.01,
    front=(Point(macs=0.3, params=0.25, harm_kl=0.01),),
    skipped=(Skip(what="fc", reason="the classifier is protected"),),
)
