"""model.pt2: a network as a graph of ATen operations, saved and loaded without its source and without pickle.

What torch 2.14 does when it loads a .pt2 (torch/export/pt2_archive/_package.py, torch/_export/serde/serialize.py):
plain weights and constants are raw bytes, and the graph is JSON. But five things in an archive can run code:
weights or constants marked `use_pickle` and opaque objects are unpickled without restriction; sample inputs that fail
`weights_only=True` are unpickled without it; compiled libraries (AOTInductor) are loaded; size expressions go through
sympy's `eval`; and operators are looked up by name, so that `torch.os.system` is a valid one. So `save_pt2` writes none
of these (sample inputs are real rows of somebody's data and are left out too), and `load` refuses an archive that has
any of them before torch sees it.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from causal_compress.errors import ExportError, RunFolderError
from causal_compress.files import atomic_write_bytes
from causal_compress.understand.cost import plain_attention

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(, (positive|integer)=True)*\)")
_EXPRESSION = re.compile(
    r"([\d\s(),+*/-]|Integer|Rational|Mul|Add|Pow|Min|Max|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|ModularIndexing"
    r"|Equality|Unequality|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan)*"
)
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(mul|add|sub|neg|floordiv|truediv|mod|pow|eq|ne|lt|le|gt|ge|getitem)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(max|min|int|float|ite|not|sum)"
)
_NAME = re.compile(r"[\w.]*")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", None)


def capture(model: nn.Module, example_input: Tensor) -> ExportedProgram:
    """Graph of ATen operations of a copy of the model in evaluation mode, with a free batch size.

    Args:
        model: Any network that torch.export can follow, torch.fx graphs included; left as it was.
        example_input: Two or more inputs; a batch of one would be taken as a constant.

    Returns:
        The exported program on the CPU; all floating-point parameters can be trained.

    Raises:
        ExportError: torch.export can't follow the model, or the model fixes the batch size.
    """
    twin = copy.deepcopy(model).cpu().eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    inputs = example_input.detach().cpu()
    inputs = inputs if len(inputs) > 1 else torch.cat([inputs, inputs])
    try:
        with plain_attention():
            return torch.export.export(twin, (inputs,), dynamic_shapes=({0: Dim("batch", min=1)},))
    except Exception as error:  # torch.export has no common base for its many failures
        raise ExportError(
            "torch.export can't follow the model",
            found=first_lines(error),
            wanted="a forward that depends on shapes only, for every batch size",
            remedy="write x.size(0) or flatten(1) where the batch size is a number, and drop branches on tensor values",
        ) from error


def save_pt2(model: nn.Module, example_input: Tensor, path: Path) -> None:
    """Write the model as a .pt2 archive that needs neither its source nor pickle.

    Args:
        model: The network; left as it was.
        example_input: Two or more inputs.
        path: File to write; replaced at once when complete.

    Raises:
        ExportError: the model can't be captured, or holds what can only be stored as pickle.
    """
    write_pt2(capture(model, example_input), path)


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Write a captured program as `save_pt2` does; the program loses its example inputs and stack traces.

    Args:
        program: From `capture`.
        path: File to write.

    Raises:
        ExportError: the program holds what can only be stored as pickle.
    """
    program._example_inputs = None  # no public way to leave them out; they are rows of the user's data
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    if danger := _executable_part(content):
        raise ExportError(
            "the model can't be stored without executable parts",
            found=danger,
            wanted="ordinary tensors and ATen operators only",
            remedy="replace custom operators and tensor subclasses in the architecture by plain PyTorch",
        )
    atomic_write_bytes(path, content)


def load(folder_or_file: Path | str) -> nn.Module:
    """Load a compressed network; its source need not be there, and nothing is unpickled.

    Args:
        folder_or_file: A run folder (its model.pt2 is taken), or a .pt2 file written by this package.

    Returns:
        Module on the CPU: N x ... float32 in, N x classes logits out; all parameters can be trained.

    Raises:
        RunFolderError: the file is missing, damaged, or holds parts that could run code.

    Limits: the graph is that of evaluation mode: batch norm uses its stored statistics and dropout does nothing, also
        after `.train()`, which only sets flags. To train with live batch statistics, replay the surgery on the
        original architecture and load student.safetensors. The checks close the ways to run code that are known in
        torch 2.14; a file from a stranger still deserves care.
    """
    path = Path(folder_or_file)
    path = path / "model.pt2" if path.is_dir() else path
    content = _read(path)
    try:
        danger = _executable_part(content)
        with quiet("torch.export"):
            program = None if danger else torch.export.load(io.BytesIO(content))
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise RunFolderError(
            f"{path.name} is damaged or was written by another version of torch",
            found=first_lines(error),
            wanted=f"a .pt2 archive that torch {torch.__version__} can read",
            remedy="run compress again into the same folder; it resumes at the first invalid file",
        ) from error
    if program is None:
        raise RunFolderError(
            f"{path.name} holds parts that could run code; it was not loaded",
            found=danger,
            wanted="a .pt2 archive written by causal-compress",
            remedy="get the file from the run that made it, or run compress again",
        )
    return _trainable(program)


def first_lines(error: BaseException, lines: int = 3) -> str:
    """The start of another library's message: its kind, and its first lines that are not empty.

    Args:
        error: What was caught.
        lines: How many lines are kept.

    Returns:
        One line of text, at most 400 characters.
    """
    kept = [line.strip() for line in str(error).splitlines() if line.strip()][:lines]
    return f"{type(error).__name__}: {' '.join(kept)}"[:400]


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Other libraries' loggers tell of errors only; what fails here is raised with a remedy, not logged.

    Args:
        names: Of the loggers.

    Yields:
        Nothing.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunFolderError(
            f"can't read the model {path}",
            found=error.strerror or str(error),
            wanted="a run folder with model.pt2, or a .pt2 file",
            remedy="give the folder that compress wrote (--out), and check that the run got as far as export",
        ) from error


def _trainable(program: ExportedProgram) -> nn.Module:
    # Guards are code made from text of the file; without them the module also takes every batch size.
    module = program.module(check_guards=False)
    # torch makes train() and eval() of an exported graph raise; a training loop calls both. The flags change nothing.
    vars(module).pop("train", None)
    vars(module).pop("eval", None)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module.eval()


def _executable_part(content: bytes) -> str:
    """What in an archive could run code when torch loads it; empty if nothing could."""
    # The same reader as torch.export.load, so that both see the same records in an archive made to be ambiguous.
    archive = torch._C.PyTorchFileReader(io.BytesIO(content))
    records = archive.get_all_records()
    unknown = [name for name in records if not _RECORDS.fullmatch(name)]
    if unknown or len(set(records)) < len(records):
        return f"unexpected record {(unknown or records)[0]}"
    if len(archive.get_record("data/sample_inputs/model.pt")):
        return "stored sample inputs, which may be pickled"
    configs = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
    for name in configs:
        if danger := _pickled(json.loads(archive.get_record(name))["config"]):
            return danger
    return _unsafe_graph(json.loads(archive.get_record("models/model.json")))


def _pickled(config: dict[str, Any]) -> str:
    for tensor, payload in config.items():
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            return f"{tensor} is stored as pickle"
        if not _NAME.fullmatch(tensor):
            return f"the name {tensor!r}"
    return ""


def _unsafe_graph(graph: dict[str, Any]) -> str:
    for key, value in _pairs(graph):
        if key in ("as_graph", "as_custom_obj", "as_operator"):
            return f"an argument of kind {key}"
        if (is_safe := _CHECKS.get(key)) and isinstance(value, str) and not is_safe(value):
            return f"{key} {value!r}"
        if key.endswith("name") and isinstance(value, str) and not _NAME.fullmatch(value):
            return f"the name {value!r}"
    return ""


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _pairs(child)


def _is_plain_structure(spec: str) -> bool:
    return all(
        value in _CONTAINERS if key == "type" else value in ("null", "[]", None) if key == "context" else True
        for key, value in _pairs(json.loads(spec))
    )


_CHECKS: dict[str, Callable[[str], bool]] = {
    "target": lambda target: bool(_TARGET.fullmatch(target)),
    "expr_str": lambda text: bool(_EXPRESSION.fullmatch(_SYMBOL.sub("", text))),
    "in_spec": _is_plain_structure,
    "out_spec": _is_plain_structure,
}
