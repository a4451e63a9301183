"""The harm audit: everything in which the student differs from its teacher, measured on the same inputs."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from causal_compress.explain.corruptions import Corruption, corruptions
from causal_compress.explain.drift import attribution_drift, map_drift
from causal_compress.explain.examples import picture_png, row_text
from causal_compress.explain.paired import Numbers, Pair, Rows, answer_both, by_group, flips, mean_interval, quality
from causal_compress.explain.subgroups import gaps, group_names
from causal_compress.inputs.data import Data, Split
from causal_compress.progress import progress
from causal_compress.recipe import AuditSection
from causal_compress.results import Audit, CorruptionRow, Estimate, GroupChange, GroupGaps, Parting, Skip
from causal_compress.shrink.surgery import Student
from causal_compress.understand.trace import Network

T = TypeVar("T")


def audit(
    teacher: Network, student: Student, data: Data, section: AuditSection, *, seed: int, apart: nn.Module | None = None
) -> Audit:
    """Measure the harm that compression did: student against teacher, paired over the inputs of one split.

    Args:
        teacher: Traced, in evaluation mode.
        student: After surgery and, where there was one, distillation.
        data: Splits and features.
        section: Which split, how much of it, and what to leave out.
        seed: Of samples, masks, noise and resamples.
        apart: A second network of the teacher's task, trained apart: its attribution drift is a yardstick.

    Returns:
        Every figure with its n and interval; what was not measured is in `skipped`.

    Raises:
        DataError: nothing to audit, or `groups` names no column.
        NumericalError: logits that are not finite.

    Limits: p-values and intervals take inputs as independent draws. With many figures some are extreme by chance; only
        classes and groups are corrected for their number.
    """
    start = time.perf_counter()
    skipped: list[Skip] = []
    whole = data.test if section.split == "test" else data.validation
    split = sample(whole, section.inputs, seed)
    # Named first: a column that is not there is refused before any work is done.
    names = None if section.groups is None else group_names(data, split, section.groups, section.batch_size)
    models = (teacher.graph, student.graph)
    pair = answer_both(
        *models, progress(_batches(split, section), label="teacher and student", total=_rounds(split, section))
    )
    explained = sample(split, section.attribution_inputs, seed)
    attribution = _or_skip(attribution_drift((*models, apart), explained, data.features, section, seed=seed), skipped)
    drift, missing = map_drift(
        teacher, student, sample(split, section.map_inputs, seed), data.features, section, seed=seed
    )
    skipped.extend(missing)
    return Audit(
        split=section.split,
        n=len(split),
        classes=len(data.classes),
        overall=pair.compared(),
        per_class=_per_class(pair, data.classes, skipped),
        flips=flips(pair, data.classes),
        quality=quality(pair, section.resamples, seed),
        corruptions=tuple(_corrupted(models, data, split, section, seed, skipped)),
        groups=_gaps(pair, names, section, seed, skipped),
        attribution=attribution,
        causal_map=drift,
        gallery=_gallery(pair, data, (whole, split), section.examples),
        skipped=(*skipped, *_not_asked(section, apart)),
        seed=seed,
        seconds=time.perf_counter() - start,
    )


def sample(split: Split, most: int | None, seed: int) -> Split:
    """At most so many rows of a split, drawn at random, in the split's order; None: all."""
    if most is None or most >= len(split):
        return split
    chosen = np.sort(np.random.default_rng(seed).permutation(len(split))[:most])
    return replace(split, labels=split.labels[torch.from_numpy(chosen)], positions=split.positions[chosen])


def _batches(split: Split, section: AuditSection) -> Iterator[tuple[Tensor, Tensor]]:
    return split.batches(section.batch_size)


def _rounds(split: Split, section: AuditSection) -> int:
    return -(-len(split) // section.batch_size)


def _or_skip(found: T | Skip, skipped: list[Skip]) -> T | None:
    """What was found; a refusal goes to the others."""
    if isinstance(found, Skip):
        skipped.append(found)
        return None
    return found


def _per_class(pair: Pair, classes: tuple[str, ...], skipped: list[Skip]) -> tuple[GroupChange, ...]:
    groups: list[tuple[str, Rows]] = []
    for label, name in enumerate(classes):
        rows = np.flatnonzero(pair.labels == label)
        if len(rows):
            groups.append((name, rows))
        else:
            skipped.append(Skip(what=f"class {name}", reason="no input of this class is in the audited split"))
    return by_group(pair, groups)


def _gaps(
    pair: Pair, names: list[str] | None, section: AuditSection, seed: int, skipped: list[Skip]
) -> GroupGaps | None:
    if names is None or section.groups is None:
        skipped.append(Skip(what="gaps between groups", reason="no column was named (audit.groups)"))
        return None
    found, small = gaps(pair, names, section.groups, section.resamples, seed)
    skipped.extend(small)
    return found


def _corrupted(
    models: tuple[nn.Module, nn.Module],
    data: Data,
    split: Split,
    section: AuditSection,
    seed: int,
    skipped: list[Skip],
) -> Iterator[CorruptionRow]:
    """The untouched inputs first, then every corruption of the same inputs."""
    if not section.corruption_inputs:
        skipped.append(Skip(what="corruptions", reason="audit.corruption_inputs is 0"))
        return
    chosen = sample(split, section.corruption_inputs, seed)
    kinds = _or_skip(corruptions(data, chosen, seed), skipped)
    if kinds is None:
        return
    plain = answer_both(*models, chosen.batches(section.batch_size))
    before = _lost(plain)
    nothing = Estimate(value=0.0, low=0.0, high=0.0, n=len(chosen))
    yield CorruptionRow(
        corruption="none", severity=0, setting="as they are", compared=plain.compared(), extra_drop_pp=nothing
    )
    for kind in progress(sorted(kinds, key=_order), label="corrupted inputs", unit="corruption"):
        pair = answer_both(*models, kind.batches(chosen, section.batch_size))
        yield CorruptionRow(
            corruption=kind.name,
            severity=kind.severity,
            setting=kind.setting,
            compared=pair.compared(),
            extra_drop_pp=mean_interval(_lost(pair) - before, section.resamples, seed),
        )


def _order(kind: Corruption) -> tuple[str, int]:
    return kind.name, kind.severity


def _lost(pair: Pair) -> Numbers:
    """Teacher right minus student right, of each input [pp]."""
    right = (pair.teacher.right(pair.labels), pair.student.right(pair.labels))
    lost: Numbers = 100.0 * (right[0].astype(np.float64) - right[1].astype(np.float64))
    return lost


def _gallery(pair: Pair, data: Data, splits: tuple[Split, Split], most: int) -> tuple[Parting, ...]:
    """Where the two part the most, numbered as in the whole split, of which the second one is a sample."""
    whole, split = splits
    parted = np.flatnonzero(pair.teacher.predicted != pair.student.predicted)
    worst = parted[np.argsort(-pair.divergence[parted], kind="stable")][:most]
    numbers = {position: number for number, position in enumerate(whole.positions.tolist())}
    named = [(int(index), numbers[int(split.positions[index])]) for index in worst]
    return tuple(_parting(pair, data, split, index, number) for index, number in named)


def _parting(pair: Pair, data: Data, split: Split, index: int, number: int) -> Parting:
    is_image = data.kind == "image"
    return Parting(
        index=number,
        true_class=data.classes[pair.labels[index]],
        teacher_class=data.classes[pair.teacher.predicted[index]],
        student_class=data.classes[pair.student.predicted[index]],
        teacher_probability=float(pair.teacher.confidence[index]),
        student_probability=float(pair.student.confidence[index]),
        picture_png_base64=base64.b64encode(picture_png(split, index)).decode() if is_image else None,
        row=None if is_image else row_text(split, data.features.names, index, data.features.categories),
    )


def _not_asked(section: AuditSection, apart: nn.Module | None) -> Iterator[Skip]:
    if apart is None and section.attribution_inputs:
        reason = "no second network that was trained apart was given, so the drift between two trainings is unknown"
        yield Skip(what="attribution drift of a network trained apart", reason=reason)
    if section.split == "test":
        reason = "the audit read the test split: choose nothing by it, or its figures are no longer honest"
        yield Skip(what="an untouched test split", reason=reason)
