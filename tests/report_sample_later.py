"""Made-up results of what came after compression: search, timed plan, 8 bits and the audit, with hostile names."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence

from report_sample import HOSTILE, QUOTED, accuracy, png, region, sample

from causal_compress.explain.report import ReportInput
from causal_compress.results import (
    AttributionDrift,
    Audit,
    Bisection,
    Compared,
    CorruptionRow,
    Estimate,
    FlipPath,
    Flips,
    FloatLayer,
    GroupChange,
    GroupGaps,
    LatencyTable,
    MapDrift,
    NodeDrift,
    Pareto,
    Parting,
    Quality,
    Quantized,
    QuantizedFile,
    SearchPoint,
    Skip,
    Undone,
)

NAMES = ("airplane", "automobile", "bird", HOSTILE, "deer", QUOTED, "frog", "horse", "ship", "truck")


def estimate(value: float, half: float, n: int = 2000) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def compared(teacher: float, drop: float, half: float, n: int = 1000) -> Compared:
    return Compared(
        teacher=accuracy(teacher, n),
        student=accuracy(teacher - drop, n),
        drop_pp=drop,
        drop_ci_pp=(drop - half, drop + half),
        teacher_only=31,
        student_only=12,
        p_value=0.0004 if abs(drop) > half else 0.31,
    )


def group_rows(names: Sequence[str]) -> tuple[GroupChange, ...]:
    drops = [0.4 * (i % 5) - 0.3 + (4.1 if name == QUOTED else 0.0) for i, name in enumerate(names)]
    rows = [(name, compared(93 - i % 7, drop, 1.7)) for i, (name, drop) in enumerate(zip(names, drops, strict=True))]
    return tuple(
        GroupChange(name=name, compared=both, p_holm=0.004 if both.drop_pp > 3 else 1.0) for name, both in rows
    )


def corruption(name: str, severity: int) -> CorruptionRow:
    extra = 0.5 * severity if name == "blur" else 0.1
    both = compared(93 - 9 * severity, 1.2 + extra, 1.1, 2000)
    setting = "as they are" if severity == 0 else f"level {severity}"
    return CorruptionRow(
        corruption=name, severity=severity, setting=setting, compared=both, extra_drop_pp=estimate(extra, 0.45)
    )


def gallery() -> tuple[Parting, ...]:
    return tuple(
        Parting(
            index=40 + i,
            true_class=NAMES[i % 10],
            teacher_class=NAMES[i % 10],
            student_class=NAMES[(i + 3) % 10],
            teacher_probability=0.91,
            student_probability=0.62,
            picture_png_base64=base64.b64encode(png(i)).decode("ascii"),
        )
        for i in range(7)
    )


def map_drift() -> MapDrift:
    nodes = tuple(
        NodeDrift(
            node=region(i).name,
            teacher=0.002 * 1.3**i,
            again=0.0021 * 1.3**i,
            student=0.0023 * 1.3**i,
            change=Estimate(value=0.0003 * 1.3**i, low=-0.0001 * 1.3**i, high=0.0007 * 1.3**i, n=256),
        )
        for i in (0, 3, 7, 10, 16, 20, 25, 26, 28)
    )
    return MapDrift(nodes=nodes, inputs=256, student=0.98, floor=1.0)


def attribution_drift() -> AttributionDrift:
    return AttributionDrift(
        features=16,
        masks=128,
        baseline="mean",
        student=estimate(0.71, 0.03, 64),
        floor=estimate(0.74, 0.03, 64),
        beyond_floor=estimate(0.03, 0.02, 64),
        apart=estimate(0.44, 0.04, 64),
        per_input=(0.7,) * 64,
    )


def flips() -> Flips:
    return Flips(
        n=10_000,
        both_right=9108,
        right_to_wrong=231,
        wrong_to_right=112,
        wrong_to_other_wrong=88,
        same_wrong=461,
        agreement=accuracy(95.69, 10_000),
        commonest=(FlipPath(true_class=QUOTED, teacher_class=QUOTED, student_class=HOSTILE, count=41),),
    )


def quality() -> tuple[Quality, ...]:
    rows = (
        ("overconfidence", "share", 0.0392, 0.0441, estimate(0.0049, 0.0031, 10_000)),
        ("ece", "share", 0.0392, 0.0441, None),
        ("nll", "nats an input", 0.28, 0.31, estimate(0.03, 0.01, 10_000)),
        ("brier", "0 to 2", 0.11, 0.12, estimate(0.01, 0.012, 10_000)),
    )
    return tuple(
        Quality(measure=measure, unit=unit, teacher=before, student=after, change=change)
        for measure, unit, before, after, change in rows
    )


def group_gaps() -> GroupGaps:
    return GroupGaps(
        column=HOSTILE,
        rows=group_rows(("tcp", "udp", QUOTED)),
        fewest=20,
        teacher_gap_pp=4.0,
        student_gap_pp=7.3,
        growth_pp=estimate(3.3, 1.1),
    )


def audit() -> Audit:
    kinds = ("noise", "blur", "contrast", "jpeg")
    return Audit(
        split="test",
        n=10_000,
        classes=10,
        overall=compared(93.39, 1.19, 0.31, 10_000),
        per_class=group_rows(NAMES),
        flips=flips(),
        quality=quality(),
        corruptions=(corruption("none", 0), *(corruption(kind, level) for kind in kinds for level in (1, 2, 3))),
        groups=group_gaps(),
        attribution=attribution_drift(),
        causal_map=map_drift(),
        gallery=gallery(),
        skipped=(Skip(what=f"causal effect at {HOSTILE}", reason="it lies inside a merged node"),),
        seed=0,
        seconds=212.0,
    )


def pareto() -> Pareto:
    tried = ((0.5, 0.6, 0.5), (0.25, 2.9, 0.7), (0.35, 1.6, 0.6), (0.42, 1.1, 0.55))
    points = tuple(
        SearchPoint(
            asked_macs=macs,
            macs=macs - 0.003,
            params=macs + 0.04,
            heldout_kl=0.02 / macs,
            drop_pp=drop,
            drop_ci_pp=(drop - half, drop + half),
            n=5000,
            epochs=2,
            seconds=190.0,
        )
        for macs, drop, half in tried
    )
    return Pareto(points=points, front=(0, 1, 2, 3), chosen=3, met=True, limit_pp=1.5, reason="smallest of 4 points")


def quantized() -> Quantized:
    file = QuantizedFile(
        onnx="model.int8.onnx",
        family="cpu",
        sha256="e" * 64,
        size_bytes=520_000,
        size_ratio=0.3,
        layers=41,
        excluded=(FloatLayer(layer=HOSTILE, harm_kl=0.021),),
        method="entropy",
        method_kl={"minmax": 0.012, "percentile": 0.009, "entropy": 0.007},
        kl=0.0068,
        scored=512,
        bias_corrected=("conv1",),
        n=5000,
        agreement_pct=98.9,
        max_abs_diff=0.81,
        accuracy=accuracy(92.0, 5000),
        drop_pp=0.21,
        drop_ci_pp=(-0.02, 0.44),
        within_budget=True,
    )
    return Quantized(
        files=(file,),
        fp32=accuracy(92.2, 5000),
        fp32_size_bytes=1_720_000,
        calibration=1024,
        runtime="onnxruntime",
        batch=1,
        fp32_latency_ms_p50=1.4,
        int8_latency_ms_p50=0.74,
        speedup=1.89,
        speedup_ci=(1.83, 1.94),
        rounds=120,
        chosen="int8",
        reason="it is faster and its drop stays within the budget",
    )


def full_sample() -> ReportInput:
    context = sample()
    timed = LatencyTable(
        runtime="onnxruntime", batch=1, threads=1, ms=(0.1, 0.2), teacher_ms=2.61, parts=88, seconds=41.0
    )
    return dataclasses.replace(
        context,
        plan=dataclasses.replace(context.plan, latency=0.52, latency_measured=0.55),
        pareto=pareto(),
        latency=timed,
        quantized=quantized(),
        audit=audit(),
        bisection=bisection(),
    )


def bisection() -> Bisection:
    """Two changes, the second within the noise; the first named as badly as can be."""
    worst = Undone(
        node=HOSTILE,
        kind="merge",
        what=("one stands for two",),
        ledger_harm_kl=0.02,
        harm_removed_kl=estimate(0.0213, 0.003),
        heldout_kl=0.041,
        accuracy=accuracy(94.0, 5_000),
        accuracy_gained_pp=0.42,
        accuracy_gained_ci_pp=(0.11, 0.73),
        macs_given_back=3_100_000,
        params_given_back=18_000,
    )
    other = dataclasses.replace(worst, node="layer2.1", harm_removed_kl=estimate(0.001, 0.003), accuracy_gained_pp=0.0)
    return Bisection(
        undone=(worst, other),
        skipped=(),
        notes=("refits on 512 inputs",),
        heldout_kl=0.0623,
        heldout=512,
        accuracy=accuracy(93.6, 5_000),
        macs=68_000_000,
        params=418_000,
        distilled=True,
        refit_inputs=512,
        seconds=40.0,
    )
