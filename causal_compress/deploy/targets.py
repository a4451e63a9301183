"""What can be benchmarked: runs, packages and model files, and the runtimes that take each of their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from causal_compress.deploy.absent import absence
from causal_compress.deploy.engines import read_engine_info
from causal_compress.deploy.precision import PRECISIONS, parse_onnx, precision_of
from causal_compress.deploy.runtimes import RUNTIMES, RuntimeName
from causal_compress.errors import RunFolderError, UsageError
from causal_compress.files import sha256_of_file
from causal_compress.results import Package, Skip

Kind = Literal["onnx", "pt2", "openvino", "tensorrt", "tensorrt-rtx"]

PACKAGE = "package.json"
_TAKES: dict[RuntimeName, tuple[Kind, ...]] = {
    "torch": ("pt2",),
    "torch-compiled": ("pt2",),
    "onnxruntime": ("onnx",),
    "onnxruntime-cuda": ("onnx",),
    "onnxruntime-tensorrt": ("onnx",),
    "openvino": ("onnx", "openvino"),
    "tensorrt": ("tensorrt", "onnx"),
    "tensorrt-rtx": ("tensorrt-rtx", "onnx"),
}
_RUN_FILES = (
    ("teacher", "teacher.pt2"),
    ("teacher", "teacher.onnx"),
    ("student", "model.pt2"),
    ("student", "model.onnx"),
    ("student", "model.int8.onnx"),
    ("student", "model.int8.trt.onnx"),
)
_GPU_FORM = ".trt.onnx"
_ENGINES = (".engine", ".plan", ".trt")


@dataclass(frozen=True)
class ModelFile:
    """One file of one target; `role` is teacher or student where that is known."""

    target: str
    kind: Kind
    precision: str
    path: Path
    macs: int | None = None
    role: str = ""


@dataclass(frozen=True)
class Entry:
    """One file on one runtime: a line of the table for each batch size and number of threads."""

    file: ModelFile
    runtime: RuntimeName

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.file.target} {self.file.precision} on {self.runtime}"


def model_files(target: Path) -> tuple[ModelFile, ...]:
    """The files of one target.

    Args:
        target: A run folder, a package folder, or a file: .onnx, .pt2, .xml, .engine.

    Returns:
        One or more files, the teacher's first.

    Raises:
        RunFolderError: a folder that is neither, or files that are missing or damaged.
        UsageError: a file of another kind.
    """
    if (target / PACKAGE).is_file():
        return tuple(_of_package(target, read_package(target)))
    if target.is_dir():
        return _of_run(target)
    if not target.is_file():
        raise RunFolderError(f"can't read {target}", found="no such file or folder", remedy="check the path")
    kind = _kind_of(target)
    return (ModelFile(target.name, kind, _precision(target, kind), target),)


def files_of(targets: Sequence[Path]) -> tuple[ModelFile, ...]:
    """The files of several targets, with names that tell them apart.

    Args:
        targets: As for `model_files`.

    Returns:
        The files in the targets' order. Where a name comes up in two targets, that of their folder is put before it;
        where that does not help either, the target's number after it.
    """
    each = [model_files(target) for target in targets]
    named = list(each)
    for depth in (1, 2):
        for index in _clashing(named):
            prefix = _prefix(targets[index], depth)
            named[index] = tuple(replace(file, target=prefix + file.target) for file in each[index])
    for index in _clashing(named):
        named[index] = tuple(replace(file, target=f"{file.target} #{index + 1}") for file in named[index])
    return tuple(file for files in named for file in files)


def _clashing(named: Sequence[Sequence[ModelFile]]) -> list[int]:
    counts = Counter(name for files in named for name in {file.target for file in files})
    return [index for index, files in enumerate(named) if any(counts[file.target] > 1 for file in files)]


def _prefix(target: Path, depth: int) -> str:
    """A package's own folder is not part of its files' names; that of a run is, and a file has a name of its own."""
    parts = target.resolve().parts
    if (target / PACKAGE).is_file():
        return "/".join(parts[-depth:]) + " "
    return "/".join(parts[-depth - 1 : -1]) + "/"


def read_package(folder: Path) -> Package:
    """package.json, after checking that all files of the package are as they were written.

    Args:
        folder: The package.

    Returns:
        What it holds.

    Raises:
        RunFolderError: damaged, incomplete, or not written by this program.
    """
    try:
        package = TypeAdapter(Package).validate_json((folder / PACKAGE).read_bytes())
        wanted = {package.inputs: package.inputs_sha256}
        for model in package.models:
            wanted |= model.files
        found = [name for name, digest in wanted.items() if sha256_of_file(folder / name) != digest]
        fault = f"changed since they were written: {', '.join(found)}" if found else ""
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    except ValidationError as error:
        fault = f"{PACKAGE}: {error.errors(include_url=False)[0]['msg']}"
    if fault:
        raise RunFolderError(
            f"the package {folder} is not whole",
            found=fault,
            wanted="all files that export wrote",
            remedy="copy the whole folder again, or write it again with causal-compress export",
        )
    return package


def is_package(folder: Path) -> bool:
    """Whether a folder holds a package.json that this program wrote; other programs have files of that name too."""
    try:
        TypeAdapter(Package).validate_json((folder / PACKAGE).read_bytes())
    except (OSError, ValidationError):
        return False
    return True


def name_of(folder: Path) -> str:
    """A folder's name for people, also where it was given as `.`."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def choose_entries(
    files: Sequence[ModelFile], runtimes: Sequence[RuntimeName], precisions: Sequence[str]
) -> tuple[tuple[Entry, ...], tuple[Skip, ...]]:
    """Which files run on which runtimes here.

    Args:
        files: Of all targets, the reference's first.
        runtimes: Asked for; empty: all that are here, except torch-compiled.
        precisions: Asked for; empty: all.

    Returns:
        Entries in the order of runtimes and files, and what can't be measured here, with the reason.

    Raises:
        MissingPackageError: a runtime that was asked for is not here.
        UsageError: nothing to measure.
    """
    chosen = [file for file in files if not precisions or file.precision in precisions]
    if not chosen:
        raise UsageError(
            f"no model in {' or '.join(precisions)}",
            found=", ".join(sorted({file.precision for file in files})),
            remedy="leave --precision out, or write such a file with causal-compress export RUN --to ... --precision",
        )
    entries: list[Entry] = []
    skipped: list[Skip] = []
    for name in runtimes or [name for name in RUNTIMES if name != "torch-compiled"]:
        fitting = [file for file in chosen if _fits(file, name)]
        error = absence(name) if fitting else None
        if error is not None and runtimes:
            raise error
        if error is not None:
            skipped.append(Skip(what=name, reason=f"{error.what}: {error.remedy}"))
            continue
        if runtimes and not fitting:
            wanted = " or ".join(_TAKES[name])
            skipped.append(Skip(what=name, reason=f"none of these files runs on it; it takes {wanted} files"))
        entries += [Entry(file, name) for file in fitting]
    if not entries:
        raise _nothing(chosen, runtimes, skipped)
    return tuple(entries), tuple(skipped)


def input_shape(file: ModelFile) -> tuple[int, ...]:
    """Shape of one input, as the file tells it.

    Args:
        file: Any model file.

    Returns:
        Sizes without the batch.

    Raises:
        UsageError: the file does not fix them.
    """
    sizes: tuple[int | None, ...]
    match file.kind:
        case "onnx":
            given = parse_onnx(file.path.read_bytes()).graph.input[0].type.tensor_type.shape.dim
            sizes = tuple(dim.dim_value or None for dim in given)[1:]
        case "pt2":
            from causal_compress.deploy.package import load

            graph = load(file.path).graph
            value = next(node.meta["val"] for node in graph.nodes if node.op == "placeholder")  # type: ignore[union-attr]
            sizes = tuple(int(size) for size in value.shape[1:])
        case "openvino":
            from openvino import Core

            shape = Core().read_model(file.path).inputs[0].partial_shape
            sizes = tuple(None if dim.is_dynamic else dim.get_length() for dim in list(shape)[1:])
        case _:
            sizes = read_engine_info(file.path).input_shape
    if any(size is None for size in sizes):
        raise UsageError(
            f"{file.path.name} doesn't fix the size of its inputs", found=str(sizes), remedy="give --data SOURCE"
        )
    return tuple(size for size in sizes if size is not None)


def bytes_on_disk(file: ModelFile) -> int:
    """What has to be carried to a device for one model.

    Args:
        file: Any model file.

    Returns:
        Size of the file and of those beside it that hold its weights [bytes].
    """
    beside: Iterable[Path] = ()
    if file.kind == "openvino":
        beside = (file.path.with_suffix(".bin"),)
    elif file.kind == "onnx":
        beside = _external_data(file.path)
    return sum(path.stat().st_size for path in (file.path, *beside) if path.is_file())


def _external_data(path: Path) -> list[Path]:
    """The files beside an .onnx file that its weights and constants lie in, each once."""
    graph = parse_onnx(path.read_bytes()).graph
    constants = (given.t for node in graph.node for given in node.attribute if given.HasField("t"))
    stored = (entry for tensor in (*graph.initializer, *constants) for entry in tensor.external_data)
    return [path.parent / name for name in sorted({entry.value for entry in stored if entry.key == "location"})]


def _of_package(folder: Path, package: Package) -> Iterator[ModelFile]:
    for model in sorted(package.models, key=lambda model: model.role == "student"):
        name = model.role if model.capability is None else f"{model.role} {model.capability}"
        first = next(iter(model.files))
        yield ModelFile(name, model.kind, model.precision, folder / first, package.macs[model.role], model.role)


def _of_run(folder: Path) -> tuple[ModelFile, ...]:
    found = tuple(
        ModelFile(f"{name_of(folder)} {role}", _kind_of(path), _precision(path, _kind_of(path)), path, None, role)
        for role, path in ((role, folder / name) for role, name in _RUN_FILES)
        if path.is_file()
    )
    if not found:
        raise RunFolderError(
            f"nothing to benchmark in {folder}",
            found="neither package.json nor model.onnx",
            wanted="a run folder, a package, or a model file",
            remedy="run compress or export first",
        )
    return found


def _kind_of(path: Path) -> Kind:
    match path.suffix:
        case ".onnx":
            return "onnx"
        case ".pt2":
            return "pt2"
        case ".xml":
            return "openvino"
        case suffix if suffix in _ENGINES:
            return read_engine_info(path).runtime
    raise UsageError(
        f"can't benchmark {path.name}",
        found=f"a file that ends in {path.suffix or 'nothing'}",
        wanted=".onnx, .pt2, .xml or .engine, a run folder or a package",
        remedy="write one of these with causal-compress export RUN --to ...",
    )


def _precision(path: Path, kind: Kind) -> str:
    match kind:
        case "onnx":
            return precision_of(path.read_bytes())
        case "pt2":
            return "fp32"
        case "openvino":
            text = path.read_text(encoding="utf-8")
            return "int8" if "FakeQuantize" in text else "fp16" if 'element_type="f16"' in text else PRECISIONS[0]
        case _:
            return read_engine_info(path).precision


def _fits(file: ModelFile, name: RuntimeName) -> bool:
    if file.kind not in _TAKES[name]:
        return False
    on_gpu_form = file.path.name.endswith(_GPU_FORM)
    if file.kind == "onnx" and file.precision == "int8":  # each family of runtimes has its own INT8 file
        return on_gpu_form == (name in ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt"))
    return True


def _nothing(files: Sequence[ModelFile], runtimes: Sequence[str], skipped: Sequence[Skip]) -> UsageError:
    there = ", ".join(sorted({f"{file.path.name} ({file.precision})" for file in files}))
    reasons = "; ".join(f"{skip.what}: {skip.reason}" for skip in skipped)
    return UsageError(
        f"nothing here can run {there}",
        found=reasons or f"runtime {', '.join(runtimes)}",
        remedy="name a runtime that takes such a file, or install one (see causal-compress doctor)",
    )
