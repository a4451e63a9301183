"""Architecture + checkpoint -> nn.Module; nothing is downloaded and no pickled code is ever run."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from causal_compress.errors import MissingPackageError, UsageError
from causal_compress.inputs.callables import call, load_callable
from causal_compress.inputs.checkpoint import file_sha256, read_state
from causal_compress.inputs.weights import load_weights
from causal_compress.recipe import ModelSection

log = logging.getLogger(__name__)

_DOWNLOADS = {"weights", "weights_backbone", "pretrained"}


def build_model(section: ModelSection, *, classes: int | None = None) -> nn.Module:
    """Build the teacher and load its weights.

    Args:
        section: Architecture, keyword arguments and weights.
        classes: Number of classes of the data; passed on as `num_classes` (or `classes`) where the architecture
            has such an argument and `section.args` doesn't set it. None leaves the architecture's own default.

    Returns:
        The network on the CPU in eval mode. Without `section.weights` it has the callable's own initial weights.

    Raises:
        UsageError: an architecture that is unknown, can't be imported, raises, or returns no nn.Module.
        MissingPackageError: a `timm:` architecture without timm.
        CheckpointError: weights that can't be read, are not finite or don't fit.

    Limits:
        FILE.py and PACKAGE.MODULE callables are the user's own code and run as such.
    """
    if section.arch is None:
        raise UsageError(
            "no architecture was given",
            wanted="torchvision:NAME, timm:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE",
            remedy="add --arch, or model.arch in the recipe.",
        )
    # Read first: a checkpoint that can't be used is known before a large network is built.
    checkpoint = read_state(section.weights) if section.weights is not None else None
    builder = _builder(section)
    arguments = dict(section.args) | _class_argument(builder, section, classes)
    model = call(builder, arguments, text=section.arch, option="model.arch")
    model = _checked_module(model, section.arch).cpu()
    if checkpoint is not None:
        load_weights(model, checkpoint, str(section.weights))
    log.info("built %s (%s)", section.arch, section.weights or "initial weights")
    return model.eval()


def checkpoint_sha256(section: ModelSection) -> str | None:
    """Hash of the checkpoint file's bytes; None without a checkpoint."""
    return None if section.weights is None else file_sha256(section.weights)


def _builder(section: ModelSection) -> Callable[..., Any]:
    scheme, _, name = str(section.arch).partition(":")
    if scheme in ("torchvision", "timm"):
        _refuse_downloads(section)
    match scheme:
        case "torchvision":
            return _torchvision(name)
        case "timm":
            return _timm(name)
        case _:
            return load_callable(str(section.arch), option="model.arch")


def _refuse_downloads(section: ModelSection) -> None:
    asked = sorted(key for key in _DOWNLOADS & section.args.keys() if section.args[key])
    if asked:
        raise UsageError(
            f"model.args.{asked[0]} would download weights; nothing is ever downloaded",
            found=repr(section.args[asked[0]]),
            remedy=f"save the state dict to a file, name it in model.weights, and remove model.args.{asked[0]}.",
        )


def _torchvision(name: str) -> Callable[..., Any]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    # GoogLeNet and Inception warn unless told whether to initialise; True is their documented default.
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return partial(models.get_model, name, **extra)


def _timm(name: str) -> Callable[..., Any]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise MissingPackageError(
            f"the architecture timm:{name} needs the package timm",
            found="not installed",
            remedy="pip install 'causal-compress[timm]'",
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return partial(timm.create_model, name, pretrained=False)


def _unknown(library: str, name: str, known: list[str]) -> UsageError:
    close = difflib.get_close_matches(name, known, n=3)
    return UsageError(
        f"{library} has no classifier '{name}'",
        wanted=f"one of its {len(known)} names",
        remedy=f"did you mean {' or '.join(repr(match) for match in close)}?"
        if close
        else f"see {library}'s list of models, or name your own FILE.py:CALLABLE.",
    )


def _class_argument(builder: Callable[..., Any], section: ModelSection, classes: int | None) -> dict[str, int]:
    if classes is None:
        return {}
    if str(section.arch).startswith(("torchvision:", "timm:")):
        return {} if "num_classes" in section.args else {"num_classes": classes}
    try:
        named = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # classes written in C tell no signature
        return {}
    wanted = [name for name in ("num_classes", "classes") if name in named]
    return {} if not wanted or wanted[0] in section.args else {wanted[0]: classes}


def _checked_module(model: Any, arch: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{arch} does not build a network",
            found=f"it returned {type(model).__name__}",
            wanted="a torch.nn.Module",
            remedy="return the module itself from the callable.",
        )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UsageError(
            f"{arch} has parameters without a shape",
            found=", ".join(lazy[:8]),
            remedy="run the network once on an example input inside the callable, or use non-lazy layers.",
        )
    return model
