"""Attributions find what was planted, leave inert features in their null, and agree with references."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from causal_compress.errors import NumericalError
from causal_compress.explain.attribution import (
    Draws,
    Targets,
    attribute,
    conditional_differences,
    draw_patchworks,
    estimate,
    fit_surrogate,
    log_odds,
    neighbour_penalty,
)
from causal_compress.explain.engine import open_engine, open_scene, respond
from causal_compress.inputs.data import Features
from causal_compress.understand.intervene import feature_layout
from causal_compress.understand.trace import site_activations, trace

COLUMNS = 8


def image_features(channels=1, size=16):
    zero = torch.zeros(channels, size, size)
    return Features("image", (), (), zero, zero)


def table_features(count=COLUMNS):
    names = tuple(f"column {number}" for number in range(count))
    zero = torch.zeros(count)
    return Features("table", names, tuple((number,) for number in range(count)), zero, zero)


def linear_model(weights):
    """Two classes; the log-odds of class 1 are weights . x."""
    model = nn.Sequential(nn.Linear(len(weights), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([torch.zeros(len(weights)), torch.tensor(weights)]))
        model[0].bias.zero_()
    return model.eval()


@pytest.fixture(scope="module")
def shortcut():
    """A network trained on noise whose only hint at the class is a bright patch at row 3, column 6 of an 8 x 8 grid."""
    generator = torch.Generator().manual_seed(0)

    def batch(count):
        x = 0.5 * torch.randn(count, 1, 16, 16, generator=generator)
        y = torch.randint(0, 2, (count,), generator=generator)
        x[:, 0, 4:6, 10:12] += 2.0 * y[:, None, None]
        return x, y

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 2)
        )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        x, y = batch(64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = batch(400)
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > 0.97
    chosen = x[(y == 1) & (model(x).argmax(1) == 1)][:120]
    return trace(model, x[:2]), chosen


def test_the_shortcut_patch_is_ranked_first(shortcut):
    network, x = shortcut
    engine = open_engine(network, precision="fp32")
    found = attribute(engine, open_scene(x, image_features(), ["mean"], grid=8), masks=256)
    first = found.output.values[:, 1].argmax(1)
    assert (first == 2 * 8 + 5).float().mean() >= 0.99
    assert len(x) >= 100


def test_a_patch_far_from_the_shortcut_stays_in_its_null(shortcut):
    network, x = shortcut
    scene = open_scene(x[:20], image_features(), ["mean"], grid=8)
    found = attribute(open_engine(network, precision="fp32"), scene, masks=256, draws=Draws(30)).output
    inert = found.values[:, 1, 7 * 8]  # the lower left corner
    within = (inert >= found.null_low[:, 1]) & (inert <= found.null_high[:, 1])
    assert within.float().mean() >= 0.95
    planted = found.values[:, 1, 2 * 8 + 5]
    assert (planted > found.null_high[:, 1]).all()


def test_a_linear_model_is_found_exactly_and_its_inert_column_not_at_all():
    generator = torch.Generator().manual_seed(1)
    weights = [3.0, 0.0, 0.5, -0.5, 0.25, -0.25, 0.1, 0.0]
    network = trace(linear_model(weights), torch.randn(2, COLUMNS, generator=generator))
    x = torch.rand(200, COLUMNS, generator=generator) * 2 - 1
    x[:, 0] = x[:, 0].sign()  # present in every row
    scene = open_scene(x, table_features(), ["mean"], grid=8)
    found = attribute(open_engine(network, precision="fp32"), scene, masks=64, draws=Draws(20)).output
    torch.testing.assert_close(found.values[:, 1], x * torch.tensor(weights), atol=0.02, rtol=0)
    torch.testing.assert_close(found.values[:, 0], -found.values[:, 1], atol=1e-4, rtol=0)
    assert (found.values[:, 1].abs().argmax(1) == 0).float().mean() >= 0.99
    for inert in (1, 7):
        value = found.values[:, 1, inert]
        assert ((value >= found.null_low[:, 1]) & (value <= found.null_high[:, 1])).all()
    assert ((found.low <= found.values) & (found.values <= found.high)).all()


def test_occlusion_is_captums_feature_ablation():
    captum = pytest.importorskip("captum.attr")
    model = tiny.random_norms(tiny.Plain())
    x = tiny.images(3, 1, 4)
    engine = open_engine(trace(model, x[:2]), precision="fp32")
    scene = open_scene(x, image_features(1, 4), ["mean"], grid=2)
    ours = attribute(engine, scene, estimator="occlusion").output.values[:, 1]
    mask = feature_layout(image_features(1, 4), (1, 4, 4), 2)[None, None]
    with torch.no_grad():
        theirs = captum.FeatureAblation(lambda z: log_odds(model(z))[:, 1]).attribute(x, feature_mask=mask)
    expected = torch.stack([theirs[:, 0, r, c] for r in (0, 2) for c in (0, 2)], 1)
    torch.testing.assert_close(ours, expected.float(), atol=1e-4, rtol=1e-4)


def test_the_surrogate_is_weighted_least_squares():
    generator = np.random.default_rng(0)
    masks, weights = generator.random((40, 5)) < 0.5, generator.random(40)
    answers = generator.random((40, 2))
    design = np.concatenate([~masks, np.ones((40, 1))], 1)
    root = np.sqrt(weights)[:, None]
    expected = np.linalg.lstsq(design * root, answers * root, rcond=None)[0][:5].T
    found = fit_surrogate(
        torch.from_numpy(masks),
        torch.from_numpy(answers),
        torch.zeros(40, dtype=torch.int64),
        torch.zeros(5, 5, dtype=torch.float64),
        torch.from_numpy(weights)[None],
    )
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)


def test_differences_are_means_with_and_without():
    masks = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    answers = torch.tensor([[1.0], [4.0], [0.0], [7.0]])
    found = conditional_differences(
        masks, answers, torch.zeros(4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.float64)
    )
    assert found[0, 0].tolist() == [5.0, -1.0]


@pytest.mark.parametrize("kind", ["table", "image"])
def test_differences_find_the_sign_of_each_feature_and_nothing_in_ignored_ones(kind):
    weights = torch.zeros(64 if kind == "image" else COLUMNS)
    weights[:6] = torch.tensor([2.0, -1.0, 0.0, 3.0, 0.0, 1.0])
    model = nn.Sequential(nn.Flatten(), *linear_model(weights.tolist())).eval()
    features = image_features(1, 8) if kind == "image" else table_features()
    x = torch.ones(40, 1, 8, 8) if kind == "image" else torch.ones(40, COLUMNS)
    engine = open_engine(trace(model, x[:2]), precision="fp32")
    scene = open_scene(x, features, ["mean"], grid=8)
    found = attribute(engine, scene, masks=512, estimator="difference", targets=Targets([1]), draws=Draws(60)).output
    torch.testing.assert_close(found.values[:, 0].mean(0), weights, atol=0.15, rtol=0)
    assert (found.values[:, 0, 1] < 0).float().mean() > 0.95
    inert = found.values[:, 0][:, weights == 0]
    assert ((inert >= found.null_low) & (inert <= found.null_high)).float().mean() > 0.9


def test_baselines_of_different_level_do_not_leak_into_effects():
    generator = torch.Generator().manual_seed(0)
    layout = torch.arange(4)
    masks = torch.rand(1, 400, 4, generator=generator) < 0.5
    groups = (torch.arange(400) >= 200).long()
    masks[0, groups == 1, 3] = True  # the second baseline nearly always comes with feature 3 masked
    answers = (~masks).double() @ torch.tensor([[1.0], [0.0], [0.0], [0.0]]).double() + 50 * groups[None, :, None]
    value = estimate(masks, answers, groups, layout).values[0, 0]
    assert value.tolist() == pytest.approx([1, 0, 0, 0], abs=0.01)


def test_intervals_cover_and_nulls_hold_for_noise():
    generator = torch.Generator().manual_seed(0)
    layout = torch.arange(6)
    masks = torch.rand(60, 128, 6, generator=generator) < 0.5
    truth = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 0.0]).double()
    answers = ((~masks).double() @ truth + torch.randn(60, 128, generator=generator))[..., None]
    found = estimate(masks, answers, torch.zeros(128, dtype=torch.int64), layout, draws=Draws(60))
    covered = (found.low[:, 0] <= truth) & (truth <= found.high[:, 0])
    assert 0.88 <= covered.float().mean() <= 0.99
    inert = found.values[:, 0, 2:]
    within = (inert >= found.null_low[:, :, None][:, 0]) & (inert <= found.null_high[:, :, None][:, 0])
    assert within.float().mean() >= 0.93


def test_patchworks_have_cells_and_every_share():
    layout = feature_layout(image_features(), (1, 16, 16), 8)
    masks = draw_patchworks(4, 300, layout, torch.Generator().manual_seed(0))
    assert masks.shape == (4, 300, 64)
    share = masks.float().mean(2)
    assert share.min() < 0.1
    assert share.max() > 0.9
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    grid = masks.view(-1, 8, 8)
    alike = (grid[:, :, 1:] == grid[:, :, :-1]).float().mean()
    lone = torch.rand(1200, 64, generator=torch.Generator().manual_seed(1)) < share.view(-1, 1)
    assert alike > (lone.view(-1, 8, 8)[:, :, 1:] == lone.view(-1, 8, 8)[:, :, :-1]).float().mean() + 0.1


def test_the_penalty_counts_differences_of_neighbours():
    penalty = neighbour_penalty(feature_layout(image_features(), (1, 16, 16), 2))
    values = torch.tensor([1.0, 2.0, 4.0, 8.0]).double()
    assert float(values @ penalty @ values) == 1 + 16 + 9 + 36
    assert not neighbour_penalty(torch.arange(3)).any()


def test_log_odds_are_exact_and_finite():
    logits = torch.tensor([[1.0, 2.0, 0.0], [200.0, 0.0, 0.0]])
    odds = log_odds(logits)
    share = logits[0].double().softmax(0)
    assert odds[0].tolist() == pytest.approx(torch.log(share / (1 - share)).tolist())
    assert torch.isfinite(odds).all()


def test_the_engine_answers_as_the_network_does_whatever_the_batch():
    model, x = tiny.random_norms(tiny.Residual()), tiny.images(9, 1, 8)
    network = trace(model, x[:2])
    with torch.no_grad():
        truth = model(x)
        plain = site_activations(network, x)
    for size in (2, 64):
        engine = open_engine(network, precision="fp32", batch_size=size)
        torch.testing.assert_close(engine.answer(x), truth, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(engine.answer(x, exact=True), truth, atol=1e-5, rtol=1e-5)
        watched = engine.watch(x)
        torch.testing.assert_close(watched[1], plain[1].mean((2, 3)), atol=1e-4, rtol=1e-4)
        assert engine.spent.forwards == 27
    rough = open_engine(network, precision="bf16").answer(x)
    torch.testing.assert_close(rough.float(), truth, atol=0.02, rtol=0.02)  # eight bits a layer


def test_responses_stand_where_their_masks_stand():
    model, x = tiny.random_norms(tiny.Residual()), tiny.images(3, 1, 8)
    network, features = trace(model, x[:2]), image_features(1, 8)
    scene = open_scene(x, features, ["mean", "blur"], grid=2)
    masks = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    names = ["blur", "mean", "mean", "blur"]
    seen = respond(open_engine(network, precision="fp32", batch_size=2), scene, masks, names, sites=[0])
    for row in range(3):
        for number, name in enumerate(names):
            changed = scene.masked(torch.tensor([row]), masks[row, number][None], name)
            with torch.no_grad():
                truth = site_activations(network, changed)
            torch.testing.assert_close(seen.logits[row, number], truth[-1][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(seen.sites[0][row, number], truth[0][0].mean((1, 2)), atol=1e-4, rtol=1e-4)


def test_sites_are_attributed_too_and_results_repeat(shortcut):
    network, x = shortcut
    scene = open_scene(x[:10], image_features(), ["mean"], grid=8)
    engine = open_engine(network, precision="fp32")
    found = [attribute(engine, scene, masks=128, targets=Targets(sites=[0]), draws=Draws(0, 3)) for _ in range(2)]
    assert torch.equal(found[0].output.values, found[1].output.values)
    assert found[0].sites is not None
    assert found[0].sites.values.shape == (10, 1, 64)


def test_marginal_baselines_come_from_the_donors():
    donors = torch.full((5, COLUMNS), 7.0)
    scene = open_scene(torch.zeros(1, COLUMNS), table_features(), ["marginal"], grid=1, donors=donors)
    changed = scene.masked(torch.tensor([0]), torch.eye(COLUMNS, dtype=torch.bool)[:1], "marginal")
    assert changed.tolist() == [[7.0] + [0.0] * (COLUMNS - 1)]


def test_answers_that_are_not_finite_are_refused():
    network = trace(linear_model([1.0] * COLUMNS), torch.randn(2, COLUMNS))
    with pytest.raises(NumericalError, match="not finite"):
        open_engine(network, precision="fp32").answer(torch.full((2, COLUMNS), float("nan")))


def test_log_odds_do_not_saturate():
    assert log_odds(torch.tensor([[200.0, 0.0, 0.0]]))[0, 0].item() == pytest.approx(200 - np.log(2))
    near = torch.tensor([[60.0, 0.0], [50.0, 0.0]])
    torch.testing.assert_close(log_odds(near)[:, 0], torch.tensor([60.0, 50.0], dtype=torch.float64))


def test_masks_take_turns_with_several_donors():
    network = trace(linear_model([1.0] * COLUMNS), torch.zeros(2, COLUMNS))
    donors = torch.arange(40.0)[:, None].expand(-1, COLUMNS)
    scene = open_scene(torch.zeros(1, COLUMNS), table_features(), ["marginal"], grid=1, donors=donors)
    masks = torch.ones(1, 32, COLUMNS, dtype=torch.bool)
    engine = open_engine(network, precision="fp32", batch_size=5)
    seen = respond(engine, scene, masks, ["marginal"] * 32).logits[0, :, 1]
    assert len(seen.unique()) == 16
    assert seen[:16].equal(seen[16:])


def test_occlusion_claims_no_interval_and_no_null():
    network = trace(linear_model([1.0] * COLUMNS), torch.zeros(2, COLUMNS))
    scene = open_scene(torch.ones(2, COLUMNS), table_features(), ["mean"], grid=1)
    found = attribute(open_engine(network, precision="fp32"), scene, estimator="occlusion").output
    assert torch.isfinite(found.values).all()
    for unknown in (found.low, found.high, found.null_low, found.null_high):
        assert unknown.isnan().all()


def test_only_the_targets_that_were_asked_for_are_estimated(shortcut):
    network, x = shortcut
    scene, engine = open_scene(x[:3], image_features(), ["mean"], grid=4), open_engine(network, precision="fp32")
    both, one = (attribute(engine, scene, masks=32, targets=Targets(classes)) for classes in (None, [1]))
    assert one.output.values.shape == (3, 1, 16)
    assert one.output.values[:, 0].equal(both.output.values[:, 1])


def test_inputs_that_are_pooled_are_resampled_whole():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(1, 200, 3, generator=generator) < 0.5
    own = torch.randn(20, generator=generator).repeat_interleave(10).double()  # each input has an effect of its own
    answers = ((~masks[0, :, 0]).double() * own)[None, :, None]
    alone, whole = (
        estimate(masks, answers, torch.zeros(200).long(), torch.arange(3), draws=Draws(100, 0, together))
        for together in (1, 10)
    )
    assert (whole.high - whole.low)[0, 0, 0] > 1.4 * (alone.high - alone.low)[0, 0, 0]
