"""Made-up results of a run on a ResNet-56-like chain, with hostile class names, for the report's tests."""

from __future__ import annotations

import math
import struct
import zlib

from causal_compress.explain.report import Disagreement, ReportInput
from causal_compress.recipe import BudgetSection, DistillSection, Recipe, ReportSection
from causal_compress.results import (
    Accuracy,
    Candidate,
    Candidates,
    Chain,
    Change,
    Decision,
    Distilled,
    Effects,
    Epoch,
    Evidence,
    Exported,
    FrontPoint,
    Groups,
    Log,
    NodeEffect,
    Parity,
    Partition,
    Plan,
    Provenance,
    RegionInfo,
    Scorecard,
    ScoreRow,
    Skip,
    StageRecord,
    Surgery,
    TeacherScore,
)

HOSTILE = "<script>alert(1)</script>"
QUOTED = "\"'><img src=x onerror=alert(1)>{{ 7*7 }}"
LEVELS = 30
SPANS = ((0, 0), (1, 2), (3, 5), (6, 7), (8, 9), (10, 10), (11, 13), (14, 16), (17, 18), (19, 19), (20, 22), (23, 24))
SPANS += tuple((i, i) for i in range(25, LEVELS))


def region(i: int) -> RegionInfo:
    stage = min(2, i * 3 // LEVELS)
    name = "conv1" if i == 0 else "linear" if i == LEVELS - 1 else f"layer{stage + 1}.{i % 9}"
    macs = 650 if i == LEVELS - 1 else 4_720_000 + 1000 * i
    shape = (16 * 2**stage, 32 >> stage, 32 >> stage)
    return RegionInfo(
        index=i,
        name=f"{name}#{i}",
        modules=(name,),
        input_shape=shape,
        output_shape=shape,
        macs=macs,
        params=4600 * 4**stage,
    )


def cka(i: int, j: int) -> float:
    return math.exp(-abs(i - j) / 6) * (0.8 if i * 3 // LEVELS != j * 3 // LEVELS else 1.0)


def effects() -> Effects:
    regions = tuple(region(i) for i in range(LEVELS))
    matrix = tuple(tuple(cka(i, j) for j in range(LEVELS)) for i in range(LEVELS))
    return Effects(
        chain=Chain(regions=regions, untraced=(Skip(what=HOSTILE, reason="its control flow hangs on the data"),)),
        nodes=tuple(
            NodeEffect(
                site=r.name, ace=0.05 + 0.4 * math.sin(r.index / 9) ** 2, ace_stderr=0.012, kl=0.3, kl_stderr=0.01
            )
            for r in regions
        ),
        features=tuple(f"row {r}, column {c}" for r in range(1, 5) for c in range(1, 5)),
        feature_ace=(*tuple(0.4 - abs(7.5 - k) * 0.04 for k in range(15)), float("nan")),
        feature_ace_stderr=(0.02,) * 16,
        baselines=("mean", "marginal"),
        inputs=2048,
        interventions=8192,
        forwards=10240,
        forward_seconds=41.2,
        analysis_seconds=12.8,
        cka=matrix,
        cka_null=matrix,
        hsic_bins=(),
    )


def groups() -> Groups:
    partitions = []
    for count, low, high in ((30, 0.0, 0.05), (22, 0.05, 0.12), (17, 0.12, 0.31), (9, 0.31, 0.42), (3, 0.42, 0.9)):
        edges = [round(k * LEVELS / count) for k in range(count + 1)]
        nodes = SPANS if count == 17 else tuple(zip(edges[:-1], [e - 1 for e in edges[1:]], strict=True))
        partitions.append(
            Partition(
                epsilon_low=low,
                epsilon_high=high,
                nodes=tuple(tuple(range(a, b + 1)) for a, b in nodes),
                stability_ari=0.93,
                stability_low=0.84,
            )
        )
    return Groups(
        sites=tuple(region(i).name for i in range(LEVELS)),
        epsilon=0.2,
        chosen=partitions[2],
        path=tuple(partitions),
        fisher=partitions[2].nodes,
        null_cka_mean=0.002,
        null_cka_max=0.011,
        inputs=2048,
        stable=True,
    )


def decision(first: int, last: int) -> Decision:
    merged = last > first
    kind = "merge+narrow" if merged else ("keep" if first % 2 else "narrow")
    before = sum(region(i).macs for i in range(first, last + 1))
    candidate = Candidate(
        first=first,
        last=last,
        representative=first,
        adapter=None,
        inputs_kept=1.0,
        widths={} if kind == "keep" else {f"layer1.{first}.conv1": 8},
        macs_fixed=0.0,
        macs_out=before * 0.5,
        params_fixed=0.0,
        params_out=2300.0,
        harm_kl=0.002 * (first + 1),
        harm_stderr=0.0002,
        relative_error=0.08,
    )
    return Decision(
        node=", ".join(region(i).name for i in range(first, last + 1)),
        kind=kind,
        candidate=candidate,
        outputs_kept=1.0,
        evidence=Evidence(cka=0.93, same_node_share=0.88, ace=0.2, relative_error=0.08),
        predicted_harm_kl=0.0 if kind == "keep" else 0.002 * (first + 1),
        macs_before=before,
        macs_after=before if kind == "keep" else int(before * (0.35 if merged else 0.6)),
        params_before=4600,
        params_after=2300,
        refused=tuple(Skip(what=f"width {w}", reason="harm 0.31 nats is above the budget") for w in range(9)),
    )


def plan() -> Plan:
    decisions = tuple(decision(*span) for span in SPANS)
    front = tuple(FrontPoint(macs=m / 100, params=m / 110, harm_kl=3 * math.exp(-m / 14)) for m in range(12, 100, 2))
    skipped = (Skip(what="linear", reason="the classifier is protected"),)
    return Plan(decisions=decisions, macs=0.542, params=0.49, predicted_harm_kl=0.071, front=front, skipped=skipped)


def accuracy(pct: float, n: int = 2000) -> Accuracy:
    return Accuracy(pct=pct, n=n, low_pct=pct - 1.1, high_pct=pct + 1.0)


def log(stage: str, pct: float, harm: float) -> Log:
    changes = tuple(
        Change(
            node=d.node,
            what=f"regions {d.candidate.first} to {d.candidate.last}: last convolution solved anew",
            evidence=d.evidence,
            predicted_harm_kl=d.predicted_harm_kl,
            measured_harm_kl=d.predicted_harm_kl * (0.8 + 0.1 * (d.candidate.first % 5)),
            relative_error=0.081,
            penalty=1e-3,
        )
        for d in plan().decisions
        if ("merge" in d.kind) == (stage == "rewrite") and d.kind != "keep"
    )
    skipped = (Skip(what="batch-norm re-estimation", reason="held-out KL rose from 0.071 to 0.079"),)
    return Log(
        stage=stage,
        surgery=Surgery(),
        changes=changes,
        skipped=skipped,
        heldout_kl=harm,
        validation=accuracy(pct),
        macs=68_000_000,
        params=418_000,
    )


def distilled() -> Distilled:
    epochs = tuple(
        Epoch(
            epoch=e,
            loss=1.2 * math.exp(-e / 5) + 0.31,
            learning_rate=0.05 / e,
            validation_pct=93.1 - 3 / e,
            seconds=61.0,
        )
        for e in range(1, 16)
    )
    return Distilled(
        epochs=epochs,
        validation=accuracy(93.0),
        images_per_second=912.4,
        precision="bf16",
        averaged=True,
        compiled=False,
        device="cpu",
        processes=1,
    )


def score_row(model: str, runtime: str, batch: int, ms: float) -> ScoreRow:
    student = model == "student"
    return ScoreRow(
        model=model,
        runtime=runtime,
        precision="fp32",
        batch=batch,
        threads=1,
        accuracy_pct=92.2 if student else 93.39,
        n=10_000,
        drop_pp=1.19 if student else 0.0,
        drop_ci_pp=(0.88, 1.5) if student else (0.0, 0.0),
        params=418_000 if student else 853_000,
        macs=68_000_000 if student else 125_500_000,
        size_bytes=1_720_000 if student else 3_490_000,
        latency_ms_p50=ms,
        latency_ms_p95=ms * 1.12,
        latency_ms_p99=ms * 1.3,
        throughput_per_s=1000 * batch / ms,
        peak_memory_bytes=88_000_000,
        speedup=2.04 if student else 1.0,
        speedup_ci=(1.98, 2.1) if student else (1.0, 1.0),
    )


def scorecard() -> Scorecard:
    measured = (("torch", 1, 6.1), ("torch", 64, 180.0), ("onnxruntime", 1, 2.86), ("onnxruntime", 64, 171.0))
    rows = [
        score_row(model, runtime, batch, ms / (2.04 if model == "student" else 1))
        for runtime, batch, ms in measured
        for model in ("teacher", "student")
    ]
    reasons = (
        "MACs: 54 % of the teacher's, at most 55 % were allowed.",
        "Accuracy drop: 1.19 points (95 % interval 0.88 to 1.50), at most 1.50 was allowed.",
    )
    return Scorecard(
        verdict="PASS",
        reasons=reasons,
        notes=("One thread pinned; other load on the machine was low.",),
        rows=tuple(rows),
        runtimes=("onnxruntime 1.31",),
    )


def provenance() -> Provenance:
    costs = (
        ("trace", 0.8),
        ("intervene", 54.0),
        ("group", 2.1),
        ("plan", 212.0),
        ("rewrite", 66.0),
        ("prune", 71.0),
        ("distill", 930.0),
        ("export", 9.0),
        ("benchmark", 44.0),
    )
    stages = tuple(
        StageRecord(
            stage=s, key="k", files={}, seconds=t, peak_memory_bytes=910_000_000, started="2026-01-01T00:00:00Z"
        )
        for s, t in costs
    )
    return Provenance(
        command=("causal-compress", "compress", "--recipe", "resnet.yaml"),
        recipe_sha256="a" * 64,
        checkpoint_sha256="b" * 64,
        data_sha256="c" * 64,
        versions={"python": "3.11", "torch": "2.14.1", "onnxruntime": "1.31"},
        machine={"cpu": "a CPU", "cores": 2, "memory_bytes": 8_000_000_000},
        seed=0,
        stages=stages,
    )


def png(i: int, side: int = 32) -> bytes:
    """A small colour image, written by hand so that the test needs no imaging package."""
    rows = b"".join(
        b"\0"
        + bytes((x * 7 + i * 40) % 256 if c == i % 3 else (y * 6 + x * c) % 256 for x in range(side) for c in range(3))
        for y in range(side)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def disagreements() -> tuple[Disagreement, ...]:
    """Seven images, and a row of a table."""
    names = ("airplane", "cat", "dog", "ship", HOSTILE, QUOTED)
    examples = [
        Disagreement(
            index=17 * i,
            true_class=names[i % 6],
            teacher_class=names[i % 6],
            student_class=names[(i + 1) % 6],
            image_png=png(i),
        )
        for i in range(7)
    ]
    examples.append(
        Disagreement(
            index=3,
            true_class="cat",
            teacher_class="dog",
            student_class="cat",
            row=f"duration = 0\nservice = {HOSTILE}",
        )
    )
    return tuple(examples)


def recipe() -> Recipe:
    return Recipe(
        budget=BudgetSection(macs=0.55, params=None, max_accuracy_drop=1.5),
        distill=DistillSection(),
        report=ReportSection(title="ResNet-56 on CIFAR-10"),
    )


def teacher() -> TeacherScore:
    return TeacherScore(
        accuracy=accuracy(93.3),
        chance_pct=10.0,
        macs=125_500_000,
        params=853_000,
        size_bytes=3_480_000,
        classes=10,
    )


def candidates() -> Candidates:
    return Candidates(
        rows=tuple(d.candidate for d in plan().decisions),
        cut_groups={},
        regions=LEVELS,
        macs=125_500_000,
        params=853_000,
        skipped=(),
        inputs=512,
        heldout=256,
        seconds=200.0,
    )


def exported() -> Exported:
    parity = Parity(inputs=512, max_abs_diff=3.1e-6, agreement_pct=100.0, batches=(1, 7, 256))
    return Exported(
        onnx="model.onnx",
        opset=18,
        size_bytes=1_720_000,
        sha256="d" * 64,
        parity=parity,
        pt2="model.pt2",
        pt2_parity=parity,
        teacher_onnx="teacher.onnx",
        nodes_before=204,
        nodes_after=131,
    )


def sample() -> ReportInput:
    return ReportInput(
        recipe=recipe(),
        provenance=provenance(),
        teacher=teacher(),
        effects=effects(),
        groups=groups(),
        candidates=candidates(),
        plan=plan(),
        rewritten=log("rewrite", 91.6, 0.048),
        pruned=log("prune", 91.0, 0.069),
        distilled=distilled(),
        exported=exported(),
        scorecard=scorecard(),
        disagreements=disagreements(),
        disagreed=(431, 10_000),
    )
