"""The house keeps its order: who may import whom, how long things may grow, and whether documents tell the truth."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import causal_compress
from causal_compress import errors
from causal_compress.errors import CausalCompressError
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe, recipe_yaml
from causal_compress.shipped import headline, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "causal_compress"
MODULES = sorted(PACKAGE.rglob("*.py"))
BESIDES = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).glob("*.py"))
"""Code that isn't shipped; it need not import in order, but it stays as small."""

FOLDERS = ("inputs", "understand", "shrink", "recover", "deploy", "explain", "counterfactual", "commands")
ROOMS = (*FOLDERS[:-1], "runs", "pipeline", "commands", "cli")
"""In the order in which data flows: a room imports from those above it, never from those below."""
FREE = {"__init__", "errors", "files", "progress", "provenance", "recipe", "recipe_faults", "recipe_file", "results"}
"""Import nothing but one another; every room may import them."""
ROOM_OF = {
    "runs": "runs",
    "runfolder": "runs",
    "recipe_differences": "runs",
    "pipeline": "pipeline",
    "stages": "pipeline",
    "planning": "pipeline",
    "searching": "pipeline",
    "afterwards": "pipeline",
    "explanations": "pipeline",
    "demo": "commands",
    "doctor": "commands",
    "shipped": "commands",
    "console": "commands",
    "cli": "cli",
    "__main__": "cli",
}
"""Modules that lie in no folder."""
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(parts: tuple[str, ...]) -> str:
    """The room of a module, given its path inside the package."""
    if parts[0] in FREE:
        return "free"
    if len(parts) > 1 or parts[0] in FOLDERS:
        return parts[0]
    return ROOM_OF.get(parts[0], f"{parts[0]} has no room: see ROOM_OF")


def imported(tree: ast.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and path of everything that is imported from the package, wherever in the file."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "causal_compress":
            names = [f"causal_compress.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from ((node.lineno, tuple(n.split(".")[1:])) for n in names if n.startswith("causal_compress."))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_room_imports_only_from_rooms_above(path: Path) -> None:
    own = room(path.relative_to(PACKAGE).with_suffix("").parts)
    assert own in (*ROOMS, "free"), own
    for line, parts in imported(parsed(path)):
        theirs = room(parts)
        allowed = theirs == "free" or (own in ROOMS and theirs in ROOMS and ROOMS.index(theirs) <= ROOMS.index(own))
        assert allowed, f"{named(path)}:{line}: {own} may not import {'.'.join(parts)} ({theirs})"


def test_no_relative_imports_hide_from_the_rule() -> None:
    for path in MODULES:
        hidden = [n.lineno for n in ast.walk(parsed(path)) if isinstance(n, ast.ImportFrom) and n.level]
        assert not hidden, f"{named(path)}:{hidden[0]}: write imports in full"


@pytest.mark.parametrize("path", [*MODULES, *BESIDES], ids=named)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{named(path)} has {lines} lines (limit {MOST_LINES}): cut it where data changes hands"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{named(path)}:{node.lineno}: {node.name}"
            assert length <= MOST_FUNCTION_LINES, f"{where} has {length} lines (limit {MOST_FUNCTION_LINES})"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_library_code_does_not_print(path: Path) -> None:
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not printed, f"{named(path)}:{printed[0]}: use logging, or console.py"


def test_every_package_folder_says_what_it_is() -> None:
    for folder in {path.parent for path in MODULES}:
        assert (folder / "__init__.py").is_file(), f"{named(folder)} has no __init__.py"
    for path in MODULES:
        assert ast.get_docstring(parsed(path)), f"{named(path)} has no docstring"


def test_warnings_are_errors(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings") == ["error"]


def error_classes() -> list[type[CausalCompressError]]:
    found = [
        value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, CausalCompressError)
    ]
    assert len(found) > 8
    return found


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_has_an_exit_code_and_a_remedy(kind: type[CausalCompressError]) -> None:
    with pytest.raises(TypeError, match="remedy"):
        kind("it broke")  # type: ignore[call-arg]
    message = str(kind("it broke", found="a", wanted="b", remedy="mend it"))
    assert message == "it broke\n  found: a\n  wanted: b\n  remedy: mend it"
    assert f"{kind.__name__:<32}"[:30].rstrip() in (errors.__doc__ or "")
    drawn = re.search(rf"{kind.__name__} +exit (\d)", errors.__doc__ or "")
    assert drawn, f"{kind.__name__} is not in the tree of errors.py"
    assert int(drawn[1]) == kind.exit_code in (1, 2, 3)


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_errors_are_raised_with_a_remedy(path: Path) -> None:
    names = {kind.__name__ for kind in error_classes()}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            given = {keyword.arg for keyword in node.keywords}
            assert "remedy" in given or None in given, f"{named(path)}:{node.lineno}: {node.func.id} without a remedy"


def test_recipes_are_shipped() -> None:
    assert {"resnet", "plain-cnn", "tiny-cnn", "mobile", "vit", "mlp", "cifar-resnet"} <= set(shipped_recipes())
    assert (ROOT / "recipes").resolve() == PACKAGE / "recipes"


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_holds_only_what_differs(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert headline(path)
    assert any(f"--recipe {path.stem}" in line for line in header), "the header shows the exact command"
    assert any("expected" in line.lower() for line in header), "the header says what to expect"
    for key, value in _leaves(recipe.model_dump(exclude_unset=True)):
        default = _at(Recipe().model_dump(), key)
        assert value != default, f"{named(path)}: {'.'.join(key)} is the default anyway"


def _leaves(values: object, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _leaves(value, (*key, name))
    else:
        yield key, values


def _at(values: object, key: tuple[str, ...]) -> object:
    for name in key:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, causal_compress; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", causal_compress.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert callable(getattr(causal_compress, name))
    assert inspect.getdoc(getattr(causal_compress, name))


def test_no_other_public_name_is_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        _ = causal_compress.magic
    assert set(causal_compress.__all__) == set(causal_compress._HOMES)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_tree_is_true() -> None:
    """Every module in the tree exists, and every module is in the tree."""
    block = re.search(r"<!-- tree -->\n```text\n(.*?)```", readme(), re.DOTALL)
    assert block, "README.md has no tree"
    told: set[str] = set()
    folder = ""
    for line in block[1].splitlines():
        name = line.split()[0] if line.split() else ""
        depth = len(line) - len(line.lstrip())
        if name.endswith("/") and depth == 2:
            folder = name
        elif name.endswith(".py") and depth >= 2:
            told.add((folder if depth == 4 else "") + name)
    real = {str(path.relative_to(PACKAGE)) for path in MODULES if not path.name.startswith("__")}
    assert told == real, "run `python benchmarks/tables.py`"


def test_documents_show_what_the_results_say() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_tables_come_from_results_and_are_left_empty_without(tmp_path: Path) -> None:
    source = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert source is not None
    assert source.loader is not None
    tables = importlib.util.module_from_spec(source)
    source.loader.exec_module(tables)
    machine = {"platform": "old", "cpu": "fast", "cores": 2, "python": "3.11"}
    rows = [{"what": "a|b", "latency_ms_p50": 1.2345, "n": 10000, "drop_ci_pp": [0.1, None]}, {"other": True}]
    rows += [{"throughput_per_s": 5, "throughput_per_cpu_s": 6, "images_per_second": 7, "gain_ci_pp": [None, None]}]
    content = {"schema": 1, "machine": machine, "command": "python x.py", "rows": rows, "means": [{"n": 3}]}
    (tmp_path / "known.json").write_text(json.dumps(content), encoding="utf-8")
    text = "<!-- table:known -->\nold\n<!-- /table -->\n<!-- table:absent -->\nold\n<!-- /table -->\n"
    text += "<!-- table:known @means n -->\n<!-- /table -->\n<!-- table:known n=7,10000 what -->\n<!-- /table -->\n"
    filled = tables.fill(text, tmp_path)
    assert "| what | latency p50 [ms] | n | drop (95 % interval) [pp] |\n|---|---:|---:|---|" in filled
    assert "| a\\|b | 1.234 | 10,000 | 0.10 to  |" in filled
    assert "| other |" in filled
    assert "| throughput [1/s] | throughput [1/CPU s] | images per second | gain (95 % interval) [pp] |" in filled
    assert "| 5 | 6 | 7 |  |" in filled
    assert "n=7,10000 what -->\n| what |\n|---|\n| a\\|b |\n\n" in filled
    assert "@means n -->\n| n |\n|---:|\n| 3 |\n" in filled
    assert "`python x.py`<br>fast, 2 cores, python 3.11" in filled
    assert "<!-- table:absent -->\n<!-- /table -->" in filled
    assert "old" not in filled
    assert tables.fill(filled, tmp_path) == filled


def test_the_readmes_commands_and_files_exist() -> None:
    text = readme()
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        if name != "docs/report.png":  # a picture, made after a run
            assert (ROOT / name).exists(), f"README.md points to {name}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README.md names 'make {target}'"
    for name in re.findall(r"--recipe (\S+)", text):
        assert name in shipped_recipes() or name.endswith(".yaml"), f"README.md names the recipe {name}"


def test_readme_names_every_exit_code_extra_and_command() -> None:
    text = readme()
    for kind in error_classes():
        assert f"| {kind.exit_code} |" in text
    for extra in re.findall(r"^([a-z-]+) = \[$|^([a-z-]+) = \[\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE):
        name = extra[0] or extra[1]
        if name in ("timm", "parquet", "tensorrt", "tensorrt-rtx", "openvino", "dev"):
            assert f"causal-compress[{name}]" in text
    cli = importlib.import_module("causal_compress.cli").cli
    for command in cli.commands:
        assert f"causal-compress {command}" in text, f"README.md does not show 'causal-compress {command}'"
