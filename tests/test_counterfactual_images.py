"""Counterfactuals of images: a planted mark is named, generators fit any size, pages escape names."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from counterfactual_sample import SMALL, turned, untrained
from torch import nn

from causal_compress.counterfactual.bias import bias_of
from causal_compress.counterfactual.contrast import contrast
from causal_compress.counterfactual.explainer import Found, find, train_counterfactuals
from causal_compress.counterfactual.generator import Critic, ImageGenerator
from causal_compress.counterfactual.page import counterfactual_page, picture_png
from causal_compress.errors import UsageError
from causal_compress.inputs.data import load_data
from causal_compress.recipe import CounterfactualSection, DataSection
from causal_compress.understand.trace import trace


def planted(side=8):
    """Images of noise; the mark in the corner says the class, and the network looks at nothing else."""
    draws = np.random.default_rng(0)
    labels = np.arange(120) % 2
    x = draws.integers(0, 200, size=(120, side, side, 1)).astype(np.uint8)
    x[:, :2, :2] = (labels * 255)[:, None, None, None]
    return x, labels


class Corner(nn.Module):
    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(1, 2, 8)
        with torch.no_grad():
            self.look.weight.zero_()
            self.look.weight[:, 0, :2, :2] = torch.tensor([-1.0, 1.0])[:, None, None]
            self.look.bias.copy_(torch.tensor([2.0, -2.0]))

    def forward(self, x):
        return self.look(x).flatten(1)


@pytest.fixture
def images(tmp_path):
    x, y = planted()
    np.savez(tmp_path / "planted.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
    return load_data(DataSection(source=f"npz:{tmp_path / 'planted.npz'}", calibration=16, validation=50), seed=0)


def test_the_bias_probe_names_a_planted_mark(images):
    network = trace(Corner(), images.example_input)
    explainer = untrained(network, images, CounterfactualSection(width=4))
    count = len(images.validation)
    x, _ = images.validation.take(range(count))
    predicted = explainer.judge(x)[1].argmax(1)
    made = x.clone()
    made[:, :, :2, :2] = 1 - made[:, :, :2, :2]  # what decides
    made[:, :, 6:, 6:] = 0.5  # what doesn't
    found = Found(x, made, predicted, 1 - predicted, 1 - predicted, torch.ones(count), ("valid",) * count)
    probe = bias_of(explainer, found, images.validation)
    assert (probe.n, probe.invalid, len(probe.pairs)) == (count, 0, 2)
    for pair in probe.pairs:
        assert pair.features[0].feature == "row 1, column 1"
        assert (pair.features[0].alone_pct, pair.features[0].needed_pct) == (100, 100)
        assert [share.alone_pct for share in pair.features[1:]] == [0]
    assert len(probe.warnings) == 2
    assert "nearly constant within each class" in probe.warnings[0]
    watched = CounterfactualSection(width=4, watch=["row 4, column 4"])  # changed, but it decides nothing
    assert len(bias_of(replace(explainer, section=watched), found, images.validation).warnings) == 2
    with pytest.raises(UsageError, match="no feature 'row 9'"):
        bias_of(replace(explainer, section=CounterfactualSection(watch=["row 9"])), found, images.validation)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 45, 30)])
def test_generator_and_critic_fit_any_size(shape):
    low, high = torch.zeros(shape[0], 1, 1) - 1, torch.zeros(shape[0], 1, 1) + 2
    generator = ImageGenerator(shape, 3, 8, low, high)
    x = torch.rand(2, *shape) * 3 - 1
    made = generator(x, torch.tensor([0, 2]))
    assert made.shape == x.shape
    assert bool((made >= -1).all())
    assert bool((made <= 2).all())
    assert generator.decode(generator.encode(x, torch.tensor([0, 2])), x).equal(made)
    score, names = Critic(shape, 3, 8)(made, torch.tensor([0, 2]))
    assert (score.shape, names.shape) == ((2,), (2, 3))


@pytest.mark.parametrize("width", [1, 5, 6, 12])
@pytest.mark.parametrize("shape", [(1, 8, 32), (3, 16, 16)])
def test_any_width_and_any_side_make_a_generator(width, shape):
    low, high = torch.zeros(shape[0], 1, 1), torch.ones(shape[0], 1, 1)
    x = torch.rand(2, *shape)
    target = torch.tensor([0, 1])
    assert ImageGenerator(shape, 3, width, low, high)(x, target).shape == x.shape
    assert Critic(shape, 3, width)(x, target)[0].shape == (2,)


def test_images_are_trained_on_and_a_page_escapes_names(images):
    network = trace(Corner(), images.example_input)
    explainer = train_counterfactuals(network, images, SMALL.model_copy(update={"steps": 8}), seed=0)
    hostile = replace(explainer, classes=("<script>alert(1)</script>", '"&'))
    x, target = turned(hostile, images.test, 1)
    found = find(hostile, x, target)
    page = counterfactual_page(hostile, found, contrast(hostile, network, found, images.test, 0))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert picture_png(hostile, found).startswith(b"\x89PNG")
    pixel = found.counterfactual * 255
    assert (pixel - pixel.round()).abs().max() < 1e-3
