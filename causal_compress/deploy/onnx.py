"""ONNX: export with a free batch size, simplify, check, and compare with PyTorch on real inputs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from causal_compress.deploy.package import capture, first_lines, load, quiet, write_pt2
from causal_compress.deploy.runtimes import OnnxRuntime, TorchRuntime
from causal_compress.errors import DataError, ExportError
from causal_compress.files import atomic_write_bytes, sha256_of_file
from causal_compress.recipe import ExportSection
from causal_compress.results import Exported, Parity
from causal_compress.understand.cost import evaluating

if TYPE_CHECKING:
    from causal_compress.inputs.data import Data

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_LIMIT_BYTES = 2**31 - 1
_BATCH_ELEMENTS = 2**24  # 64 MB of input: at 224 x 224 a batch of 256 would need gigabytes of activations


def export(student: nn.Module, teacher: nn.Module, data: Data, section: ExportSection, folder: Path) -> Exported:
    """Write model.onnx, model.pt2, teacher.onnx and teacher.pt2, and check each against PyTorch on validation inputs.

    Args:
        student: The compressed network.
        teacher: The network before compression.
        data: Its example input shapes the export; parity is checked on its validation split.
        section: Opset and limits of parity.
        folder: Existing run folder.

    Returns:
        Names of the files in the folder, size, hash, and parity.

    Raises:
        ExportError: a model can't be exported, the file is invalid, or it differs from PyTorch.
    """
    before, after = _write(student, data.example_input, folder, "model", section.opset)
    _write(teacher, data.example_input, folder, "teacher", section.opset)
    compare = _comparison(data, section)
    return Exported(
        onnx="model.onnx",
        opset=section.opset,
        size_bytes=(folder / "model.onnx").stat().st_size,
        sha256=sha256_of_file(folder / "model.onnx"),
        parity=compare(student, OnnxRuntime.load(folder / "model.onnx").run, "model.onnx"),
        pt2="model.pt2",
        pt2_parity=compare(student, TorchRuntime(load(folder / "model.pt2")).run, "model.pt2"),
        teacher_onnx="teacher.onnx",
        teacher_pt2="teacher.pt2",
        teacher_parity=compare(teacher, OnnxRuntime.load(folder / "teacher.onnx").run, "teacher.onnx"),
        nodes_before=before,
        nodes_after=after,
    )


def export_onnx(model: nn.Module, example_input: Tensor, path: Path, *, opset: int) -> tuple[int, int]:
    """Write one ONNX file: free batch size, batch norm folded, constants folded, dead nodes removed, fully checked.

    Args:
        model: The network; left as it was.
        example_input: Two or more inputs.
        path: File to write; replaced at once when complete.
        opset: ONNX operator set.

    Returns:
        Numbers of nodes before and after simplification.

    Raises:
        ExportError: a step fails (the message names the node or operator where the exporter does), or the exporter
            writes another operator set than was asked for.

    Source: torch.onnx (torch.export based) and onnxscript's optimizer.
    """
    return _write_onnx(capture(model, example_input), path, opset)


def check_parity(
    model: nn.Module,
    run: Run,
    batches: Iterable[Tensor],
    *,
    section: ExportSection,
    name: str,
    sizes: tuple[int, ...] = (1, 7, 256),
) -> Parity:
    """Compare an exported model with PyTorch on the same real inputs.

    Args:
        model: The PyTorch model; left as it was.
        run: The exported model: N x ... float32 in, N x classes out.
        batches: Real inputs, normalised.
        section: Limits: `max_abs_diff` of logits and `min_agreement_pct` of the top class.
        name: File name, for the message.
        sizes: Batch sizes that must run; made of the first inputs, repeated where they are too few, and cut to
            64 MB of input.

    Returns:
        Largest absolute difference of logits, agreement [percent] and number of inputs.

    Raises:
        ExportError: beyond a limit, or the exported model can't run a batch size.
        DataError: no inputs.

    Limits: an absolute limit means little for a network whose logits are in the thousands.
    """
    largest, agreed, seen, first = 0.0, 0, 0, None
    with evaluating(model):
        for x in batches:
            first = x if first is None else first
            difference, same = _compare(model, run, x)
            largest, agreed, seen = float(np.maximum(largest, difference)), agreed + same, seen + len(x)
        if first is None:
            raise DataError("no inputs to check the export on", remedy="set data.validation to 1 or more")
        sizes = tuple(dict.fromkeys(min(size, max(1, _BATCH_ELEMENTS // first[0].numel())) for size in sizes))
        for size in sizes:
            largest = float(np.maximum(largest, _compare(model, _named(run, name, size), _repeat(first, size))[0]))
    parity = Parity(inputs=seen, max_abs_diff=largest, agreement_pct=100.0 * agreed / seen, batches=sizes)
    _refuse_difference(parity, section, name)
    return parity


def _comparison(data: Data, section: ExportSection) -> Callable[[nn.Module, Run, str], Parity]:
    def compare(model: nn.Module, run: Run, name: str) -> Parity:
        batches = (x for x, _ in data.validation.batches(64, limit=section.inputs))
        return check_parity(model, run, batches, section=section, name=name)

    return compare


def _write(model: nn.Module, example_input: Tensor, folder: Path, stem: str, opset: int) -> tuple[int, int]:
    program = capture(model, example_input)
    nodes = _write_onnx(program, folder / f"{stem}.onnx", opset)
    write_pt2(program, folder / f"{stem}.pt2")
    return nodes


def _write_onnx(program: ExportedProgram, path: Path, opset: int) -> tuple[int, int]:
    try:
        with _quiet():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, optimize=False, verbose=False, **_NAMES
            )
            if exported is None:
                raise TypeError("torch.onnx.export returned nothing")
            before = len(exported.model.graph)
            exported.optimize()
            proto = exported.model_proto
    except Exception as error:  # conversion, decomposition and optimisation each have their own kinds
        raise ExportError(
            f"the model can't be converted to ONNX opset {opset}",
            found=first_lines(_deepest(error)),
            wanted="operators that ONNX has",
            remedy="try another export.opset, or replace the operator named above in the architecture",
        ) from error
    _refuse_other_opset(proto, opset)
    _tidy(proto)
    atomic_write_bytes(path, _checked_bytes(proto, path.name))
    return before, len(proto.graph.node)


def refuse_unknown_opset(opset: int) -> None:
    """Refuse an operator set that the installed onnx does not know; to be asked before any work.

    Raises:
        ExportError: it is newer.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ExportError(
            f"export.opset {opset} is not known here",
            found=f"onnx {onnx.__version__}, whose newest operator set is {newest}",
            remedy=f"set export.opset to {newest} at most (the default is 18), or update onnx, onnxscript and torch",
        )


def _refuse_other_opset(proto: Any, opset: int) -> None:
    """The exporter leaves a model at the opset that it writes itself where it can't convert it to the one wanted."""
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise ExportError(
            f"the model can't be converted to ONNX opset {opset}",
            found=f"the exporter wrote opset {written}",
            wanted=f"opset {opset}, as export.opset asks",
            remedy=f"set export.opset to {written}, or update onnx and onnxscript",
        )


_NAMES: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"]}


def _deepest(error: BaseException) -> BaseException:
    # The exporter wraps: the innermost cause names the node and the operator, the outermost gives general advice.
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _tidy(proto: Any) -> None:
    """Name the free dimension "batch", and drop stack traces, which hold source lines and paths of this machine."""
    graph = proto.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if symbol and dim.dim_param:
                dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, proto):
        del item.metadata_props[:]


def _checked_bytes(proto: Any, name: str) -> bytes:
    import onnx

    if proto.ByteSize() > _LIMIT_BYTES:
        raise ExportError(
            f"{name} is too large for one ONNX file",
            found=f"{proto.ByteSize()} bytes",
            wanted=f"at most {_LIMIT_BYTES} bytes",
            remedy="ask for a smaller budget.params",
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exporter wrote an invalid {name}",
            found=first_lines(error),
            wanted="a model that onnx.checker accepts",
            remedy="try another export.opset, or update onnx and onnxscript",
        ) from error
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's advice to developers."""
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg)\b")
        yield


def _compare(model: nn.Module, run: Run, x: Tensor) -> tuple[float, int]:
    with torch.no_grad():
        wanted = model(x.to(_device(model))).float().cpu().numpy()
    got = run(np.ascontiguousarray(x.cpu().numpy(), dtype=np.float32))
    return float(np.max(np.abs(got - wanted))), int(np.sum(got.argmax(1) == wanted.argmax(1)))


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _repeat(x: Tensor, size: int) -> Tensor:
    return x[torch.arange(size) % len(x)]


def _named(run: Run, name: str, size: int) -> Run:
    def run_named(x: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            return run(x)
        except Exception as error:  # each runtime has its own
            raise ExportError(
                f"{name} can't run a batch of {size}",
                found=first_lines(error),
                remedy="write x.size(0) or flatten(1) where the architecture fixes the batch size",
            ) from error

    return run_named


def _refuse_difference(parity: Parity, section: ExportSection, name: str) -> None:
    if not parity.max_abs_diff <= section.max_abs_diff:  # "not <=": NaN is refused too
        raise ExportError(
            f"export: {name} differs from PyTorch by {parity.max_abs_diff:.1e} (limit {section.max_abs_diff:.0e})",
            found=f"largest difference of logits over {parity.inputs} validation inputs",
            wanted="the same logits",
            remedy=f"try export.opset other than {section.opset}, or raise export.max_abs_diff",
        )
    if parity.agreement_pct < section.min_agreement_pct:
        raise ExportError(
            f"export: {name} answers as PyTorch on {parity.agreement_pct:.2f} % of {parity.inputs} validation inputs",
            wanted=f"at least {section.min_agreement_pct:g} %",
            remedy="lower export.min_agreement_pct if these inputs are near ties, or try another export.opset",
        )
