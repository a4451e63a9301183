"""The teacher before anything is done to it: its fingerprint, its accuracy, and whether that makes sense."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from causal_compress.errors import TeacherError, TraceError
from causal_compress.inputs.data import Data, Split
from causal_compress.recipe import DataSection
from causal_compress.results import Accuracy, TeacherScore
from causal_compress.understand.cost import count_macs, count_params
from causal_compress.understand.statistics import wilson
from causal_compress.understand.trace import Network

_NO_MATTER = ("inplace",)
"""What PyTorch's own modules keep that changes nothing of what they compute."""


def weights_sha256(model: nn.Module) -> str:
    """Fingerprint of all parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_content(value))
    return digest.hexdigest()


def _content(value: Tensor) -> bytes:
    whole = value.detach().cpu().contiguous()
    return whole.view(torch.uint8).numpy().tobytes() if value.ndim else repr(value.item()).encode()


def structure_sha256(graph: fx.GraphModule) -> str:
    """Fingerprint of what a network computes with its weights: operations, arguments and settings of modules.

    Of modules that tracing left whole their code and plain attributes count as well, also of PyTorch's own where these
    print nothing of themselves (attention), and of all modules the buffers that no checkpoint holds.

    Args:
        graph: Traced; the same source gives the same fingerprint in every process.

    Limits: functions that are called by name, and what an untraced module keeps in objects of the user's own classes,
        are not looked into.
    """
    digest = hashlib.sha256()
    for node in graph.graph.nodes:
        target = (
            node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", type(node.target))
        )
        digest.update(f"{node.name} {node.op} {target} {node.args} {node.kwargs}\n".encode())
    for path, module in graph.named_modules():
        digest.update(f"{path} {type(module).__qualname__} {module.extra_repr()}\n".encode())
        for said in _unprinted(module):
            digest.update(f"{said}\n".encode())
    saved = graph.state_dict().keys()
    for path, value in graph.named_buffers():
        if path not in saved:
            digest.update(f"{path} {_said(value)}\n".encode())
    return digest.hexdigest()


def _unprinted(module: nn.Module) -> Iterator[str]:
    """Code and plain attributes of a module; of PyTorch's own only attributes, where it prints none of them."""
    own = [base for base in type(module).__mro__ if base.__module__.partition(".")[0] not in {"torch", "builtins"}]
    printing = type(module).extra_repr is not nn.Module.extra_repr
    if not own and (printing or isinstance(module, fx.GraphModule)):
        return
    for base in own:
        try:
            yield inspect.getsource(base)
        except (OSError, TypeError):  # made in a console, or compiled
            yield base.__qualname__
    known = {*vars(nn.Module()), *(() if own else _NO_MATTER)}
    for name, value in sorted(vars(module).items()):
        said = None if name in known else _said(value)
        if said is not None:
            yield f"{name} = {said}"


def _said(value: Any) -> str | None:
    """A value in words that are the same in every process, or None where there are none for its type."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype() | torch.device():
            return repr(value)
        case Tensor():
            return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(_content(value)).hexdigest()}"
        case tuple() | list():
            return str([_said(entry) for entry in value])
        case dict():
            return str(sorted(f"{_said(key)}: {_said(entry)}" for key, entry in value.items()))
    return str(value.__qualname__) if inspect.isroutine(value) or inspect.isclass(value) else None


def accuracy(model: nn.Module, split: Split) -> Accuracy:
    """Accuracy of a model on a split, with a Wilson interval."""
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in split.batches(250))
    return wilson(correct, len(split))


def score_teacher(network: Network, data: Data) -> TeacherScore:
    """Measure the teacher on the validation split, before anything else."""
    example = data.example_input
    logits = network.regions[-1].info.output_shape[-1]
    if logits != len(data.classes):
        raise TraceError(
            "the model and the data have different numbers of classes",
            found=f"{logits} logits, {len(data.classes)} classes in the data",
            wanted="one logit per class",
            remedy="set model.args (num_classes) or data.target_groups so that they agree",
        )
    labels = data.validation.labels
    chance = float(torch.bincount(labels).max()) / len(labels) * 100
    return TeacherScore(
        accuracy=accuracy(network.teacher, data.validation),
        chance_pct=chance,
        macs=count_macs(network.teacher, example[:1]),
        params=count_params(network.teacher),
        size_bytes=sum(value.numel() * value.element_size() for value in network.teacher.state_dict().values()),
        classes=len(data.classes),
    )


def refuse_near_chance(teacher: TeacherScore, section: DataSection, *, force: bool) -> None:
    """Stop at a teacher that is hardly better than always guessing the commonest class."""
    least = teacher.chance_pct + 0.1 * (100 - teacher.chance_pct)
    if teacher.accuracy.pct >= least or force:
        return
    normalize = section.normalize
    raise TeacherError(
        "the teacher is near chance: wrong preprocessing?",
        found=f"{teacher.accuracy.pct:.1f} % on {teacher.accuracy.n} validation inputs; "
        f"the commonest class gives {teacher.chance_pct:.1f} %",
        wanted=f"at least {least:.1f} %",
        remedy=f"check data.normalize (now mean {normalize.mean}, std {normalize.std}), data.image_size, "
        "the order of the classes, and that model.weights is set; --force goes on all the same",
    )
