"""Packages: a folder with models for one kind of runtime, real inputs with expected answers, and package.json.

A package can be copied to the target and measured there with `causal-compress benchmark FOLDER`; nothing else of the
run is needed. (`package.py` is the .pt2 file; this is the folder.)
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from causal_compress.deploy.absent import absence
from causal_compress.deploy.onnx import check_parity
from causal_compress.deploy.openvino import convert_to_openvino
from causal_compress.deploy.package_folder import package_folder
from causal_compress.deploy.precision import Precision, to_fp16
from causal_compress.deploy.runtimes import RuntimeName, for_any_batch, open_runtime
from causal_compress.deploy.targets import Kind
from causal_compress.deploy.tensorrt import CAPABILITIES, CURRENT, EngineOptions, TensorRTName, build_engine, sidecar
from causal_compress.errors import ExportError, RunFolderError, UsageError
from causal_compress.files import atomic_write_bytes, sha256_of_file
from causal_compress.provenance import versions
from causal_compress.recipe import DataSection, ExportSection
from causal_compress.results import Package, PackagedModel, Parity, Quantized, QuantizedFile, Skip
from causal_compress.understand.cost import count_macs, count_params, evaluating

if TYPE_CHECKING:
    from causal_compress.inputs.data import Data

Goal = Literal["onnx", "int8", "tensorrt", "tensorrt-rtx", "openvino", "pt2"]
GOALS: tuple[Goal, ...] = get_args(Goal)
Role = Literal["teacher", "student"]

_INPUTS = "parity.npz"
_INPUT_BYTES = 2**24  # of real inputs in a package
_MOST_INPUTS = 512
_UNLIMITED = {"max_abs_diff": 1e30, "min_agreement_pct": 0.0}
_PLAIN: dict[Role, str] = {"teacher": "teacher", "student": "model"}


@dataclass(frozen=True)
class Source:
    """A finished run's models and data; `quantized` where it has INT8 forms."""

    folder: Path
    teacher: nn.Module
    student: nn.Module
    data: Data
    prepared: DataSection
    parity: ExportSection
    quantized: Quantized | None = None

    def model(self, role: Role) -> nn.Module:
        """The network of a role."""
        return self.teacher if role == "teacher" else self.student


@dataclass(frozen=True)
class Wish:
    """What is asked of an export; empty precisions and capabilities mean the goal's usual ones."""

    goal: Goal
    precisions: tuple[Precision, ...] = ()
    capabilities: tuple[str, ...] = ()
    engine: EngineOptions = field(default_factory=EngineOptions)
    teacher: bool = True


_Known = dict[tuple[Path, RuntimeName], Parity]  # engines for several GPUs are built from one file


@dataclass(frozen=True)
class _Made:
    """A file that was written, before it is measured."""

    role: Role
    kind: Kind
    precision: Precision
    path: Path
    extra: tuple[Path, ...] = ()
    runtime: RuntimeName = "onnxruntime"
    capability: str | None = None
    note: str = ""
    stand_in: Path | None = None
    profile: tuple[int, int] | None = None


def write_package(source: Source, wish: Wish, folder: Path) -> Package:
    """Write a run's models in the form of one runtime, checked against PyTorch on real inputs where they run here.

    Args:
        source: The run.
        wish: For what runtime, precisions and GPUs.
        folder: New or empty folder, or a package to be replaced.

    Returns:
        What package.json holds.

    Raises:
        ExportError: a model can't be written, or an FP32 form differs from PyTorch beyond the run's limits.
        MissingPackageError: what writes the form is not installed, or needs a GPU that is not here.
        RunFolderError: the folder holds something else, or the run has no INT8 model.
        UsageError: a precision that this form does not have.

    Limits: the inputs in the package are rows of your data; whoever gets the package can read them.
    """
    with package_folder(folder) as (scratch, keep):
        package = _assemble(source, wish, scratch)
        keep(package)
    return package


def _assemble(source: Source, wish: Wish, folder: Path) -> Package:
    """Write everything but package.json, and describe it."""
    made, skipped = _write_all(source, wish, folder)
    models = _described_all(made, source, skipped)
    count = _write_inputs(source, folder / _INPUTS)
    normalize = source.prepared.normalize
    roles: tuple[Role, ...] = tuple(dict.fromkeys(one.role for one in models))
    example = source.data.example_input
    return Package(
        made_with=versions(),
        kind=source.data.kind,
        input_shape=source.data.input_shape,
        classes=source.data.classes,
        mean=None if normalize.mean is None else tuple(normalize.mean),
        std=None if normalize.std is None else tuple(normalize.std),
        preparation=_preparation(source),
        macs={role: count_macs(source.model(role), example) for role in roles},
        params={role: count_params(source.model(role)) for role in roles},
        models=models,
        inputs=_INPUTS,
        inputs_sha256=sha256_of_file(folder / _INPUTS),
        inputs_count=count,
        skipped=tuple(skipped),
        encoding_sha256=source.data.encoding_sha256,
    )


def read_inputs(folder: Path, package: Package) -> dict[str, np.ndarray]:
    """The real inputs of a package.

    Args:
        folder: The package.
        package: From `read_package`, which has checked the file.

    Returns:
        inputs (N x ..., prepared), labels (N), and the logits of PyTorch: logits_student, logits_teacher (N x classes).
    """
    with np.load(folder / package.inputs, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _write_all(source: Source, wish: Wish, folder: Path) -> tuple[list[_Made], list[Skip]]:
    roles: tuple[Role, ...] = ("teacher", "student") if wish.teacher else ("student",)
    precisions = wish.precisions or _usual(wish.goal, source)
    made: list[_Made] = []
    skipped: list[Skip] = []
    for precision in precisions:
        for role in roles:
            if role == "teacher" and precision == "int8":
                continue  # there is no INT8 teacher; its FP32 form is what INT8 is compared with
            try:
                made += _write(source, wish, (role, precision), folder, skipped)
            except ExportError as error:  # one form that can't be made is no reason to withhold the others
                if precision == "fp32":
                    raise
                skipped.append(_skip(f"{role} {precision}", error))
    if wish.teacher and not any(one.role == "teacher" for one in made):
        made += _write(source, wish, ("teacher", "fp32"), folder, skipped)
    return made, skipped


def _skip(what: str, error: ExportError) -> Skip:
    return Skip(what=what, reason=" ".join(str(error).split()))


def _usual(goal: Goal, source: Source) -> tuple[Precision, ...]:
    match goal:
        case "int8":
            return ("int8",)
        case "tensorrt" | "tensorrt-rtx":
            return ("fp32", "fp16") if _int8(source, on_gpu=True) is None else ("fp32", "fp16", "int8")
        case _:
            return ("fp32",)


def _write(
    source: Source, wish: Wish, what: tuple[Role, Precision], folder: Path, skipped: list[Skip]
) -> Iterator[_Made]:
    role, precision = what
    match wish.goal:
        case "pt2":
            if precision != "fp32":
                raise UsageError("a .pt2 file is FP32", found=precision, remedy="use --to onnx or --to tensorrt-rtx")
            path = folder / f"{_PLAIN[role]}.pt2"
            shutil.copyfile(source.folder / path.name, path)
            yield _Made(role, "pt2", precision, path, runtime="torch")
        case "onnx" | "int8":
            yield _Made(role, "onnx", precision, _onnx(source, what, folder))
        case "openvino":
            yield _openvino(source, what, folder)
        case "tensorrt" | "tensorrt-rtx":
            yield from _engines(source, wish, what, folder, skipped)


def _onnx(source: Source, what: tuple[Role, Precision], folder: Path, *, on_gpu: bool = False) -> Path:
    """A copy of the run's file, or its FP16 form."""
    role, precision = what
    plain = source.folder / f"{_PLAIN[role]}.onnx"
    if precision == "fp16":
        path = folder / f"{_PLAIN[role]}.fp16.onnx"
        atomic_write_bytes(path, to_fp16(plain.read_bytes()))
        return path
    if precision == "int8":
        plain = source.folder / ("model.int8.trt.onnx" if on_gpu else "model.int8.onnx")
        _refuse_changed(plain, _int8(source, on_gpu=on_gpu))
    if not plain.is_file():
        raise RunFolderError(
            f"the run has no {plain.name}",
            found=f"no such file in {source.folder}",
            wanted="a run whose recipe quantizes",
            remedy=f"run compress with a quantize section (--set quantize={{}}), a new --out, --reuse {source.folder}",
        )
    shutil.copyfile(plain, folder / plain.name)
    return folder / plain.name


def _int8(source: Source, *, on_gpu: bool) -> QuantizedFile | None:
    files = () if source.quantized is None else source.quantized.files
    return next((file for file in files if file.family == ("tensorrt" if on_gpu else "cpu")), None)


def _refuse_changed(path: Path, file: QuantizedFile | None) -> None:
    if file is not None and path.is_file() and sha256_of_file(path) != file.sha256:
        raise RunFolderError(
            f"{path.name} is not the file that the run measured",
            found="another sha256",
            remedy="run the compress command on this folder again: it computes only what is missing",
        )


def _told_of_int8(made: _Made, source: Source) -> str:
    """What quantization cost, and whether the run would choose this file at all."""
    on_gpu = made.kind in ("tensorrt", "tensorrt-rtx")
    file = _int8(source, on_gpu=on_gpu) if made.precision == "int8" else None
    if file is None or source.quantized is None:
        return ""
    low, high = file.drop_ci_pp
    kept = "within" if file.within_budget else "MISSES"
    return (
        f"INT8 drops {file.drop_pp:.2f} pp (95 % interval {low:.2f} to {high:.2f}) against FP32 on {file.n} validation "
        f"inputs: {kept} quantize.max_accuracy_drop" + ("" if on_gpu else f"; {source.quantized.reason}")
    )


def _openvino(source: Source, what: tuple[Role, Precision], folder: Path) -> _Made:
    role, precision = what
    path = folder / f"{_PLAIN[role]}.{precision}.xml"
    onnx = _onnx(source, (role, "fp32" if precision == "fp16" else precision), folder)
    convert_to_openvino(onnx, path, half=precision == "fp16")
    onnx.unlink()
    note = "weights in 16 bits; CPUs compute in 32" if precision == "fp16" else ""
    return _Made(role, "openvino", precision, path, (path.with_suffix(".bin"),), "openvino", note=note)


def _engines(
    source: Source, wish: Wish, what: tuple[Role, Precision], folder: Path, skipped: list[Skip]
) -> Iterator[_Made]:
    role, precision = what
    name: TensorRTName = "tensorrt" if wish.goal == "tensorrt" else "tensorrt-rtx"
    onnx = _onnx(source, what, folder, on_gpu=True)
    for capability in wish.capabilities or _usual_capabilities(name):
        path = folder / f"{_PLAIN[role]}.{precision}.{capability.lower()}.engine"
        options = replace(wish.engine, runtime=name, capability=capability)
        try:
            info = build_engine(onnx, path, options)
        except ExportError as error:  # one generation that can't is no reason to withhold the others
            skipped.append(_skip(f"{role} {precision} for {capability}", error))
            continue
        trust = ("version-compatible: loading it runs code from the file",) if info.version_compatible else ()
        extra, profile = (sidecar(path), onnx), (info.profile[0], info.profile[2])
        note = "; ".join((*info.notes, *trust))
        yield _Made(role, name, precision, path, extra, name, info.capability, note, onnx, profile)


def _usual_capabilities(name: TensorRTName) -> tuple[str, ...]:
    return (CURRENT,) if name == "tensorrt" or torch.cuda.is_available() else CAPABILITIES


def _described_all(made: Sequence[_Made], source: Source, skipped: list[Skip]) -> tuple[PackagedModel, ...]:
    models: list[PackagedModel] = []
    known: _Known = {}
    for one in made:
        try:
            models.append(_described(one, source, known))
        except ExportError as error:
            if one.precision == "fp32":
                raise
            skip = _skip(f"{one.role} {one.precision}", error)
            overflow = one.precision == "fp16" and "differs from PyTorch" in skip.reason
            skipped.append(replace(skip, reason=f"activations overflow 16 bits: {skip.reason}") if overflow else skip)
    if not any(one.role == "student" for one in models):
        raise ExportError("no model could be written", found="; ".join(skip.reason for skip in skipped), remedy="above")
    return tuple(models)


def _described(made: _Made, source: Source, known: _Known) -> PackagedModel:
    """Parity where it can be run here; else that of the ONNX file that it was built from, said to be that."""
    path: Path | None = made.path
    runtime, told = made.runtime, "; ".join(filter(None, (made.note, _told_of_int8(made, source))))
    absent = absence(runtime)
    if absent is not None:
        told = "; ".join(filter(None, (told, f"could not be run here: {absent.what}")))
        path = made.stand_in
    elif made.capability is not None and not _is_here(made.capability):
        told = "; ".join(filter(None, (told, f"not run here: built for {made.capability}")))
        path = made.stand_in
    if path is not None and path != made.path:
        runtime = "onnxruntime"
        told += f"; parity is that of {path.name}, from which it was built, on ONNX Runtime"
    parity = None
    if path is not None:
        parity = known.get((path, runtime)) or _parity(made, path, runtime, source)
        known[path, runtime] = parity
    files = (made.path, *made.extra)
    return PackagedModel(
        role=made.role,
        kind=made.kind,
        precision=made.precision,
        files={file.name: sha256_of_file(file) for file in files},
        size_bytes=sum(file.stat().st_size for file in files if file.suffix != ".json" and file != made.stand_in),
        capability=made.capability,
        parity=parity,
        parity_on=None if parity is None else runtime,
        note=told,
    )


def _is_here(capability: str) -> bool:
    return torch.cuda.is_available() and capability == "SM{}{}".format(*torch.cuda.get_device_capability())


def _parity(made: _Made, path: Path, runtime: RuntimeName, source: Source) -> Parity:
    """FP32 forms have to keep the run's limits; the others differ by design, and their figures say how much."""
    section = source.parity if made.precision == "fp32" else source.parity.model_copy(update=_UNLIMITED)
    run = for_any_batch(open_runtime(runtime, path, threads=torch.get_num_threads()))
    batches = (x for x, _ in source.data.validation.batches(64, limit=section.inputs))
    low, high = made.profile if made.profile is not None and path == made.path else (1, 64)
    sizes = tuple(size for size in (1, 7, 64) if low <= size <= high) or (low, high)
    return check_parity(source.model(made.role), run, batches, section=section, name=made.path.name, sizes=sizes)


def _write_inputs(source: Source, path: Path) -> int:
    split = source.data.validation
    count = min(_MOST_INPUTS, len(split), max(1, _INPUT_BYTES // (4 * int(np.prod(source.data.input_shape)))))
    rows = list(split.batches(64, limit=count))
    inputs = torch.cat([x for x, _ in rows])
    content = io.BytesIO()
    np.savez_compressed(
        content,
        inputs=inputs.numpy(),
        labels=torch.cat([y for _, y in rows]).numpy(),
        logits_teacher=_logits(source.teacher, inputs),
        logits_student=_logits(source.student, inputs),
    )
    atomic_write_bytes(path, content.getvalue())
    return len(inputs)


def _logits(model: nn.Module, inputs: Tensor) -> np.ndarray:
    call: Callable[[Tensor], Tensor] = partial(nn.Module.__call__, model)
    with evaluating(model), torch.no_grad():
        parts: Sequence[Tensor] = [call(part) for part in inputs.split(64)]
    return torch.cat(list(parts)).float().numpy()


def _preparation(source: Source) -> str:
    if source.data.kind == "table":
        return "columns encoded and scaled as in training; the inputs in this package are encoded already"
    size = f"resized to {source.prepared.image_size} pixels, " if source.prepared.image_size else ""
    return f"images, channels first, {size}scaled to [0, 1], then (x - mean) / std per channel where given"
