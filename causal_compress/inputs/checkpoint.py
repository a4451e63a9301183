"""Checkpoint files: read without running code, and taken out of whatever the file wraps the weights in."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causal_compress.errors import CheckpointError

_NESTS = ("state_dict", "model", "model_state_dict", "ema", "model_ema", "net")
_MAX_LISTED = 5  # three such lists and what stands around them fit on one screen
SAVE_STATE = "save it anew with torch.save(model.state_dict(), FILE), or as .safetensors, where its source is at hand."

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state dict as it was saved.

    `tensors` are finite and on the CPU, by key. `layouts` holds what modules noted about the layout of their weights
    (such as {"version": 2}), by the prefix of their keys ("" for the whole network); plain dicts and .safetensors
    files have none.
    """

    tensors: State
    layouts: dict[str, dict[str, Any]]


class _Unread:
    """Stands for NumPy's scalars and arrays beside the weights: nothing of NumPy runs, and no value is kept."""

    def __init__(self, *parts: object) -> None:
        del parts

    def __setstate__(self, state: object) -> None:
        del state


_NUMPY = tuple(
    f"{module}.{name}"
    for module, names in (
        ("numpy", ("dtype", "ndarray")),
        ("numpy.core.multiarray", ("scalar", "_reconstruct")),  # NumPy 1
        ("numpy._core.multiarray", ("scalar", "_reconstruct")),
    )
    for name in names
)


def read_state(weights: str) -> Checkpoint:
    """Read a state dict, taken out of whatever the file wraps it in.

    Args:
        weights: .pt, .pth, .th or .safetensors file.

    Returns:
        Its tensors and layouts, with the file's own prefixes. Where a file holds several state dicts the first of
        state_dict, model, model_state_dict, ema, model_ema, net is taken.

    Raises:
        CheckpointError: missing, empty, truncated or corrupt file; pickled code; no state dict; NaN or infinity;
            tensors that are float8, quantized, sparse or without contents.
    """
    path = Path(weights)
    _check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    checkpoint = _unwrap(content, path)
    _check_plain(checkpoint.tensors, path)
    _check_finite(checkpoint.tensors, path)
    return checkpoint


def file_sha256(weights: str) -> str:
    """Hash of a checkpoint file's bytes, as lower-case hex."""
    path = Path(weights)
    _check_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:
        size = None
    if size is None:
        raise CheckpointError(
            f"the checkpoint {path} can't be read",
            found="a folder" if path.is_dir() else "no such file",
            wanted=".pt, .pth, .th or .safetensors file",
            remedy="check --weights (model.weights); the path is relative to the folder in which the command runs.",
        )
    if size == 0:
        raise _corrupt(path, "0 bytes")


def _corrupt(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is damaged or is no checkpoint",
        found=found,
        wanted="a file written by torch.save(model.state_dict(), FILE) or safetensors",
        remedy="fetch or copy the file again and compare its size and checksum with the original's.",
    )


def _refused(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} holds pickled code, which is never run",
        found=found,
        wanted="a state dict: tensors by name",
        remedy=SAVE_STATE,
    )


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, str(error)) from error


def _read_torch(path: Path) -> Any:
    _check_archive(path)
    try:
        # Many training scripts save their arguments and NumPy's numbers beside the weights. argparse.Namespace is plain
        # data; NumPy's names stand for a class that drops what it is given.
        safe: list[Any] = [argparse.Namespace, *((_Unread, name) for name in _NUMPY)]
        with torch.serialization.safe_globals(safe), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on pickle protocols; what matters comes as an exception
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        raise _load_fault(path, error) from error
    except (AttributeError, IndexError, AssertionError, ImportError, UnicodeDecodeError) as error:
        # torch's unpickler meets arbitrary bytes with whatever its own code raises
        raise _corrupt(path, "not a checkpoint's bytes") from error


def _load_fault(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return _refused(path, f"it wants to run {named.group(1)}")
    if "TorchScript" in text:
        return _refused(path, "a TorchScript archive")
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80" and start[1:2] >= b"\x03":
        return _refused(path, "a bare pickle, not written by torch.save")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "the file ends too early")
    return _corrupt(
        path, "not a checkpoint's bytes" if "weights_only" in text else f"{type(error).__name__}: {first[:160]}"
    )


def _check_archive(path: Path) -> None:
    """torch.load doesn't compare checksums, so a flipped bit would become a wrong weight."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise _corrupt(path, f"{path.stat().st_size} bytes that begin as torch.save does; the end is missing")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError) as error:
        raise _corrupt(path, str(error)) from error
    if damaged is not None:
        raise _corrupt(path, f"the checksum of its part '{damaged}' is wrong")


def _unwrap(content: Any, path: Path) -> Checkpoint:
    for _ in range(3):
        inside = _nested(content)
        if inside is None:
            break
        content = inside
    tensors = _tensors(content)
    if tensors:
        return Checkpoint(tensors, _layouts(content))
    keys = ", ".join(str(key) for key in list(content)[:_MAX_LISTED]) if isinstance(content, Mapping) else ""
    raise CheckpointError(
        f"the checkpoint {path} holds no state dict",
        found=f"a {type(content).__name__}" + (f" with the keys {keys}" if keys else ""),
        wanted=f"tensors by name, at the top or under one of {', '.join(_NESTS)}",
        remedy=SAVE_STATE,
    )


def _nested(content: Any) -> Mapping[str, Any] | None:
    if not isinstance(content, Mapping):
        return None
    for name in _NESTS:
        inside = content.get(name)
        if isinstance(inside, Mapping) and (_tensors(inside) or _nested(inside) is not None):
            return inside
    return None


def _tensors(content: Any) -> State:
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}


def _layouts(content: Any) -> dict[str, dict[str, Any]]:
    """What torch notes beside a state dict; its mark that tensors be taken over instead of copied is left out."""
    noted = getattr(content, "_metadata", None)
    if not isinstance(noted, Mapping):
        return {}
    return {
        f"{path}." if path else "": {key: value for key, value in note.items() if key != "assign_to_params_buffers"}
        for path, note in noted.items()
        if isinstance(path, str) and isinstance(note, Mapping)
    }


def _check_plain(state: State, path: Path) -> None:
    bad = [key for key, value in state.items() if _storage(value)]
    if bad:
        raise CheckpointError(
            f"the checkpoint {path} holds tensors that are no plain weights",
            found=listed("stored otherwise", bad, lambda key: f"{key}: {_storage(state[key])}"),
            wanted="dense tensors of float16, bfloat16, float32 or float64",
            remedy="save the weights as they were trained, from before they were quantized, cast or made sparse.",
        )


def _storage(tensor: Tensor) -> str:
    """What makes a tensor unusable as weights; nothing for a plain one."""
    if tensor.is_meta:
        return "without contents (on the meta device)"
    if tensor.is_quantized:
        return f"quantized, {tensor.dtype}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"not dense, {tensor.layout}"
    return str(tensor.dtype) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else ""


def _check_finite(state: State, path: Path) -> None:
    numbers = {key: value for key, value in state.items() if value.is_floating_point() or value.is_complex()}
    bad = [key for key, value in numbers.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(
            f"the weights in {path} are not finite",
            found=listed("NaN or infinity in", bad, str),
            remedy="use a checkpoint from before the training diverged.",
        )


def listed(title: str, keys: Collection[str], describe: Callable[[str], str]) -> str:
    """Some of the keys, one a line, under a title with their number; nothing where there are none."""
    if not keys:
        return ""
    lines = [describe(key) for key in list(keys)[:_MAX_LISTED]]
    if len(keys) > _MAX_LISTED:
        lines.append(f"and {len(keys) - _MAX_LISTED} more")
    return f"{title} ({len(keys)}): " + "\n      ".join(["", *lines]).lstrip(" ")
