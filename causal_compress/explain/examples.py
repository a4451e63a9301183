"""Inputs on which teacher and student part, ready to be shown to people."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from causal_compress.explain.report import Disagreement, _config
from causal_compress.inputs.data import Data, Split


@dataclass(frozen=True, kw_only=True, config=_config)
class Examples:
    """Some validation inputs on which the two part, how many there are, and of how many."""

    disagreements: tuple[Disagreement, ...]
    disagreed: int
    inputs: int


def find_disagreements(teacher: nn.Module, student: nn.Module, data: Data, *, most: int) -> Examples:
    """Run both networks over the validation split and pick the inputs to which they give different answers.

    Args:
        teacher: Classifier in evaluation mode.
        student: The same, after compression.
        data: Its validation split is read; the test split is not.
        most: How many are kept to be shown, the first ones.
    """
    answers = []
    with torch.no_grad():
        for x, _ in data.validation.batches(250):
            answers.append(torch.stack([teacher(x).argmax(1), student(x).argmax(1)], 1))
    both = torch.cat(answers)
    parted = torch.nonzero(both[:, 0] != both[:, 1])[:, 0]
    shown = [_disagreement(data, int(index), both[index]) for index in parted[:most]]
    return Examples(disagreements=tuple(shown), disagreed=len(parted), inputs=len(both))


def _disagreement(data: Data, index: int, answers: torch.Tensor) -> Disagreement:
    names = data.classes
    is_image = data.kind == "image"
    return Disagreement(
        index=index,
        true_class=names[int(data.validation.labels[index])],
        teacher_class=names[int(answers[0])],
        student_class=names[int(answers[1])],
        image_png=picture_png(data.validation, index) if is_image else None,
        row=None if is_image else row_text(data.validation, data.features.names, index, data.features.categories),
    )


def picture_png(split: Split, index: int) -> bytes:
    """An image of a split as PNG, small ones enlarged."""
    from PIL import Image

    pixels = split.show([index])[0]
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3])
    scale = max(1, 64 // max(image.size))
    target = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(target, "PNG")
    return target.getvalue()


def row_text(split: Split, names: Sequence[str], index: int, categories: Sequence[Sequence[str]] = ()) -> str:
    """A raw row of a table with its column names.

    Args:
        split: Where the row is.
        names: Of the columns.
        index: Of the row in the split.
        categories: Each column's categories as in `Features.categories`, empty for numbers; (): all are numbers.
    """
    values = split.show([index])[0]
    known = categories or [()] * len(names)
    return ", ".join(f"{name} = {_told(value, of)}" for name, value, of in zip(names, values, known, strict=False))


def _told(value: float, categories: Sequence[str]) -> str:
    if not categories:
        return f"{value:.10g}"
    return categories[int(value)] if value >= 0 else "unknown"
