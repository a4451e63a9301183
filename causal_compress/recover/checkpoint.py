"""Where a distillation stands, on disk: whole or absent, read without pickle's dangers, refused if it is another's."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causal_compress.errors import RunFolderError
from causal_compress.files import atomic_write_bytes

logger = logging.getLogger(__name__)

FILE_NAME = "distill.progress.pt"


def save(folder: Path, stamp: str, state: dict[str, Any]) -> None:
    """Writes the state after an epoch.

    Args:
        folder: Made where it is absent.
        stamp: What the run depends on; see `load`.
        state: Tensors, numbers, text, and lists and dicts of them.

    Raises:
        RunFolderError: the folder can't be written; the state of the epoch before is then untouched.
    """
    content = io.BytesIO()
    torch.save({"stamp": stamp, **state}, content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / FILE_NAME, content.getvalue())
    except OSError as error:
        raise RunFolderError(
            f"distill: can't write {folder / FILE_NAME}",
            found=error.strerror or str(error),
            wanted=f"a writable folder with {len(content.getvalue())} bytes free",
            remedy="mend the folder, then run the same command again; it goes on after the last epoch written",
        ) from error


def load(folder: Path, stamp: str) -> dict[str, Any] | None:
    """The state after the last epoch written, or None where this run has not got there yet.

    Args:
        folder: May be absent.
        stamp: A state with another stamp belongs to another run and is passed over.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch checks no sums: a flipped bit would be trained on
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the sum of {damaged} is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is anything
        raise RunFolderError(
            f"distill: can't read {path}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}",
            wanted="the state after an epoch, as written by this stage",
            remedy=f"delete {path} and run the same command again; the distillation then starts anew",
        ) from error
    if state.pop("stamp", None) != stamp:
        logger.info("distill: %s belongs to a run with other weights, data or settings; starting anew", path)
        return None
    return state


def fingerprint(network: nn.Module, more: Iterable[str]) -> str:
    """SHA-256 over a network's weights and buffers, and further text.

    Args:
        network: Left unchanged.
        more: Whatever else a run depends on.
    """
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for text in more:
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()
