"""A run folder as the operating system sees it: the lock that keeps two runs apart, and what its errors mean."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from causal_compress.errors import RunFolderError

logger = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
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
