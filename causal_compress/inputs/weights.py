"""A checkpoint's weights fitted to a network: prefixes, names of older versions, shared tensors; all or nothing."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from causal_compress.errors import CheckpointError
from causal_compress.inputs.checkpoint import SAVE_STATE, Checkpoint, State, listed

_Value = TypeVar("_Value")

log = logging.getLogger(__name__)

_PREFIXES = ("module.", "_orig_mod.", "model.")
_COUNT = "n_averaged"  # how many networks torch's AveragedModel has averaged, beside their weights


@dataclass(frozen=True)
class _Misfit:
    """What keeps a state dict from filling a network: by key, what is said about it."""

    missing: dict[str, str]
    unexpected: dict[str, str]
    reshaped: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)


def load_weights(model: nn.Module, checkpoint: Checkpoint, weights: str) -> None:
    """Copy a checkpoint into a freshly built network.

    Args:
        model: Changed in place: it was built for this. What does not fit leaves it as it was.
        checkpoint: From `read_state`; the prefixes `module.`, `_orig_mod.` and `model.` are removed where they don't
            fit, and tensors that lie beside a prefix, such as the class weights of a loss, are passed over.
        weights: Name of the file, for error messages.

    Raises:
        CheckpointError: keys missing, unexpected or of another shape, all listed; whole or complex numbers for
            real weights; a network with extra state that is no tensor, or whose own way of loading fails.

    Limits:
        A missing `num_batches_tracked` is no fault: it is not used at inference. Nor is a missing key whose tensor the
        network shares with one that is there. Names of older versions are those that the network's own loading knows.
    """
    expected = model.state_dict()
    _check_extra_state(expected)
    checkpoint, beside = _without_prefix(checkpoint, expected)
    state, layouts = checkpoint.tensors, checkpoint.layouts
    misfit = _compared(state, expected)
    if misfit:
        misfit = _tried(model, checkpoint, misfit)
    elif not layouts:  # every name and shape is today's, so the layout is
        layouts = _own_layouts(expected)
    if misfit:
        raise _does_not_fit(misfit, state, expected, beside, weights)
    _check_numbers(state, expected, weights)
    try:
        model.load_state_dict(_as_saved(state, layouts), strict=False)
    except Exception as error:
        raise CheckpointError(
            f"the weights in {weights} can't be copied into the network",
            found=(str(error) or type(error).__name__)[:300],
            remedy="see the network's own load_state_dict, or " + SAVE_STATE,
        ) from error
    if beside:
        log.warning(
            "%s: tensors beside the network's were passed over (%d): %s", weights, len(beside), ", ".join(beside[:5])
        )


def _compared(state: State, expected: State) -> _Misfit:
    """What names and shapes say, before the network's own loading has had its turn."""
    both = [key for key in state if key in expected and _shape(state[key]) != _shape(expected[key])]
    return _Misfit(
        _lacking([key for key in expected if key not in state], expected),
        _surplus([key for key in state if key not in expected], state),
        {key: f"{key}: file {_shape(state[key])}, model {_shape(expected[key])}" for key in both},
    )


def _lacking(missing: Iterable[str], expected: State) -> dict[str, str]:
    missing = set(missing)
    given = {_place(value) for key, value in expected.items() if key not in missing}
    lacking = [key for key in expected if key in missing and _place(expected[key]) not in given]
    return {key: f"{key} {_shape(expected[key])}" for key in lacking if not key.endswith("num_batches_tracked")}


def _surplus(unexpected: Iterable[str], state: State) -> dict[str, str]:
    return {key: f"{key} {_shape(state[key])}" if key in state else key for key in unexpected if key != _COUNT}


def _place(tensor: Tensor) -> object:
    """Equal for tensors that share all of their memory, as tied weights do."""
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, _shape(tensor), tensor.stride()


def _tried(model: nn.Module, checkpoint: Checkpoint, named: _Misfit) -> _Misfit:
    """What a copy of the network can't place, once its own loading has turned older names and layouts into today's."""
    told: list[Any] = []
    failed = False
    try:
        copied = copy.deepcopy(model)
        copied.register_load_state_dict_post_hook(lambda _, keys: told.append(keys))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the network itself is loaded afterwards, and warns then
            copied.load_state_dict(_as_saved(checkpoint.tensors, checkpoint.layouts), strict=False)
    except Exception:  # wrong shapes, too, end here; what is wrong with the file was compared already
        failed = True
    if not told:
        return named
    left = _Misfit(
        _lacking(told[-1].missing_keys, copied.state_dict()),
        _surplus(told[-1].unexpected_keys, checkpoint.tensors),
        named.reshaped if failed else {},
    )
    return left if left or not failed else named


def _as_saved(state: State, layouts: Mapping[str, Mapping[str, Any]]) -> OrderedDict[str, Tensor]:
    """The form in which torch's modules find their layouts beside the tensors."""
    saved = OrderedDict(state)
    if layouts:
        saved._metadata = {prefix.removesuffix("."): dict(note) for prefix, note in layouts.items()}  # type: ignore[attr-defined]
    return saved


def _own_layouts(expected: State) -> dict[str, dict[str, Any]]:
    return {f"{path}." if path else "": note for path, note in getattr(expected, "_metadata", {}).items()}


def _does_not_fit(misfit: _Misfit, state: State, expected: State, beside: list[str], weights: str) -> CheckpointError:
    unexpected = misfit.unexpected | dict.fromkeys(beside)
    parts = [
        listed("missing in the file", misfit.missing, lambda key: misfit.missing[key]),
        listed("unexpected in the file", unexpected, lambda key: unexpected[key] or key),
        listed("wrong shape", misfit.reshaped, lambda key: misfit.reshaped[key]),
    ]
    return CheckpointError(
        f"the weights in {weights} do not fit the architecture",
        found="\n    ".join(part for part in parts if part),
        remedy=_remedy(state, expected, misfit),
    )


def _remedy(state: State, expected: State, misfit: _Misfit) -> str:
    matrices = [key for key, value in expected.items() if key in state and value.dim() == 2]
    head = matrices[-1] if matrices else None
    if head in misfit.reshaped and not misfit.missing:
        classes = state[head].shape[0]
        return f"the file's last layer has {classes} outputs: try --set model.args.num_classes={classes}."
    return "check that model.arch and model.args are those the weights were trained with."


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
            found=listed(
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
            found=listed("extra state", extra, lambda key: f"{key}, a {type(expected[key]).__name__}"),
            wanted="parameters and buffers, all of them tensors",
            remedy="remove get_extra_state from the module, and set in its constructor what is needed to run it.",
        )


def _without_prefix(checkpoint: Checkpoint, expected: State) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of what lies behind the prefix, under its own names, and the keys that lie beside it."""
    if not any("_orig_mod." in key for key in expected):  # torch.compile may have wrapped inner modules, too
        checkpoint = _renamed(checkpoint, lambda key: key.replace("_orig_mod.", ""))
    prefix = _prefix(checkpoint.tensors, expected)
    beside = [key for key in checkpoint.tensors if not key.startswith(prefix) and key != _COUNT]
    inside = Checkpoint(_behind(prefix, checkpoint.tensors), _behind(prefix, checkpoint.layouts))
    return inside, beside


def _behind(prefix: str, values: Mapping[str, _Value]) -> dict[str, _Value]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _renamed(checkpoint: Checkpoint, rename: Callable[[str], str]) -> Checkpoint:
    tensors = {rename(key): value for key, value in checkpoint.tensors.items()}
    return Checkpoint(tensors, {rename(prefix): note for prefix, note in checkpoint.layouts.items()})


def _prefix(state: State, expected: State) -> str:
    """The prefix behind which most of the network's keys lie, and whatever else stands before every key."""
    found = max(_prefixes(state), key=lambda prefix: sum(prefix + key in state for key in expected))
    while more := _foreign_prefix(_behind(found, state), expected):
        found += more
    return found


def _prefixes(state: State) -> list[str]:
    """Every prefix that wrappers can have put before a key, the shortest first."""
    found = [""]
    for known in found:  # grows as it goes
        found += [known + prefix for prefix in _PREFIXES if any(key.startswith(known + prefix) for key in state)]
    return found


def _foreign_prefix(state: State, expected: State) -> str | None:
    for prefix in _PREFIXES:
        everywhere = all(key.startswith(prefix) for key in state if key != _COUNT)
        if everywhere and not any(key.startswith(prefix) for key in expected):
            return prefix if any(key.startswith(prefix) for key in state) else None
    return None


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
