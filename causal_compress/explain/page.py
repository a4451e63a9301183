"""One explanation as a page that a person can read: no script, no request, every figure with its table."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from causal_compress.explain import formats, svg
from causal_compress.explain.causal_map import as_graph
from causal_compress.explain.engine import DONOR_ROWS, open_scene
from causal_compress.explain.svg import Caption
from causal_compress.inputs.data import Data
from causal_compress.inputs.images import ImageRows
from causal_compress.recipe import ExplainSection
from causal_compress.results import (
    Attribution,
    CausalMap,
    Explanation,
    FeatureEffect,
    LocalExplanation,
    MapEdge,
    MapNode,
    MinimalSet,
)

_BARS, _SIDE = 12, 256


@dataclass(frozen=True)
class Pictures:
    """PNG files of an input: as it is, and with its sufficient set kept, its necessary set taken away."""

    original: bytes
    sufficient: bytes | None
    necessary: bytes | None


def pictures_of(local: LocalExplanation, x: Tensor, data: Data, section: ExplainSection, *, seed: int = 0) -> Pictures:
    """The input and its two minimal sets, as pictures.

    Args:
        local: The explanation, with the sets.
        x: The input (1, channels, height, width), normalised.
        data: Features, and how images were normalised.
        section: Grid and baselines.
        seed: Of the explanation: the same donor stands in for what is masked.
    """
    donors, _ = next(data.calibration.batches(DONOR_ROWS))
    stored = _stored(x[0], data)
    ends = min(0.0, float(stored.min())), max(1.0, float(stored.max()))  # floats may have been normalised already
    scene = open_scene(x, data.features, section.baselines[:1], grid=section.grid, donors=donors, seed=seed)

    def shown(found: MinimalSet) -> bytes | None:
        if not found.found:
            return None
        mask = torch.zeros(1, found.of, dtype=torch.bool)
        mask[0, list(found.positions)] = True
        mask = ~mask if found.kind == "sufficient" else mask
        return _png(scene.masked(torch.zeros(1, dtype=torch.int64), mask, section.baselines[0])[0], data, ends)

    return Pictures(_png(x[0], data, ends), shown(local.sufficient), shown(local.necessary))


def _stored(image: Tensor, data: Data) -> Tensor:
    """A normalised image as it was before, in [0, 1] unless it was stored otherwise."""
    rows = data.validation.rows
    assert isinstance(rows, ImageRows)
    mean, std = rows.preparation.mean, rows.preparation.std
    image = image if std is None else image * torch.tensor(std).view(-1, 1, 1)
    return image if mean is None else image + torch.tensor(mean).view(-1, 1, 1)


def _png(image: Tensor, data: Data, ends: tuple[float, float]) -> bytes:
    """A normalised image; `ends`: the stored values that become black and white."""
    from PIL import Image

    unit = (_stored(image, data) - ends[0]) / (ends[1] - ends[0])
    pixels = (unit.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3])
    scale = max(1, _SIDE // max(picture.size))
    target = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(target, "PNG")
    return target.getvalue()


def explanation_page(title: str, explanations: Sequence[Explanation], pictures: Sequence[Pictures | None]) -> str:
    """The explanations as one HTML page.

    Args:
        title: What was explained.
        explanations: One for each network.
        pictures: Of the input, for each network; None without an image.

    Returns:
        HTML; every name in it is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=formats.number, span=_span, seconds=formats.seconds, pct=formats.pct, base64=_base64
    )
    views = [_view(number, *pair) for number, pair in enumerate(zip(explanations, pictures, strict=True))]
    return environment.get_template("explain.html.j2").render(title=title, views=views)


def _span(one: FeatureEffect | MapNode | MapEdge) -> str:
    """An interval; a dash where there is none."""
    return f"{formats.number(one.low)} to {formats.number(one.high)}" if math.isfinite(one.low) else formats.MISSING


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _view(number: int, explanation: Explanation, pictures: Pictures | None) -> dict[str, object]:
    local = explanation.local
    shown = local.causal_map if local else explanation.causal_map
    return {
        "e": explanation,
        "key": f"n{number}",
        "pictures": pictures,
        "graph": map_figure(shown, f"map-{number}"),
        "map": shown,
        "whole_graph": map_figure(explanation.causal_map, f"whole-{number}") if local else None,
        "decided": effect_bars(local.output[0], f"decided-{number}") if local else None,
        "heat": _heat(local.output[0], explanation.grid, pictures, f"heat-{number}") if local else None,
        "top": [(a, _largest(a)) for a in (local.output if local else explanation.classes)],
        "nodes": [(a, _largest(a)[:3]) for a in local.nodes] if local else [],
    }


def _largest(attribution: Attribution) -> tuple[object, ...]:
    return tuple(sorted(attribution.features, key=lambda feature: -abs(feature.value))[:_BARS])


def effect_bars(attribution: Attribution, key: str) -> Markup:
    """Largest effects for and against, with intervals, on one scale; the band is the null."""
    largest = sorted(attribution.features, key=lambda feature: -abs(feature.value))[:_BARS]
    null = (attribution.null_low, attribution.null_high)
    ends = [value for feature in largest for value in (feature.value, feature.low, feature.high)]
    axis = svg.make_axis([0.0, *filter(math.isfinite, (*null, *ends))], 200, 560)
    height = 24.0 * len(largest)
    parts = []
    if math.isfinite(null[0]):  # without masks drawn at random there is none
        parts.append(svg.rect(axis.at(null[0]), 0, axis.at(null[1]) - axis.at(null[0]), height, "band"))
    parts.append(svg.line(axis.at(0), 0, axis.at(0), height, "rule"))
    for row, feature in enumerate(largest):
        y, zero, end = 24.0 * row, axis.at(0), axis.at(feature.value)
        parts += [
            svg.text(190, y + 15, feature.name[:28], anchor="end"),
            svg.rect(min(zero, end), y + 4, abs(end - zero), 14, "pale" if feature.value > 0 else "base"),
            svg.text(570, y + 15, formats.signed(feature.value)),
        ]
        if math.isfinite(feature.low):
            parts.append(svg.line(axis.at(feature.low), y + 11, axis.at(feature.high), y + 11, "whisker"))
    words = "Bars to the right speak for the answer, to the left against it; the shaded band is the null."
    return svg.document(Caption(key, f"Effect of the features on {attribution.target}", words), 640, height + 4, parts)


def _heat(attribution: Attribution, grid: int | None, pictures: Pictures | None, key: str) -> Markup | None:
    """Patches coloured by their effect, over the picture."""
    from PIL import Image

    if grid is None or pictures is None:
        return None
    wide, high = Image.open(io.BytesIO(pictures.original)).size
    width, height = _SIDE * wide / max(wide, high), _SIDE * high / max(wide, high)
    values = [feature.value for feature in attribution.features]
    right = max(int(feature.name.rpartition(" ")[2]) for feature in attribution.features)
    most, across, down = max(map(abs, values)) or 1.0, width / right, height / (len(values) // right)
    parts = [
        Markup('<image href="data:image/png;base64,{}" width="{}" height="{}"/>').format(
            _base64(pictures.original), width, height
        )
    ]
    for number, value in enumerate(values):
        row, column = divmod(number, right)
        style = "cell" if value > 0 else "against"
        parts.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}" fill-opacity="{:.3f}"/>'
            ).format(column * across, row * down, across, down, style, 0.75 * abs(value) / most)
        )
    words = "Strong colour: the patch speaks for the answer (accent) or against it (grey)."
    return svg.document(Caption(key, "Where the answer comes from", words), width, height, parts)


def map_figure(found: CausalMap, key: str) -> Markup:
    """Nodes from the input (left) to the answer (right): height of the disc's column is ACE, lines are what flows."""
    graph = as_graph(found)
    step = 840 / max(2, len(found.nodes) + 1)
    most = max((v for node in found.nodes for v in (node.ace, node.high) if math.isfinite(v)), default=1.0) or 1.0
    place = {-1: (20.0, 200.0)} | {node.index: (20 + step * (node.index + 1), 200.0) for node in found.nodes}
    parts = []
    for source, target, edge in graph.edges(data=True):
        (x1, y), (x2, _) = place[source], place[target]
        width = max(0.4, 6 * min(1.0, abs(edge["share"])))
        bow = 0 if edge["kind"] == "through" else 46
        parts.append(
            Markup('<path d="M{:.1f} {:.1f}Q{:.1f} {:.1f} {:.1f} {:.1f}" class="edge" stroke-width="{:.2f}"/>').format(
                x1, y, (x1 + x2) / 2, y + bow, x2, y, width
            )
        )
    parts.append(svg.text(0, 14, "Causal effect of each node [nats], with 95 % interval", css="strong"))
    for node in found.nodes:
        x, y = place[node.index]
        top, width = 160 * node.ace / most, min(26.0, step * 0.6)
        parts += [
            svg.rect(x - width / 2, y - 12 - top, width, top, "pale"),
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5" class="dot strong"/>').format(x, y),
        ]
        if math.isfinite(node.low):
            parts.append(svg.whisker(x, y - 12 - 160 * max(0.0, node.low) / most, y - 12 - 160 * node.high / most))
        if len(found.nodes) <= 16 or node.index % (len(found.nodes) // 12 + 1) == 0:
            parts.append(svg.text(x, 264, str(node.index + 1), anchor="middle"))
    parts += [svg.text(20, 264, "input", anchor="middle" if step > 60 else "start")]
    words = "Lines join nodes: straight what flows through the earlier node, bent what flows around the one between."
    return svg.document(Caption(key, f"Causal map: {found.scope}", words), 880, 272, parts)
