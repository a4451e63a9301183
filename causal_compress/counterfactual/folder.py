"""A trained explainer in a folder: weights and domain as safetensors, all else as JSON; nothing is ever pickled.

The folder holds `generator.safetensors` and `counterfactual.json`, which names the former's hash.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import to_json
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from causal_compress.counterfactual.constraints import Domain
from causal_compress.counterfactual.explainer import Explainer
from causal_compress.counterfactual.generator import build_generator
from causal_compress.counterfactual.training import judge_of
from causal_compress.errors import CheckpointError, DataError
from causal_compress.files import atomic_write_bytes
from causal_compress.inputs.data import Data, Features
from causal_compress.recipe import CounterfactualSection
from causal_compress.results import CounterfactualTraining
from causal_compress.results.common import config
from causal_compress.understand.teacher import weights_sha256
from causal_compress.understand.trace import Network

WEIGHTS, DESCRIPTION = "generator.safetensors", "counterfactual.json"
_WEIGHT, _DOMAIN, _FEATURE = "generator.", "domain.", "features."


@dataclass(frozen=True, kw_only=True, config=config)
class _Description:
    schema_number: Literal[1]
    weights_sha256: str
    kind: Literal["image", "table"]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    names: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...]
    categories: tuple[tuple[str, ...], ...]
    section: CounterfactualSection
    training: CounterfactualTraining


def save_explainer(explainer: Explainer, folder: Path) -> None:
    """Write a trained explainer; each file is whole or absent, and the description comes last.

    Args:
        explainer: Trained.
        folder: Made where it isn't there.

    Raises:
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = explainer.features
    tensors = {_WEIGHT + name: value for name, value in explainer.generator.state_dict().items()}
    tensors |= {_DOMAIN + name: value for name, value in explainer.domain.tensors().items()}
    tensors |= {_FEATURE + "zero": features.zero, _FEATURE + "mean": features.mean}
    content = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    description = _Description(
        schema_number=1,
        weights_sha256=hashlib.sha256(content).hexdigest(),
        kind=features.kind,
        input_shape=explainer.input_shape,
        classes=explainer.classes,
        names=features.names,
        columns=features.columns,
        categories=features.categories,
        section=explainer.section,
        training=explainer.trained,
    )
    atomic_write_bytes(folder / WEIGHTS, content)
    atomic_write_bytes(folder / DESCRIPTION, to_json(description, indent=1, inf_nan_mode="constants") + b"\n")


def load_explainer(folder: Path, network: Network) -> Explainer:
    """Read a trained explainer back.

    Args:
        folder: From `save_explainer`.
        network: The network that it explains.

    Raises:
        CheckpointError: missing or damaged files, or a generator that was trained for another network.
    """
    description = read_description(folder)
    found = weights_sha256(network.graph)
    if found != description.training.network_sha256:
        raise CheckpointError(
            f"{folder} explains another network",
            found=f"weights {found[:12]}",
            wanted=f"weights {description.training.network_sha256[:12]}",
            remedy="give the checkpoint that it was trained for, or run `causal-compress counterfactual train` anew",
        )
    tensors = _tensors(folder, description)
    parts = {
        prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (_WEIGHT, _DOMAIN, _FEATURE)
    }
    groups = tuple(p for p, names in zip(description.columns, description.categories, strict=True) if names)
    try:
        domain = Domain(**parts[_DOMAIN], columns=description.columns, groups=groups)
        classes, section = description.classes, description.section
        generator = build_generator(domain, description.input_shape, len(classes), section.width)
        generator.load_state_dict(parts[_WEIGHT])
        features = Features(
            description.kind,
            description.names,
            description.columns,
            parts[_FEATURE]["zero"],
            parts[_FEATURE]["mean"],
            description.categories,
        )
    except (TypeError, KeyError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    judge = judge_of(network, section.perceptual_site, torch.device("cpu"))
    frozen = generator.eval().requires_grad_(False)
    return Explainer(judge, frozen, domain, features, classes, description.input_shape, section, description.training)


def refuse_other_data(folder: Path, trained: CounterfactualTraining, data: Data) -> None:
    """Refuse data whose contents, split or preparation are not those of the training: inputs would mean another thing.

    Args:
        folder: Of the explainer, for the message.
        trained: How it was trained.
        data: What it is to explain now.

    Raises:
        DataError: other data.
    """
    if data.fingerprint != trained.data_sha256:
        raise DataError(
            f"the data of {folder} are not what they were when it was trained",
            found=f"{data.fingerprint[:16]} now, {trained.data_sha256[:16]} then",
            wanted="the same contents, split and preparation",
            remedy="put the data back, or run `causal-compress counterfactual train` anew",
        )


def read_description(folder: Path) -> _Description:
    """The description of a trained explainer.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    try:
        return TypeAdapter(_Description).validate_python(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} holds no trained counterfactuals",
            found=f"no {DESCRIPTION}",
            remedy=f"run `causal-compress counterfactual train --out {folder}` first",
        ) from error
    except (ValueError, ValidationError) as error:
        raise _damaged(folder, error) from error


def _tensors(folder: Path, description: _Description) -> dict[str, Tensor]:
    try:
        content = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != description.weights_sha256:
            raise ValueError(f"{WEIGHTS} is not the file that {DESCRIPTION} describes")
        return load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} is damaged, or was written by another version",
        found=str(error).splitlines()[0][:200],
        remedy="run `causal-compress counterfactual train` anew",
    )
