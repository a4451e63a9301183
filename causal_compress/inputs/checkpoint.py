"""Checkpoint files: read without running code, unwrapped, and fitted to a network key by key."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causal_compress.errors import CheckpointError

_NESTS = ("state_dict", "model", "model_state_dict", "ema", "model_ema", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_MAX_LISTED = 5  # three such lists and what stands around them fit on one screen
_SAVE_STATE = "save it anew with torch.save(model.state_dict(), FILE), or as .safetensors, where its source is at hand."

State = dict[str, Tensor]


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


def read_state(weights: str) -> State:
    """Read a state dict, taken out of whatever the file wraps it in.

    Args:
        weights: .pt, .pth, .th or .safetensors file.

    Returns:
        Finite tensors on the CPU by key, with the file's own prefixes. Where a file holds several state dicts
        the first of state_dict, model, model_state_dict, ema, model_ema, net is taken.

    Raises:
        CheckpointError: missing, empty, truncated or corrupt file; pickled code; no state dict; NaN or infinity;
            tensors that are float8, quantized, sparse or without contents.
    """
    path = Path(weights)
    _check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _unwrap(content, path)
    _check_plain(state, path)
    _check_finite(state, path)
    return state


def load_weights(model: nn.Module, state: State, weights: str) -> None:
    """Copy a state dict into a freshly built network.

    Args:
        model: Changed in place: it was built for this.
        state: From `read_state`; the prefixes `module.`, `_orig_mod.` and `model.` are removed where they don't fit.
        weights: Name of the file, for error messages.

    Raises:
        CheckpointError: keys missing, unexpected or of another shape, all listed; whole or complex numbers for
            real weights; a network with extra state that is no tensor.

    Limits:
        A missing `num_batches_tracked` is no fault: it is not used at inference.
    """
    expected = model.state_dict()
    _check_extra_state(expected)
    state = _without_prefixes(state, set(expected))
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected and key != "n_averaged"]
    reshaped = [key for key in state if key in expected and _shape(state[key]) != _shape(expected[key])]
    if missing or unexpected or reshaped:
        parts = [
            _listed("missing in the file", missing, lambda key: f"{key} {_shape(expected[key])}"),
            _listed("unexpected in the file", unexpected, lambda key: f"{key} {_shape(state[key])}"),
            _listed(
                "wrong shape", reshaped, lambda key: f"{key}: file {_shape(state[key])}, model {_shape(expected[key])}"
            ),
        ]
        raise CheckpointError(
            f"the weights in {weights} do not fit the architecture",
            found="\n    ".join(part for part in parts if part),
            remedy=_mismatch_remedy(state, expected, missing, reshaped),
        )
    _check_numbers(state, expected, weights)
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {weights} can't be copied into the network",
            found=str(error)[:300],
            remedy="see the network's own load_state_dict, or " + _SAVE_STATE,
        ) from error


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
        remedy=_SAVE_STATE,
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


def _unwrap(content: Any, path: Path) -> State:
    for _ in range(3):
        inside = _nested(content)
        if inside is None:
            break
        content = inside
    tensors = _tensors(content)
    if tensors:
        return tensors
    keys = ", ".join(str(key) for key in list(content)[:_MAX_LISTED]) if isinstance(content, Mapping) else ""
    raise CheckpointError(
        f"the checkpoint {path} holds no state dict",
        found=f"a {type(content).__name__}" + (f" with the keys {keys}" if keys else ""),
        wanted=f"tensors by name, at the top or under one of {', '.join(_NESTS)}",
        remedy=_SAVE_STATE,
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


def _check_plain(state: State, path: Path) -> None:
    bad = [key for key, value in state.items() if _storage(value)]
    if bad:
        raise CheckpointError(
            f"the checkpoint {path} holds tensors that are no plain weights",
            found=_listed("stored otherwise", bad, lambda key: f"{key}: {_storage(state[key])}"),
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


def _check_numbers(state: State, expected: State, weights: str) -> None:
    bad = [
        key
        for key, value in state.items()
        if key in expected
        and expected[key].is_floating_point()
        and not (value.is_floating_point() or value.dtype == torch.bool)  # a mask becomes 0 and 1, which is right
    ]
    if bad:
        raise CheckpointError(
            f"the weights in {weights} are not of the kind that the network has",
            found=_listed(
                "other numbers", bad, lambda key: f"{key}: file {state[key].dtype}, model {expected[key].dtype}"
            ),
            wanted="real floating-point numbers",
            remedy="quantized weights lack their scales here: save the float weights from before the quantization.",
        )


def _check_extra_state(expected: Mapping[str, Any]) -> None:
    extra = [key for key, value in expected.items() if not isinstance(value, Tensor)]
    if extra:
        raise CheckpointError(
            "the network's state dict holds more than tensors",
            found=_listed("extra state", extra, lambda key: f"{key}, a {type(expected[key]).__name__}"),
            wanted="parameters and buffers, all of them tensors",
            remedy="remove get_extra_state from the module, and set in its constructor what is needed to run it.",
        )


def _check_finite(state: State, path: Path) -> None:
    numbers = {key: value for key, value in state.items() if value.is_floating_point() or value.is_complex()}
    bad = [key for key, value in numbers.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(
            f"the weights in {path} are not finite",
            found=_listed("NaN or infinity in", bad, str),
            remedy="use a checkpoint from before the training diverged.",
        )


def _without_prefixes(state: State, expected: set[str]) -> State:
    if not any("_orig_mod." in key for key in expected):  # torch.compile may have wrapped inner modules, too
        state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while prefix := _foreign_prefix(state, expected):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _foreign_prefix(state: State, expected: set[str]) -> str | None:
    for prefix in _PREFIXES:
        everywhere = all(key.startswith(prefix) for key in state if key != "n_averaged")
        if everywhere and not any(key.startswith(prefix) for key in expected) and len(state) > 0:
            return prefix if any(key.startswith(prefix) for key in state) else None
    return None


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _listed(title: str, keys: list[str], describe: Any) -> str:
    if not keys:
        return ""
    lines = [str(describe(key)) for key in keys[:_MAX_LISTED]]
    if len(keys) > _MAX_LISTED:
        lines.append(f"and {len(keys) - _MAX_LISTED} more")
    return f"{title} ({len(keys)}): " + "\n      ".join(["", *lines]).lstrip(" ")


def _mismatch_remedy(state: State, expected: State, missing: list[str], reshaped: list[str]) -> str:
    matrices = [key for key, value in expected.items() if key in state and value.dim() == 2]
    head = matrices[-1] if matrices else None
    if head in reshaped and not missing:
        classes = state[head].shape[0]
        return f"the file's last layer has {classes} outputs: try --set model.args.num_classes={classes}."
    return "check that model.arch and model.args are those the weights were trained with."
