"""Files that are whole or absent, and fingerprints of files and values."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from causal_compress.errors import RunFolderError


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part, whatever kills the process.

    Args:
        path: The file; its folder must exist.
        content: All of it.

    Raises:
        OSError: The folder is absent, read-only or full; the old file is then untouched.
    """
    # Named by hand because tempfile would make the result readable by its owner only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8, newlines as given) as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def make_folder(folder: Path) -> None:
    """Makes a folder for output and tries to write into it, so that no work is done whose result can't be kept.

    Raises:
        RunFolderError: There is a file of that name, no permission, or a read-only or full disk.
    """
    probe = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"can't write into the folder {folder}",
            found=f"{error.strerror or error}: {error.filename or folder}",
            wanted="a folder in which files can be made",
            remedy="give another --out, or mend that path's permissions",
        ) from error


def make_room(file: Path) -> None:
    """Makes the folder of an output file and tries to write into it, before the work.

    Raises:
        RunFolderError: As `make_folder`; or the path is a folder itself.
    """
    make_folder(file.parent)
    if file.is_dir():
        raise RunFolderError(
            f"can't write the file {file}",
            found="a folder of that name",
            wanted="the path of a file",
            remedy=f"give another --out, such as {file / ('out' + file.suffix)}",
        )


def sha256_of_file(path: Path) -> str:
    """Fingerprint of a file's content, read in pieces.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: The file can't be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Fingerprint of plain data, recipe sections and results, independent of the order of keys.

    Args:
        value: Anything that pydantic writes as JSON: dataclasses, models, dicts, sequences, paths, numbers, text.

    Returns:
        64 hexadecimal digits.

    Raises:
        PydanticSerializationError: The value holds something that is not plain data, such as a tensor.

    Limits: sets have no order; pass them sorted.
    """
    from pydantic_core import to_jsonable_python

    plain = to_jsonable_python(value)
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; not every file system (and no Windows) lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
