"""Pictures on the page of an explanation: whole ranges of values, and effects that lie on their own patches."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from causal_compress.explain.explaining import Question, Subject, explain
from causal_compress.explain.page import Pictures, _heat, pictures_of
from causal_compress.inputs.data import Features, load_data
from causal_compress.recipe import DataSection, ExplainSection
from causal_compress.results import Attribution, FeatureEffect
from causal_compress.understand.intervene import feature_names
from causal_compress.understand.trace import trace

FEW = ExplainSection(masks=32, map_inputs=8, class_inputs=2, class_masks=16, bootstraps=20, grid=4)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def shown(folder, values):
    """The pictures of the first test input of an array of 8 x 8 images."""
    labels = np.arange(len(values)) % 2
    np.savez(folder / "images.npz", x_train=values, y_train=labels, x_test=values[:20], y_test=labels[:20])
    data = load_data(DataSection(source=f"npz:{folder / 'images.npz'}", calibration=16, validation=20), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = trace(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 2)).eval(), data.example_input)
    x, _ = data.test.take([0])
    asked = Question(data.test, x=x, name="input 0", index=0)
    local = explain(Subject("m", network, ((0,), (1,))), data, FEW, asked, seed=0).local
    assert local is not None
    return pictures_of(local, x, data, FEW), data


def test_images_that_were_normalised_when_stored_are_shown_whole(tmp_path):
    values = np.random.default_rng(0).normal(0, 1.5, size=(100, 8, 8, 1)).astype(np.float32)
    pictures, data = shown(tmp_path, values)
    found = pixels(pictures.original)
    scale = found.shape[0] // 8
    assert np.abs(found[::scale, ::scale].astype(int) - data.test.show([0])[0, ..., 0]).max() <= 1
    assert len(np.unique(found)) > 50


def test_bytes_are_shown_as_they_are(tmp_path):
    values = np.random.default_rng(0).integers(50, 150, size=(100, 8, 8, 1)).astype(np.uint8)
    pictures, data = shown(tmp_path, values)
    found = pixels(pictures.original)
    scale = found.shape[0] // 8
    assert (found[::scale, ::scale] == data.test.show([0])[0, ..., 0]).all()


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (8, 8), (4, 64)])
def test_effects_lie_on_their_patches_whatever_the_shape(height, width):
    features = Features("image", (), (), torch.zeros(1, 1, 1), torch.zeros(1, height, width))
    names = feature_names(features, (1, height, width), 8)
    told = Attribution(
        site="output",
        target="x",
        estimator="surrogate",
        features=tuple(FeatureEffect(name=name, value=1.0, low=0.0, high=1.0) for name in names),
        null_low=0.0,
        null_high=0.0,
        baselines=("mean",),
        inputs=1,
        masks=16,
    )
    content = io.BytesIO()
    Image.new("L", (2 * width, 2 * height)).save(content, "PNG")
    markup = str(_heat(told, 8, Pictures(content.getvalue(), None, None), "key"))
    wide, high = map(float, re.findall(r'<image [^>]*width="([\d.]+)" height="([\d.]+)"', markup)[0])
    assert wide / high == pytest.approx(width / height)
    cells = [
        tuple(map(float, cell))
        for cell in re.findall(r'<rect x="(.+?)" y="(.+?)" width="(.+?)" height="(.+?)"', markup)
    ]
    assert len(cells) == len(names)
    assert cells[-1][0] + cells[-1][2] == pytest.approx(wide, abs=0.3)
    assert cells[-1][1] + cells[-1][3] == pytest.approx(high, abs=0.3)
    assert sum(a * b for *_, a, b in cells) == pytest.approx(wide * high, rel=0.05)
