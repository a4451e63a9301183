"""The user's own files import what lies beside them: when they are read, when they are called, and no other's."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from causal_compress.errors import UsageError
from causal_compress.inputs.callables import call, load_callable


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """What these tests import is gone after each."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0].endswith("_x"):
            del sys.modules[name]


def files(folder: Path, own: str, helpers: str, where: str = "helpers_x.py") -> Path:
    (folder / where).parent.mkdir(parents=True, exist_ok=True)
    (folder / where).write_text(helpers)
    (folder / "own_x.py").write_text(own)
    return folder


def called(text: str, **arguments: Any) -> Any:
    return call(load_callable(text, option="model.arch"), arguments, text=text, option="model.arch")


LAZY = "def make():\n    import helpers_x\n    return helpers_x.NAME\n"
EAGER = "import helpers_x\ndef make():\n    return helpers_x.NAME\n"


def test_an_import_inside_a_function_finds_what_lies_beside_the_file(tmp_path: Path) -> None:
    folder = files(tmp_path / "a", LAZY, "NAME = 'a'\n")
    path = list(sys.path)
    assert called(f"{folder}/own_x.py:make") == "a"
    assert sys.path == path


@pytest.mark.parametrize("first", [LAZY, EAGER])
@pytest.mark.parametrize("second", [LAZY, EAGER])
@pytest.mark.parametrize("where", ["helpers_x.py", "helpers_x/__init__.py"])
def test_every_file_gets_its_own_sibling(tmp_path: Path, first: str, second: str, where: str) -> None:
    made = []
    for name, text in (("a", first), ("b", second)):
        folder = files(tmp_path / name, text, f"NAME = {name!r}\n", where)
        made.append(load_callable(f"{folder}/own_x.py:make", option="model.arch"))
    assert [function() for function in (*made, *made[::-1])] == ["a", "b", "b", "a"]


def test_packages_without_an_init_file_are_told_apart(tmp_path: Path) -> None:
    own = "def make():\n    from helpers_x import names\n    return names.NAME\n"
    for name in "abab":
        folder = files(tmp_path / name, own, f"NAME = {name!r}\n", "helpers_x/names.py")
        assert called(f"{folder}/own_x.py:make") == name


def test_a_sibling_is_the_same_module_at_every_call(tmp_path: Path) -> None:
    count = "import helpers_x\ndef make():\n    import helpers_x as again\n    again.N += 1\n    return helpers_x.N\n"
    for name in "ab":
        folder = files(tmp_path / name, count, "N = 0\n")
        make = load_callable(f"{folder}/own_x.py:make", option="model.arch")
        assert [make(), make(), make()] == [1, 2, 3]


def test_what_was_imported_before_comes_back_and_siblings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = files(tmp_path / "a", EAGER, "class Kept:\n    pass\nNAME = 'a'\n")
    called(f"{first}/own_x.py:make")
    before = sys.modules["helpers_x"]
    assert pickle.loads(pickle.dumps(before.Kept())).__class__ is before.Kept
    second = files(tmp_path / "b", "import more_x\n" + EAGER, "NAME = 'b'\n")
    (second / "more_x.py").touch()
    assert called(f"{second}/own_x.py:make") == "b"
    assert sys.modules["helpers_x"] is before
    assert "more_x" in sys.modules
    monkeypatch.syspath_prepend(str(second))
    assert called(f"{second}/own_x.py:make") == "b"


def test_installed_packages_keep_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(files(tmp_path / "installed", "", "NAME = 'installed'\n")))
    installed = importlib.import_module("helpers_x")
    folder = files(tmp_path / "a", EAGER + "import json, sys\njson.loads, sys.path\n", "")
    for name in ("json", "sys"):
        (folder / f"{name}.py").touch()
    assert called(f"{folder}/own_x.py:make") == "installed"
    assert sys.modules["helpers_x"] is installed


def test_modules_of_the_current_folder_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        monkeypatch.chdir(files(tmp_path / name, LAZY, f"NAME = {name!r}\n"))
        assert called("own_x:make") == name


def test_the_callable_shows_the_user_s_own_signature_and_faults(tmp_path: Path) -> None:
    folder = files(tmp_path / "a", "def make(classes=3):\n    return 1 / 0\nclass Net:\n    pass\n", "")
    make = load_callable(f"{folder}/own_x.py:make", option="model.arch")
    assert list(inspect.signature(make).parameters) == ["classes"]
    assert type(called(f"{folder}/own_x.py:Net")).__name__ == "Net"
    with pytest.raises(UsageError, match=r"ZeroDivisionError: division by zero \(.*own_x.py, line 2\)"):
        called(f"{folder}/own_x.py:make", classes=2)
