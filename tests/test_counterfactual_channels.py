"""Counterfactuals of images whose channels are not three colours: copies of a grey one, two, or a constant one."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from counterfactual_sample import SMALL, turned, untrained
from PIL import Image
from torch import nn

from causal_compress.counterfactual.constraints import domain_of, project, straight_through, violations
from causal_compress.counterfactual.explainer import find, train_counterfactuals
from causal_compress.counterfactual.folder import load_explainer, save_explainer
from causal_compress.counterfactual.page import _verdict, picture_png
from causal_compress.inputs.data import load_data
from causal_compress.recipe import CounterfactualSection, DataSection, NormalizeSection
from causal_compress.results import Counterfactual
from causal_compress.understand.trace import trace


class Mean(nn.Module):
    """Class 1 where the corner is bright in the mean over channels, the first of which weighs most."""

    def __init__(self, channels):
        super().__init__()
        self.look = nn.Conv2d(channels, 4, 8)
        self.last = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.look.weight.fill_(0)
            self.look.bias.zero_()
            self.look.weight[:2, :, :4, :4] = 0.02 * torch.arange(channels, 0, -1)[None, :, None, None]
            self.look.bias[1] = -0.4 * float(self.look.weight[0].sum())
            self.last.weight.fill_(0)
            self.last.bias.zero_()
            self.last.weight[1, 1], self.last.weight[0, 1] = 9.0, -9.0

    def forward(self, x):
        return self.last(self.look(x)).flatten(1)


def images(folder, values, **section):
    count = len(values)
    path = folder / "images.npz"
    labels = np.arange(count) % 2
    np.savez(path, x_train=values, y_train=labels, x_test=values[:40], y_test=labels[:40])
    return load_data(DataSection(source=f"npz:{path}", calibration=16, validation=40, **section), seed=0)


def noise(channels, dtype=np.uint8):
    draws = np.random.default_rng(0).integers(0, 255, size=(120, 8, 8, channels))
    draws[:, :4, :4] = np.where(np.arange(120) % 2, 180, 20)[:, None, None, None]
    return draws.astype(dtype)


@pytest.fixture
def grey(tmp_path):
    """Grey images for a network of three channels, each of which is normalised in its own way."""
    normalize = NormalizeSection(mean=[0.3, 0.4, 0.5], std=[0.2, 0.3, 0.4])
    return images(tmp_path, noise(1), channels=3, normalize=normalize)


def raw(domain, x):
    return x * domain.scale + domain.offset


def test_a_projection_of_a_grey_image_is_grey(grey):
    domain = domain_of(grey, CounterfactualSection())
    x, _ = grey.test.take(range(20))
    assert not violations(domain, x, x).any()
    proposed = (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    made = project(domain, x, proposed.detach())
    assert (made != x).any()
    assert (raw(domain, made) - raw(domain, made)[:, :1]).abs().max() < 1e-5
    assert not violations(domain, x, made).any()
    assert project(domain, x, made).equal(made)
    through = straight_through(domain, x, proposed)
    assert through.detach().allclose(made)
    (slope,) = torch.autograd.grad(through[:, 0].sum(), proposed)
    assert (slope > 0).all()  # what the first channel becomes hangs on all three


def test_colour_in_a_grey_image_is_a_violation(grey):
    domain = domain_of(grey, CounterfactualSection())
    x, _ = grey.test.take([0])
    made = x.clone()
    made[0, 0, 0, 0] = project(replace(domain, copied=torch.tensor(False)), x, x + 0.5)[0, 0, 0, 0]
    found = violations(domain, x, made)
    assert found.any()
    assert not violations(replace(domain, copied=torch.tensor(False)), x, made).any()


def test_counterfactuals_of_grey_images_are_grey_and_stay_so_in_a_folder(grey, tmp_path):
    network = trace(Mean(3), grey.example_input)
    section = CounterfactualSection(width=4, refine_steps=60)
    explainer = untrained(network, grey, section)
    save_explainer(explainer, tmp_path / "made")
    x, target = turned(explainer, grey.test, 20)
    for one in (explainer, load_explainer(tmp_path / "made", network)):
        found = find(one, x, target)
        shown = raw(one.domain, found.counterfactual)
        assert (found.counterfactual != x).any()
        assert (shown - shown[:, :1]).abs().max() < 1e-5
        assert not violations(one.domain, x, found.counterfactual).any()


def test_training_makes_grey_images_too(grey):
    network = trace(Mean(3), grey.example_input)
    explainer = train_counterfactuals(network, grey, SMALL.model_copy(update={"steps": 4}), seed=0)
    x, target = turned(explainer, grey.test, 8)
    found = find(explainer, x, target)
    shown = raw(explainer.domain, found.counterfactual)
    assert (shown - shown[:, :1]).abs().max() < 1e-5
    assert not violations(explainer.domain, x, found.counterfactual).any()


def test_a_channel_that_is_constant_stays_so(tmp_path):
    values = np.concatenate([noise(1) / 255, np.full((120, 8, 8, 1), 0.5)], 3).astype(np.float32)
    data = images(tmp_path, values)
    network = trace(Mean(2), data.example_input)
    explainer = train_counterfactuals(network, data, SMALL.model_copy(update={"steps": 8}), seed=0)
    x, target = turned(explainer, data.test, 20)
    found = find(explainer, x, target)
    assert torch.isfinite(found.counterfactual).all()
    assert (found.counterfactual != x)[:, 0].any()
    assert found.counterfactual[:, 1].equal(x[:, 1])


def test_two_channels_are_shown_by_the_first(tmp_path):
    data = images(tmp_path, noise(2))
    network = trace(Mean(2), data.example_input)
    explainer = untrained(network, data, CounterfactualSection(width=4))
    x, target = turned(explainer, data.test, 1)
    picture = Image.open(io.BytesIO(picture_png(explainer, find(explainer, x, target))))
    first = data.test.show([0])[0, ..., 0]
    scale = picture.height // 8
    shown = np.asarray(picture)[::scale, : 8 * scale : scale]
    assert (shown == first[..., None]).all()


@pytest.mark.parametrize(("answered", "wanted"), [("3", "still says 3"), ("5", "now says 5")])
@pytest.mark.parametrize("status", ["invalid", "not converged"])
def test_a_third_class_was_not_said_before(answered, wanted, status):
    sizes = {"probability": 0.1, "l1": 1.0, "l2": 1.0, "l0": 1, "positions": 64, "violations": 0, "changes": ()}
    names = {"true_class": "3", "predicted_class": "3", "target_class": "8", "answered_class": answered}
    assert f"the network {wanted}" in _verdict(Counterfactual(index=0, status=status, **names, **sizes))
