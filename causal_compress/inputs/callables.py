"""The user's own Python callables, named as FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from causal_compress.errors import UsageError
from causal_compress.files import sha256_of_file


def load_callable(text: str, *, option: str) -> Callable[..., Any]:
    """Import the callable that `text` names.

    Args:
        text: FILE.py:CALLABLE (relative to the current folder) or PACKAGE.MODULE:CALLABLE.
        option: The recipe key it came from, for error messages.

    Returns:
        The callable, not yet called.

    Raises:
        UsageError: no such file, module or name; the code raises while it is imported.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(
            f"{option} names no callable",
            found=repr(text),
            wanted="FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE",
            remedy=f"write, for instance, --set {option}=my_code.py:make.",
        )
    module = _load_file(Path(place), option) if place.endswith(".py") else _load_module(place, option)
    value = getattr(module, name, None)
    if callable(value):
        return value  # type: ignore[no-any-return]
    raise UsageError(
        f"{option}: {place} has no callable '{name}'",
        found="a value that can't be called" if value is not None else "no such name",
        wanted=_public_callables(module) or "a function or class",
        remedy=_did_you_mean(name, module) or f"define `def {name}(...)` in {place}.",
    )


def call(function: Callable[..., Any], arguments: dict[str, Any], *, text: str, option: str) -> Any:
    """Call the user's function; whatever it raises becomes a UsageError that names it.

    Args:
        function: From `load_callable`.
        arguments: Keyword arguments.
        text: How the recipe names the function.
        option: The recipe key it came from.

    Returns:
        What the function returns.

    Raises:
        UsageError: the function raised.
    """
    try:
        return function(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UsageError(
            f"{option}: {text} failed when it was called with ({given})",
            found=f"{type(error).__name__}: {error}{_last_line(error)}",
            remedy="mend the function, or the arguments in the recipe.",
        ) from error


def _load_file(path: Path, option: str) -> ModuleType:
    if not path.is_file():
        raise UsageError(
            f"{option}: the file {path} does not exist",
            found=f"looked in {Path.cwd()}",
            remedy="check the path; it is relative to the folder in which the command runs.",
        )
    # A private name: the user's file may be called like a package that is already loaded.
    name = f"_causal_compress_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        with _siblings_importable(path.resolve().parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(str(path), option, error) from error
    return module


def _load_module(name: str, option: str) -> ModuleType:
    try:
        with _siblings_importable(Path.cwd()):
            return importlib.import_module(name)
    except Exception as error:
        raise _import_failed(name, option, error) from error


@contextmanager
def _siblings_importable(folder: Path) -> Iterator[None]:
    """Let the user's code import what lies beside it; installed packages keep precedence."""
    before = list(sys.path)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _import_failed(place: str, option: str, error: Exception) -> UsageError:
    return UsageError(
        f"{option}: {place} can't be imported",
        found=f"{type(error).__name__}: {error}{_last_line(error)}",
        remedy="mend the file, or install what it imports; `python FILE.py` shows the same error with its traceback.",
    )


def _last_line(error: Exception) -> str:
    """Where in the user's code it went wrong."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or step.tb_frame.f_code.co_filename.startswith((__file__, "<frozen")):
        return ""
    return f" ({step.tb_frame.f_code.co_filename}, line {step.tb_lineno})"


def _names(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_") and callable(getattr(module, name))]


def _public_callables(module: ModuleType) -> str:
    own = [name for name in _names(module) if getattr(getattr(module, name), "__module__", "") == module.__name__]
    return "one of " + ", ".join(own[:12]) if own else ""


def _did_you_mean(name: str, module: ModuleType) -> str:
    close = difflib.get_close_matches(name, _names(module), n=1)
    return f"did you mean '{close[0]}'?" if close else ""


def callable_sha256(name: str | None) -> str | None:
    """Fingerprint of the file in FILE.py:CALLABLE, so that an edited function is called again; else None."""
    file = Path((name or "").rpartition(":")[0])
    return sha256_of_file(file) if file.suffix == ".py" and file.is_file() else None
