"""One counterfactual shown: a self-contained page, or one picture of original, counterfactual and difference."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from causal_compress.counterfactual.contrast import TOO_FEW
from causal_compress.counterfactual.explainer import Explainer, Found
from causal_compress.counterfactual.readable import pixels
from causal_compress.errors import UsageError
from causal_compress.explain.formats import number
from causal_compress.results import Contrast, Counterfactual

_SIDE = 176
_RISE, _FALL = np.array([11, 107, 104]), np.array([163, 38, 29])

Picture = NDArray[np.uint8]


def counterfactual_page(explainer: Explainer, found: Found, contrast: Contrast) -> str:
    """The contrast as an HTML page without network requests or scripts.

    Args:
        explainer: It made the counterfactual.
        found: Of one input.
        contrast: Of the same.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    one = contrast.counterfactual
    names = (f"original: {one.predicted_class}", f"counterfactual: {one.answered_class}", "difference")
    is_image = explainer.features.kind == "image"
    shown = [_data_url(picture) for picture in three_pictures(explainer, found)] if is_image else []
    return environment.get_template("page.html.j2").render(
        c=one,
        contrast=contrast,
        title=f"Why {one.predicted_class} and not {one.target_class}?",
        verdict=_verdict(one),
        parting=_parting(contrast),
        pictures=list(zip(names, shown, strict=True)) if shown else [],
        total_changes=max(len(one.changes), one.l0 if not is_image else 0),
        check=explainer.trained.checks[-1],
        warnings=explainer.trained.warnings,
        number=number,
    )


def three_pictures(explainer: Explainer, found: Found) -> list[Picture]:
    """Original, counterfactual and difference (green: brighter, red: darker), height x width x 3, uint8.

    Raises:
        UsageError: a table.
    """
    if explainer.features.kind != "image":
        raise UsageError(
            "a row of a table can't be shown as a picture", remedy="write FILE.html or FILE.json instead of FILE.png"
        )
    before, after = (pixels(explainer.domain, x[0]).astype(np.int16) for x in (found.x, found.counterfactual))
    change = (after - before).mean(2, keepdims=True) / 255
    white = np.full(3, 255)
    tint = np.where(change > 0, _RISE, _FALL)
    difference = white + np.abs(change) * (tint - white)
    return [_three_channels(picture) for picture in (before, after, difference)]


def picture_png(explainer: Explainer, found: Found) -> bytes:
    """Original, counterfactual and difference side by side, as PNG."""
    pictures = three_pictures(explainer, found)
    gap = np.full((pictures[0].shape[0], 2, 3), 255, dtype=np.uint8)
    return _png(np.concatenate([pictures[0], gap, pictures[1], gap, pictures[2]], axis=1))


def _verdict(one: Counterfactual) -> str:
    sure = f"{100 * one.probability:.1f} %"
    says = f"{'still' if one.answered_class == one.predicted_class else 'now'} says {one.answered_class}"
    match one.status:
        case "valid":
            return f"The network gives the changed input the class {one.target_class} ({sure})."
        case "not converged":
            return (
                f"Not converged: the network {says}, but {one.target_class} ({sure}) was rising when the search ended; "
                "more counterfactual.refine_steps may turn it."
            )
        case "invalid":
            return f"Invalid: none was found; the network {says} ({one.target_class}: {sure})."


def _parting(contrast: Contrast) -> str:
    if not contrast.sites:
        return f"{TOO_FEW[0].upper()}{TOO_FEW[1:]}."
    if contrast.parts_at is None:
        return "Nowhere: up to the output the two differ no more than real inputs of one class do."
    where = f"From the site {contrast.parts_at} on"
    return f"{where}, the counterfactual lies farther towards its target than real inputs of one class differ."


def _three_channels(picture: NDArray[np.int16] | NDArray[np.float64]) -> Picture:
    shown = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return np.repeat(shown[..., :1], 3, axis=2) if shown.shape[2] < 3 else shown[..., :3]


def _data_url(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(picture)).decode()


def _png(picture: Picture) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture)
    scale = max(1, _SIDE // image.height)
    target = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(target, "PNG")
    return target.getvalue()
