"""The folder of a package: written apart and put in place at the end, so that an older one stays whole until then."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from causal_compress.deploy.targets import PACKAGE
from causal_compress.errors import RunFolderError
from causal_compress.files import atomic_write_text, make_folder
from causal_compress.results import Package

_SCRATCH = ".partial-package"  # inside the folder, which may be a mounted disk: renaming within it always works
_OWN = "own-files.json"  # in the scratch folder while package.json is gone: which files are the packages', old and new
_OURS = re.compile(re.escape(_SCRATCH) + r"|\.[0-9]+-[0-9a-f]+\.tmp")  # the last is what `make_folder` tries with
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def package_folder(folder: Path) -> Iterator[tuple[Path, Callable[[Package], None]]]:
    """A scratch folder for a package's files, and what puts them in place of those of an older package.

    Args:
        folder: New, empty, or a package that may be replaced; what else lies in it beside a package is left alone.

    Yields:
        The scratch folder, which is gone afterwards, and a function that takes the finished description, moves in the
        files that it lists, removes those of the older package, and writes package.json last.

    Raises:
        RunFolderError: the folder holds something that is no package, can't be written, its disk is full, or another
            export writes into it.
    """
    make_folder(folder)
    with _alone_in(folder), _full_disk(folder):
        replaced = _own_files(folder)
        scratch = folder / _SCRATCH
        _clear(scratch)  # left by an export that was killed
        scratch.mkdir(exist_ok=True)
        try:
            yield scratch, partial(_move_in, folder, replaced)
        finally:
            _clear(scratch)


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Say which disk is full: of a copy, the system names the file that is read first."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RunFolderError(
            f"no space left for the package {folder}",
            found=f"{error.strerror}: {error.filename2 or error.filename or folder}",
            remedy="free some space there, or give another --out",
        ) from error


def _clear(scratch: Path) -> None:
    """Remove the scratch folder; as long as it holds the list of own files, it stays with that alone."""
    if scratch.is_symlink():
        scratch.unlink()
    for path in scratch.iterdir() if scratch.is_dir() else ():
        if path.name != _OWN:
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        scratch.rmdir()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder itself: that leaves no file in a package, and the system lets go however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(
                    f"{folder} is busy",
                    found="another export writes into it",
                    remedy="wait until it has ended, or give another --out",
                ) from error
        yield
    finally:
        os.close(descriptor)


def _own_files(folder: Path) -> frozenset[str]:
    """Names of the package's files in a folder, none if it is new; refuses a folder that holds anything else."""
    there = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if PACKAGE not in there and (listed := _listed(folder)):
        return listed
    (folder / _SCRATCH / _OWN).unlink(missing_ok=True)
    if not there:
        return frozenset()
    try:
        old = TypeAdapter(Package).validate_json((folder / PACKAGE).read_bytes())
    except (OSError, ValidationError) as error:
        found = there[0] if isinstance(error, OSError) else f"a {PACKAGE} that causal-compress did not write"
        raise RunFolderError(
            f"{folder} is not empty and not a package", found=found, remedy="give another --out"
        ) from error
    return frozenset(_files(old))


def _listed(folder: Path) -> frozenset[str]:
    """Own files of an export that was killed while it moved them in; none if there was no such export."""
    try:
        names = TypeAdapter(list[str]).validate_json((folder / _SCRATCH / _OWN).read_bytes())
    except (OSError, ValidationError):
        return frozenset()
    return frozenset(_here(names))


def _files(package: Package) -> Iterator[str]:
    return _here((package.inputs, *(name for model in package.models for name in model.files)))


def _here(names: Iterable[str]) -> Iterator[str]:
    # A package.json can come from anywhere: only what lies in its own folder is ever touched.
    yield from (name for name in dict.fromkeys(names) if Path(name).name == name)


def _move_in(folder: Path, replaced: frozenset[str], package: Package) -> None:
    scratch, own = folder / _SCRATCH, sorted({*replaced, *_files(package)})
    atomic_write_text(scratch / _OWN, to_json(own).decode())
    atomic_write_text(scratch / PACKAGE, to_json(package, indent=2).decode() + "\n")
    (folder / PACKAGE).unlink(missing_ok=True)  # first, so that a kill in between leaves nothing that looks whole
    for name in replaced:
        (folder / name).unlink(missing_ok=True)
    for name in _files(package):
        (scratch / name).replace(folder / name)
    (scratch / PACKAGE).replace(folder / PACKAGE)
    (scratch / _OWN).unlink()
