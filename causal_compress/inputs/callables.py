"""The user's own Python callables, named as FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
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
        The callable, not yet called. Whenever it is called it can import what lies beside its file (or in the current
        folder, for a module), even where another file has a module of the same name beside it.

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
    file = Path(place) if place.endswith(".py") else None
    folder = Path.cwd() if file is None else file.resolve().parent
    siblings: dict[str, ModuleType] = {}
    with _siblings_importable(folder, siblings):
        module = _load_module(place, option) if file is None else _load_file(file, option)
    value = getattr(module, name, None)
    if callable(value):
        return _beside(folder, siblings, value)
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
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(str(path), option, error) from error
    return module


def _load_module(name: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _import_failed(name, option, error) from error


def _beside(folder: Path, siblings: dict[str, ModuleType], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _siblings_importable(folder, siblings):
            return function(*args, **kwargs)

    return called


@contextmanager
def _siblings_importable(folder: Path, siblings: dict[str, ModuleType]) -> Iterator[None]:
    """Let the user's code import what lies beside it; installed packages keep precedence.

    Modules of the same names that came from another folder stand aside meanwhile, and come back. Those that were
    imported in their stead are kept in `siblings` for the next time. All others stay imported: pickle needs them.
    """
    path = list(sys.path)
    names = {top for top in {_top(name) for name in sys.modules} if _in_the_way(top, folder)}
    aside = _replace_modules(names, siblings)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        siblings.update(_replace_modules(names, aside))


def _replace_modules(names: set[str], modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put in modules instead of those with these names, and of what lies in packages so called; return the latter."""
    removed = {name: sys.modules.pop(name) for name in list(sys.modules) if _top(name) in names}
    sys.modules.update(modules)
    return removed


def _top(name: str) -> str:
    return name.partition(".")[0]


def _in_the_way(name: str, folder: Path) -> bool:
    """Whether an imported module hides one in `folder`, and came neither from there nor from where packages are."""
    if not (folder / f"{name}.py").is_file() and not (folder / name).is_dir():
        return False
    package = importlib.machinery.PathFinder.find_spec(name)
    if package is not None and not _lies_in(folder, package.origin, *(package.submodule_search_locations or ())):
        return False
    module = sys.modules.get(name)
    places = (getattr(module, "__file__", None), *getattr(module, "__path__", ()))
    return any(places) and not _lies_in(folder, *places)


def _lies_in(folder: Path, *places: str | None) -> bool:
    return any(Path(place).resolve().is_relative_to(folder) for place in places if place)


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
