"""INT8: the student's ONNX file with weights and activations in 8 bits, one file per runtime family.

Ranges come from one pass over calibration inputs; everything that is chosen (method, bias correction, layers left in
FP32) is chosen by measuring on validation inputs, never on test. What a runtime family wants is told in `qdq.py`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from causal_compress.deploy.calibration import METHODS, Histogram, Method, activation_range, collect
from causal_compress.deploy.faster import Timer, time_and_choose, time_files
from causal_compress.deploy.qdq import FORMS, Family, Ranges, compact, insert, layers, prepare
from causal_compress.deploy.runtimes import OnnxRuntime, Runtime
from causal_compress.deploy.saturation import saturates
from causal_compress.deploy.sensitivity import fewest, mean_shifts, with_biases
from causal_compress.errors import DataError
from causal_compress.files import atomic_write_bytes, sha256_of_file
from causal_compress.recipe import QuantizeSection
from causal_compress.results import FloatLayer, Quantized, QuantizedFile
from causal_compress.shrink.front import kl_rows
from causal_compress.understand.cost import evaluating
from causal_compress.understand.statistics import paired_drop, wilson

if TYPE_CHECKING:
    from causal_compress.inputs.data import Data, Split

log = logging.getLogger(__name__)

Batches = Sequence[NDArray[np.float32]]

_BATCH_ELEMENTS = 2**20  # 4 MB of input; every activation of a batch is held at once while ranges are read
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class _Reference:
    """The FP32 student on validation inputs."""

    batches: Batches
    labels: NDArray[np.int64]
    logits: Tensor
    log_probabilities: Tensor  # of the first `scored` inputs, at the section's temperature
    temperature: float


@dataclass(frozen=True)
class _Source:
    """What an INT8 form is made from."""

    models: dict[Family, Any]
    ranges: dict[str, Histogram]
    calibration: Batches
    section: QuantizeSection
    threads: int


@dataclass(frozen=True)
class _Candidate:
    """One INT8 form: how it is made, and what it does to the output."""

    family: Family
    method: Method
    kl: float
    content: bytes
    excluded: tuple[FloatLayer, ...] = ()
    corrected: tuple[str, ...] = ()


def quantize(
    student: nn.Module,
    onnx_path: Path,
    data: Data,
    section: QuantizeSection,
    folder: Path,
    *,
    timer: Timer | None = None,
) -> Quantized:
    """Write the INT8 forms of an exported student, and say which precision ONNX Runtime should run on this machine.

    Args:
        student: The network that was exported; what every figure is compared with.
        onnx_path: Its FP32 ONNX file.
        data: Calibration and validation splits; the test split is not touched.
        section: Families, calibration, budget and timing.
        folder: Existing run folder.
        timer: FP32 file, INT8 file, batch and section -> latencies [ms] of both per round; None times them here.

    Returns:
        Per file: size, calibration, layers left in FP32 with their measured harm, agreement and accuracy; the choice.

    Raises:
        ExportError: the model can't be quantized.
        DataError: no calibration or validation inputs.
        NumericalError: an activation is not finite.

    Limits: validation inputs were taken from the source's training part, so a drop on unseen inputs can be larger; the
        scorecard measures that on test. The latency holds for this machine, at the section's batch and one thread.
    """
    reference = _refer(student, data.validation, section)
    source = _read(onnx_path, data.calibration, section)
    fp32_bytes = onnx_path.stat().st_size
    files = tuple(_make(family, source, reference, fp32_bytes, folder) for family in section.families)
    right = int((reference.logits.argmax(1).numpy() == reference.labels).sum())
    timed = time_and_choose(files, onnx_path, folder, reference.batches[0], section, timer or time_files)
    return Quantized(
        files=files,
        fp32=wilson(right, len(reference.labels)),
        fp32_size_bytes=fp32_bytes,
        calibration=sum(len(x) for x in source.calibration),
        batch=section.batch,
        **timed,
    )


def _read(onnx_path: Path, split: Split, section: QuantizeSection) -> _Source:
    content, threads = onnx_path.read_bytes(), torch.get_num_threads()
    models = {family: prepare(content, family) for family in section.families}
    calibration = _arrays(split, section.inputs)
    # TensorRT's form has all tensors of the other and a few of its own: one pass serves both.
    ranges = collect(models.get("tensorrt", models[section.families[0]]), calibration, threads=threads)
    return _Source(models, ranges, calibration, section, threads)


def _refer(student: nn.Module, split: Split, section: QuantizeSection) -> _Reference:
    batches = _arrays(split, None)
    with evaluating(student), torch.no_grad():
        logits = torch.cat([student(torch.from_numpy(x)).float() for x in batches])
    wanted = F.log_softmax(logits[: section.scored] / section.temperature, 1)
    return _Reference(batches, split.labels.numpy(), logits, wanted, section.temperature)


def _arrays(split: Split, limit: int | None) -> Batches:
    first = next(iter(split.batches(1)), None)
    if first is None:
        raise DataError("no inputs to quantize with", remedy="set data.calibration and data.validation to 1 or more")
    size = int(np.clip(_BATCH_ELEMENTS // first[0].numel(), 1, _LARGEST_BATCH))
    return [np.ascontiguousarray(x.numpy(), dtype=np.float32) for x, _ in split.batches(size, limit=limit)]


def _make(family: Family, source: _Source, reference: _Reference, fp32_bytes: int, folder: Path) -> QuantizedFile:
    """Choose the method, correct the biases, and leave layers in FP32 until the budget holds."""
    tried = {method: _build(source, reference, family, method) for method in source.section.methods}
    best = min(tried.values(), key=lambda candidate: candidate.kl)
    candidate = _corrected(source, reference, best)
    logits = _answers(candidate, reference, source.threads)
    if _drop(logits, reference)[0] > source.section.max_accuracy_drop:
        candidate = _spared(source, reference, candidate)
        logits = _answers(candidate, reference, source.threads)
    drop, interval = _drop(logits, reference)
    path = folder / FORMS[family].file
    atomic_write_bytes(path, candidate.content)
    log.info("%s: %s, KL %.2e, drop %.2f pp", path.name, candidate.method, candidate.kl, drop)
    answers = logits.argmax(1)
    return QuantizedFile(
        onnx=path.name,
        family=family,
        sha256=sha256_of_file(path),
        size_bytes=len(candidate.content),
        size_ratio=len(candidate.content) / fp32_bytes,
        layers=len(layers(source.models[family])),
        weight_bits=_weight_bits(source.section),
        excluded=candidate.excluded,
        method=candidate.method,
        method_kl={method: tried[method].kl for method in METHODS if method in tried},
        kl=candidate.kl,
        scored=len(reference.log_probabilities),
        bias_corrected=candidate.corrected,
        n=len(answers),
        agreement_pct=100.0 * float((answers == reference.logits.argmax(1)).double().mean()),
        max_abs_diff=float((logits - reference.logits).abs().max()),
        accuracy=wilson(int((answers.numpy() == reference.labels).sum()), len(answers)),
        drop_pp=drop,
        drop_ci_pp=interval,
        within_budget=drop <= source.section.max_accuracy_drop,
    )


def _build(
    source: _Source,
    reference: _Reference,
    family: Family,
    method: Method,
    *,
    excluded: tuple[FloatLayer, ...] = (),
    only: Sequence[str] = (),
) -> _Candidate:
    quantized = _inserted(source, family, method, [layer.layer for layer in excluded], only)
    return _scored(source, reference, _Candidate(family, method, np.inf, compact(quantized), excluded))


def _inserted(
    source: _Source, family: Family, method: Method, excluded: Sequence[str], only: Sequence[str] = ()
) -> Any:
    return insert(
        source.models[family],
        _ranges(source, family, method),
        FORMS[family],
        excluded=excluded,
        only=only,
        reduce_range=_weight_bits(source.section) < 8,
    )


def _weight_bits(section: QuantizeSection) -> int:
    """7 where the recipe says so, or leaves it open and 8 would overflow here (x86 without VNNI); else 8."""
    return 7 if (saturates() if section.reduce_range == "auto" else section.reduce_range) else 8


def _ranges(source: _Source, family: Family, method: Method) -> Ranges:
    signed, kept = FORMS[family].signed, source.section.percentile
    return {
        name: activation_range(histogram, method, percentile=kept, levels=128 if signed or histogram.low < 0.0 else 256)
        for name, histogram in source.ranges.items()
    }


def _scored(source: _Source, reference: _Reference, candidate: _Candidate) -> _Candidate:
    logits = _answers(candidate, reference, source.threads, limit=len(reference.log_probabilities))
    wanted = reference.log_probabilities
    return replace(candidate, kl=float(kl_rows(logits[: len(wanted)], wanted, reference.temperature).mean()))


def _answers(candidate: _Candidate, reference: _Reference, threads: int, *, limit: int | None = None) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FORMS[candidate.family].file
        path.write_bytes(candidate.content)
        runtime: Runtime = OnnxRuntime.load(path, threads=threads)
        rows: list[NDArray[np.float32]] = []
        for x in reference.batches:
            if limit is not None and sum(map(len, rows)) >= limit:
                break
            rows.append(runtime.run(x))
    return torch.from_numpy(np.concatenate(rows)).float()


def _drop(logits: Tensor, reference: _Reference) -> tuple[float, tuple[float, float]]:
    before = reference.logits.argmax(1).numpy() == reference.labels
    after = logits.argmax(1).numpy() == reference.labels
    return paired_drop(int((before & ~after).sum()), int((after & ~before).sum()), len(before))


def _corrected(source: _Source, reference: _Reference, candidate: _Candidate) -> _Candidate:
    """The candidate with biases that take up the mean shift of each layer's output, where that lowers the KL."""
    if source.section.bias_correction == "never":
        return candidate
    family, method, kept = candidate.family, candidate.method, [layer.layer for layer in candidate.excluded]
    plain, model = _inserted(source, family, method, kept), source.models[family]
    shifts = mean_shifts(model, plain, source.calibration, threads=source.threads)
    lowered, done = with_biases(model, shifts)
    content = compact(_inserted(replace(source, models={family: lowered}), family, method, kept))
    corrected = _scored(source, reference, replace(candidate, content=content, corrected=done))
    return corrected if done and corrected.kl < candidate.kl else candidate


def _spared(source: _Source, reference: _Reference, full: _Candidate) -> _Candidate:
    """The candidate with the fewest layers in FP32 that meets the budget; `full` if none does.

    Layers are ranked by the output KL when each alone is rounded, so the time is linear in their number.
    """
    names = layers(source.models[full.family])
    harms = [_build(source, reference, full.family, full.method, only=[name]).kl for name in names]
    ranked = sorted(
        (FloatLayer(layer=name, harm_kl=harm) for name, harm in zip(names, harms, strict=True)),
        key=lambda layer: -layer.harm_kl,
    )
    met: dict[int, _Candidate] = {}

    def holds(count: int) -> bool:
        plain = _build(source, reference, full.family, full.method, excluded=tuple(ranked[:count]))
        candidate = _corrected(source, reference, plain)
        drop, _ = _drop(_answers(candidate, reference, source.threads), reference)
        met[count] = candidate
        return drop <= source.section.max_accuracy_drop

    count = fewest(holds, len(names) - 1)
    return full if count is None else met[count]
