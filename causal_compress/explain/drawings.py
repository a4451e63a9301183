"""From results to figures: which numbers each figure of the report shows, and how it is told in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from markupsafe import Markup

from causal_compress.deploy.timing import speed_verdict
from causal_compress.explain import figures, formats, map_figures
from causal_compress.explain.svg import Caption
from causal_compress.results import Effects, Epoch, Groups, Partition, Plan, Scorecard, ScoreRow

Ranges = tuple[tuple[int, int], ...]
_FEATURES = 12
_RUNTIME_NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def settings(scorecard: Scorecard | None) -> tuple[tuple[str, tuple[ScoreRow, ...]], ...]:
    """Rows of one runtime, batch size and thread count belong side by side, under a heading."""
    groups: dict[tuple[str, int, int], list[ScoreRow]] = {}
    for row in scorecard.rows if scorecard else ():
        groups.setdefault((row.runtime, row.batch, row.threads), []).append(row)
    return tuple((setting_name(*key), tuple(rows)) for key, rows in groups.items())


def setting_name(runtime: str, batch: int, threads: int) -> str:
    """A runtime, batch size and thread count in words."""
    name = _RUNTIME_NAMES.get(runtime, runtime)
    return f"{name}, batch {batch}, {threads} thread{'' if threads == 1 else 's'}"


def node_ranges(partition: Partition) -> Ranges:
    """First and last site of each causal node."""
    return tuple((min(node), max(node)) for node in partition.nodes if node)


def top_features(effects: Effects) -> tuple[tuple[str, float, float], ...]:
    """Input features with the largest effect first; the third number is half the 95 % interval."""
    errors = (1.96 * e for e in effects.feature_ace_stderr)
    rows = zip(effects.features, effects.feature_ace, errors, strict=True)
    measured = (row for row in rows if math.isfinite(row[1]))
    return tuple(sorted(measured, key=lambda row: -row[1]))[:_FEATURES]


def latency(scorecard: Scorecard) -> Markup:
    """Median and 95th percentile of every row of the scorecard."""
    groups = [(heading, [_latency_bar(row) for row in rows]) for heading, rows in settings(scorecard)]
    desc = "Horizontal bars: median time per batch in every setting measured, with a line to the 95th percentile."
    return figures.latency_bars(Caption("fig-latency", "Time per batch, teacher and student", desc), groups)


def _latency_bar(row: ScoreRow) -> figures.Bar:
    student, median = row.model == "student", row.latency_ms_p50
    speed = f", {speed_in_words(row)}" if student else ""
    label = f"{row.model.capitalize()}, {row.precision}"
    high = max(median, row.latency_ms_p95)
    return figures.Bar(label, median, median, high, formats.ms(median) + speed, student)


def speed_in_words(student: ScoreRow) -> str:
    """How fast a student is beside its teacher, as far as the interval says that there is a difference."""
    if speed_verdict(*student.speedup_ci) == "no difference":
        return "no difference"
    return f"{formats.times(student.speedup)} as fast"


def quickest(scorecard: Scorecard | None) -> tuple[tuple[ScoreRow, bool], ...]:
    """Rows of the smallest batch and thread count, fastest first, and whether no other is both faster and as right."""
    rows = scorecard.rows if scorecard else ()
    least = min(((row.batch, row.threads) for row in rows), default=None)
    here = sorted((r for r in rows if (r.batch, r.threads) == least), key=lambda r: (r.latency_ms_p50, -r.accuracy_pct))
    best = [-math.inf, *(max(r.accuracy_pct for r in here[: i + 1]) for i in range(len(here)))]
    return tuple((row, row.accuracy_pct > before) for row, before in zip(here, best, strict=False))


def accuracy_and_time(scorecard: Scorecard) -> Markup:
    """Test accuracy against time, a numbered point for each model on each runtime; the Pareto front is joined."""
    rows = quickest(scorecard)
    front = figures.Series("", tuple((row.latency_ms_p50, row.accuracy_pct) for row, best in rows if best))
    points = [
        figures.Series(str(number), ((row.latency_ms_p50, row.accuracy_pct),), line=False, strong=best)
        for number, (row, best) in enumerate(rows, start=1)
    ]
    desc = "Test accuracy against median time per batch; the joined points are beaten by no other in both."
    caption = Caption("fig-pareto", "Accuracy against time", desc)
    return figures.plot(caption, (front, *points), ("Median time per batch [ms]", "Accuracy on the test data [%]"))


def model_name(row: ScoreRow) -> str:
    """A model, its precision and its runtime in words."""
    return f"{row.model.capitalize()}, {row.precision}, {_RUNTIME_NAMES.get(row.runtime, row.runtime)}"


def causal_map(effects: Effects, plan: Plan, ranges: Ranges) -> Markup:
    """Chain, causal nodes, ACE, and MACs before and after."""
    regions, by_site = effects.chain.regions, {node.site: node for node in effects.nodes}
    columns = []
    for region in regions:
        effect = by_site.get(region.name)
        ace, error = (effect.ace, 1.96 * effect.ace_stderr) if effect else (None, 0.0)
        columns.append(map_figures.MapColumn(ace, error, region.macs))
    spans = _spans(plan)
    desc = (
        f"{len(regions)} regions in {len(ranges)} causal nodes. Upper bars: average causal effect per site. Lower "
        "bars: MACs of the teacher, grey, and of the student as planned, in colour."
    )
    return map_figures.causal_map(Caption("fig-map", "Effect and work of every region", desc), columns, ranges, spans)


def _spans(plan: Plan) -> list[map_figures.MapSpan]:
    return [
        map_figures.MapSpan(
            d.candidate.first,
            d.candidate.last,
            d.macs_after,
            kept=d.macs_after / d.macs_before if d.macs_before else 1.0,
            changed=d.kind != "keep" or d.macs_after < d.macs_before,
        )
        for d in plan.decisions
    ]


def before_and_after(effects: Effects, plan: Plan, ranges: Ranges) -> Markup:
    """The teacher's regions in their causal nodes, and what became of them."""
    by_site = {node.site: node.ace for node in effects.nodes}
    spans = _spans(plan)
    merged = sum(span.last > span.first for span in spans)
    desc = (
        f"Above, {len(effects.chain.regions)} regions of the teacher in {len(ranges)} causal nodes, fuller where the "
        f"causal effect is larger. Below, the student's {len(spans)} parts; {merged} stand for several regions each."
    )
    shades = [by_site.get(region.name) for region in effects.chain.regions]
    caption = Caption("fig-merged", "The network before and after", desc)
    return map_figures.before_and_after(caption, shades, ranges, spans)


def input_features(effects: Effects) -> Markup:
    """The features with the largest effects."""
    bars = [
        figures.Bar(name, ace, ace - error, ace + error, formats.number(ace))
        for name, ace, error in top_features(effects)
    ]
    desc = "Horizontal bars: average causal effect of masking each input feature, largest first, with 95 % intervals."
    return figures.bar_list(Caption("fig-features", "Which parts of the input matter most", desc), bars)


def similarity(effects: Effects, ranges: Ranges) -> Markup:
    """CKA of all pairs of sites, with the causal nodes."""
    desc = "A square of shades: the stronger, the more alike two sites respond. Frames on the diagonal: causal nodes."
    return figures.heat_map(Caption("fig-cka", "Similarity of all pairs of sites (CKA)", desc), effects.cka, ranges)


def epsilon_path(groups: Groups) -> Markup:
    """The number of causal nodes at every epsilon."""
    path = [(p.epsilon_low, p.epsilon_high, len(p.nodes)) for p in groups.path]
    chosen = (groups.chosen.epsilon_low, groups.chosen.epsilon_high, len(groups.chosen.nodes))
    desc = f"Steps from many nodes at small epsilon to few at large; {chosen[2]} nodes were chosen."
    caption = Caption("fig-epsilon", "Number of nodes by tolerance", desc)
    return figures.epsilon_path(caption, path, chosen, groups.epsilon)


def front(plan: Plan, budget: float | None) -> Markup:
    """Predicted harm at every share of MACs, the plan, and the budget as a share."""
    # a point without harm (the untouched teacher) has no place on a logarithmic axis, and would flatten a linear one
    harmful = tuple((100 * p.macs, p.harm_kl) for p in plan.front if p.harm_kl > 0)
    points = figures.Series("", harmful)
    chosen = figures.Series("this plan", ((100 * plan.macs, plan.predicted_harm_kl),), line=False, strong=True)
    desc = f"Predicted harm falls as more work is kept; the plan keeps {formats.share(plan.macs)} of the MACs."
    return figures.plot(
        Caption("fig-front", "Predicted Pareto front", desc),
        (points, chosen),
        ("MACs kept [% of the teacher]", "Predicted harm [nats]"),
        guide=None if budget is None else 100 * budget,
    )


def harm(points: Sequence[tuple[float, float]]) -> Markup | None:
    """Predicted against measured harm of every decision that was carried out."""
    if not points:
        return None
    desc = f"{len(points)} decisions; points on the dashed line did exactly the harm that was predicted."
    return figures.plot(
        Caption("fig-harm", "Predicted and measured harm of each decision", desc),
        (figures.Series("", tuple(points), line=False, strong=True),),
        ("Predicted harm [nats]", "Measured harm [nats]"),
        diagonal=True,
    )


def curve(key: Literal["loss", "accuracy"], epochs: Sequence[Epoch]) -> Markup | None:
    """Loss or validation accuracy over the epochs."""
    points = tuple((float(e.epoch), e.loss if key == "loss" else e.validation_pct) for e in epochs)
    if not points:
        return None
    label = "Loss" if key == "loss" else "Validation accuracy [%]"
    first, last = formats.number(points[0][1]), formats.number(points[-1][1])
    desc = f"{first} after epoch {epochs[0].epoch}, {last} after epoch {epochs[-1].epoch}."
    series = (figures.Series("", points, strong=True),)
    return figures.plot(Caption(f"fig-{key}", f"{label} by epoch", desc), series, ("Epoch", label))
