"""A run folder as the operating system sees it: the lock that keeps two runs apart, and what its errors mean."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from causal_compress.errors import RunFolderError

logger = logging.getLogger(__name__)
RECORD = "run.json"
"""The record of all stages of a run."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_LEFT_BEHIND = re.compile(r"\.lock|\.partial-.*|\.progress-.*|\..*\.tmp")
UNUSABLE = (*_FULL, *_FORBIDDEN)
"""Error numbers that are never our bug: a full disk, no permission."""


@contextmanager
def locked(folder: Path, *, command: Sequence[str]) -> Iterator[None]:
    """Holds the folder's lock while the block runs; the system lets go of it when the process dies, however it dies.

    Raises:
        RunFolderError: Another process holds it, or the lock file can't be written.

    Limits: where the file system or the platform has no `flock`, the run goes on without a lock, with a warning.
    """
    with disk_errors(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with disk_errors(folder):
            if not _lock(descriptor, folder):
                raise _busy(folder)
            _sign(descriptor, command)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        # The file stays: removing it would let a third process lock a new one beside a second that waits on the old.
        os.close(descriptor)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the operating system says about a folder into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise folder_error(folder, error) from error


def refuse_foreign(folder: Path, *, but: str) -> None:
    """Refuses a folder that holds what no run has left there before its first record.

    Args:
        folder: One without a record of runs.
        but: The file that a run writes before its first record.

    Raises:
        RunFolderError: It holds something else.
    """
    foreign = sorted(
        path.name for path in folder.iterdir() if path.name != but and not _LEFT_BEHIND.fullmatch(path.name)
    )
    if foreign:
        raise RunFolderError(
            f"{folder} is not empty and not a run folder",
            found=", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else ""),
            wanted="a new folder, an empty one, or one that causal-compress began",
            remedy="give another --out",
        )


def refuse_run(folder: Path) -> None:
    """Refuses a run's folder as the place for something else, whose files would take the place of the run's own.

    Raises:
        RunFolderError: It is one.
    """
    if (folder / RECORD).exists():
        raise RunFolderError(
            f"{folder} holds a run",
            found=RECORD,
            wanted="a folder of its own",
            remedy="give another --out",
        )


def sweep(folder: Path) -> None:
    """Removes what a killed run has left behind, except the progress of its stage."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def folder_error(folder: Path, error: OSError) -> RunFolderError:
    """The error, in the user's words, that an `OSError` on a folder or on a file in it means."""
    found = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno in _FULL:
        return RunFolderError(
            f"no space left for {folder}",
            found=found,
            remedy="free some space and run the same command again: finished stages are kept and not computed anew",
        )
    if error.errno in _FORBIDDEN:
        return RunFolderError(
            f"{folder} can't be written",
            found=found,
            wanted="a folder in which files can be made",
            remedy="change its permissions, or give another --out",
        )
    if error.errno in _NOT_A_FOLDER:
        return RunFolderError(
            f"{folder} can't be a folder", found=found, wanted="a path that is no file", remedy="give another --out"
        )
    return RunFolderError(
        f"{folder} can't be used",
        found=found,
        remedy="check the disk and the path, or give another --out; finished stages are kept",
    )


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether the lock was free, and is ours now."""
    try:
        import fcntl
    except ImportError:  # Windows
        logger.warning("%s: this platform has no file locks; do not start a second run on it", folder)
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        logger.warning("%s: this file system has no locks; do not start a second run on it", folder)
    return True


def _sign(descriptor: int, command: Sequence[str]) -> None:
    holder = {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _busy(folder: Path) -> RunFolderError:
    try:
        holder = json.loads((folder / ".lock").read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}, since {holder['started']}: {holder['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "a process that has not signed the lock yet"
    return RunFolderError(
        f"{folder} is busy: another run works in it",
        found=who,
        remedy="wait until it has ended, stop it, or give another --out",
    )
