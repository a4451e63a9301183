"""Interventions and their effects, on networks whose answers are computed by hand."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import Tensor, nn

from causal_compress.errors import DataError, NumericalError
from causal_compress.inputs.data import Features
from causal_compress.recipe import GroupSection, InterveneSection
from causal_compress.results import Effects
from causal_compress.understand.effect import effect_terms, units
from causal_compress.understand.group import group
from causal_compress.understand.intervene import (
    apply,
    baseline_values,
    draw_masks,
    feature_layout,
    feature_names,
    intervene,
    intervene_batch,
    intervened,
)
from causal_compress.understand.observe import random_init_control
from causal_compress.understand.trace import Network, site_activations, trace


@dataclass(frozen=True)
class Rows:
    """The part of a split that the analysis uses."""

    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.x[:limit].split(batch_size):
            yield part, torch.zeros(len(part), dtype=torch.int64)


@dataclass(frozen=True)
class Noise:
    """Images drawn when they are asked for; notes how much memory the process holds meanwhile."""

    rows: int
    resident: list[int]

    def __len__(self) -> int:
        return self.rows

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.rows, batch_size):
            self.resident.append(psutil.Process().memory_info().rss)
            yield random(batch_size, 3, 16, 16, seed=start), torch.zeros(batch_size, dtype=torch.int64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(width: int) -> Features:
    return Features(
        kind="table",
        names=tuple(f"c{i}" for i in range(width)),
        columns=tuple((i,) for i in range(width)),
        zero=torch.zeros(width),
        mean=torch.full((width,), 0.5),
    )


def images(channels: int = 3, side: int = 8) -> Features:
    shape = (channels, side, side)
    return Features(kind="image", names=(), columns=(), zero=torch.full(shape, -2.0), mean=torch.full(shape, 0.5))


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    return layer


def small_cnn(side: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(16 * side * side, 4),
        )


def run(model: nn.Module, x: Tensor, features: Features, *, seed: int = 0, **section: object) -> Effects:
    section = {"batch_size": 64, "baselines": ["zero"], **section}
    return intervene(trace(model, x[:2]), Rows(x), features, InterveneSection(**section), seed=seed)


def test_patches_cover_an_image_that_is_not_divisible() -> None:
    assert feature_layout(images(), (3, 5, 4), 2).tolist() == [[0, 0, 1, 1]] * 3 + [[2, 2, 3, 3]] * 2
    assert feature_layout(images(), (3, 2, 2), 4).tolist() == [[0, 1], [2, 3]]  # never more patches than pixels
    assert feature_names(images(), (3, 2, 2), 4)[2] == "row 2, column 1"


def test_a_table_column_is_masked_with_all_its_encoded_positions() -> None:
    features = Features(
        kind="table", names=("a", "b"), columns=((0, 2), (1,)), zero=torch.zeros(3), mean=torch.zeros(3)
    )
    assert feature_layout(features, (3,), 4).tolist() == [0, 1, 0]
    assert feature_names(features, (3,), 4) == ("a", "b")


@pytest.mark.parametrize(("features", "fraction", "wanted"), [(16, 0.25, 4), (10, 0.33, 3), (3, 0.01, 1), (2, 0.99, 2)])
def test_masks_have_the_right_size_and_are_seeded(features: int, fraction: float, wanted: int) -> None:
    masks = draw_masks(200, features, fraction, seeded())
    assert (masks.sum(1) == wanted).all()
    assert masks.any(0).all()  # every feature has its turn
    assert torch.equal(masks, draw_masks(200, features, fraction, seeded()))
    assert wanted == features or not torch.equal(masks, draw_masks(200, features, fraction, seeded(1)))


def test_apply_mixes_input_and_baseline() -> None:
    x = torch.tensor([[1.0, 2.0]])
    assert apply(x, torch.tensor([[True, False]]), torch.tensor([[7.0, 7.0]])).tolist() == [[7.0, 2.0]]
    assert x.tolist() == [[1.0, 2.0]]


def test_zero_and_mean_are_those_of_the_features() -> None:
    x = random(2, 3, 8, 8)
    assert (baseline_values(x, "zero", images(), seeded()) == -2).all()
    assert (baseline_values(x, "mean", images(), seeded()) == 0.5).all()
    assert (baseline_values(random(2, 4), "blur", table(4), seeded()) == 0.5).all()


def test_blur_keeps_flat_images_and_smooths_others() -> None:
    flat = torch.full((1, 2, 8, 12), 3.0)
    torch.testing.assert_close(baseline_values(flat, "blur", images(2), seeded()), flat)
    x = random(1, 3, 16, 16)
    blurred = baseline_values(x, "blur", images(side=16), seeded())
    assert blurred.shape == x.shape
    assert blurred.std() < 0.3 * x.std()


@pytest.mark.parametrize("samples", [2, 3, 50])
def test_marginal_is_another_input_of_the_batch_and_uses_each_once(samples: int) -> None:
    x = torch.arange(float(samples))[:, None]
    values = baseline_values(x, "marginal", table(1), seeded())
    assert (values != x).all()
    assert sorted(values.flatten().tolist()) == x.flatten().tolist()


def test_intervened_changes_masked_features_only() -> None:
    x = torch.ones(40, 8)
    changed = intervened(x, table(8), grid=4, fraction=0.25, baselines=["zero", "mean"], generator=seeded())
    assert ((changed != x).sum(1) == 2).all()
    assert {tuple(row[row != 1].tolist()) for row in changed} == {(0.0, 0.0), (0.5, 0.5)}
    assert (x == 1).all()
    again = intervened(x, table(8), grid=4, fraction=0.25, baselines=["zero", "mean"], generator=seeded())
    assert torch.equal(changed, again)


def test_a_patch_is_masked_in_all_channels() -> None:
    x = torch.ones(5, 3, 8, 8)
    changed = intervened(x, images(), grid=2, fraction=0.25, baselines=["zero"], generator=seeded())
    assert ((changed == -2).sum((1, 2, 3)) == 3 * 16).all()
    assert ((changed == -2).all(1).sum((1, 2)) == 16).all()


def test_every_baseline_gets_its_masks() -> None:
    section = InterveneSection(baselines=["mean", "zero"], masks=3, fraction=0.5)
    versions = list(intervene_batch(torch.ones(4, 2), table(2), section, seeded()))
    assert [name for _, _, name in versions] == ["mean"] * 3 + ["zero"] * 3
    for changed, mask, name in versions:
        assert torch.equal(changed != 1, mask)
        assert (changed[mask] == {"mean": 0.5, "zero": 0}[name]).all()


def test_masking_one_column_of_a_linear_network_by_hand() -> None:
    # logits (ln 3, 0): masking column 0 moves P from (3/4, 1/4) to (1/2, 1/2); column 1 is zero already
    x = torch.tensor([[math.log(3), 0.0]]).expand(64, 2)
    effects = run(linear([[1, 0], [0, 1]]), x, table(2), fraction=0.5, masks=4)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert effects.features == ("c0", "c1")
    assert effects.feature_ace == pytest.approx((kl * math.log(3) / 2, 0), rel=1e-6)
    assert effects.feature_ace_stderr == pytest.approx((0, 0), abs=1e-8)
    share = effects.nodes[0].ace / effects.feature_ace[0]  # of the masks, how many hit column 0
    assert share == pytest.approx(0.5, abs=0.1)
    assert effects.nodes[0].kl == pytest.approx(share * kl)
    assert (effects.inputs, effects.interventions, effects.forwards) == (64, 256, 320)


def test_an_inert_feature_has_no_effect_and_others_have() -> None:
    effects = run(linear([[1, 0, 2], [0, 0, 1]]), random(400, 3), table(3), fraction=0.3)
    assert effects.feature_ace[1] == effects.feature_ace_stderr[1] == 0
    assert all(effects.feature_ace[i] > 3 * effects.feature_ace_stderr[i] > 0 for i in (0, 2))


def test_effects_equal_those_of_activations_kept_whole() -> None:
    model, x = small_cnn().eval(), random(48, 3, 8, 8)
    section = InterveneSection(batch_size=48, baselines=["marginal", "blur"])
    network = trace(model, x[:2])
    effects = intervene(network, Rows(x), images(), section, seed=3)
    with torch.no_grad():
        plain = site_activations(network, x)
        versions = list(intervene_batch(x, images(), section, seeded(3)))
        after = [site_activations(network, changed) for changed, _, _ in versions]
    for site, node in enumerate(effects.nodes):
        terms = torch.stack([effect_terms(units(plain[site]), units(sites[site]))[0] for sites in after])
        assert node.ace == pytest.approx(terms.mean().item(), rel=1e-6)
        assert node.ace_stderr == pytest.approx(terms.mean(0).std().item() / math.sqrt(48), rel=1e-6)
    masks = torch.stack([mask for _, mask, _ in versions])
    at_output = [terms[masks[:, :, feature]].mean().item() for feature in range(16)]
    assert effects.feature_ace == pytest.approx(at_output, rel=1e-6)


def test_equal_neighbours_share_a_node_and_the_null_is_small() -> None:
    eye = [[float(i == j) for j in range(6)] for i in range(6)]
    first = [[float(i + j in (2, 7)) for j in range(6)] for i in range(6)]
    model = nn.Sequential(linear(first), linear(eye), linear([[1.0, -1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]))
    effects = run(model, random(512, 6), table(6), batch_size=256)
    assert effects.cka[0][1] == pytest.approx(1, abs=1e-6)
    assert effects.cka[1][2] < 0.9
    assert max(abs(value) for row in effects.cka_null for value in row) < 0.05
    groups = group(effects, GroupSection(), seed=0)
    assert groups.chosen.nodes == ((0, 1), (2,))
    assert groups.stable


def without_seconds(effects: Effects) -> Effects:
    return dataclasses.replace(effects, forward_seconds=0, analysis_seconds=0)


def test_same_seed_same_result() -> None:
    x = random(70, 3, 8, 8)
    first, again, other = (run(small_cnn(), x, images(), seed=s) for s in (0, 0, 1))
    assert without_seconds(first) == without_seconds(again)
    assert first.nodes != other.nodes
    assert first.forward_seconds > 0
    assert first.analysis_seconds > 0


def test_network_and_inputs_are_left_alone() -> None:
    x, model = random(20, 3, 8, 8), small_cnn()
    network = trace(model, x[:2])
    before = {name: value.clone() for name, value in network.graph.state_dict().items()}
    kept = x.clone()
    intervene(network, Rows(x), images(), InterveneSection(batch_size=16), seed=0)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in network.graph.state_dict().items())
    assert not any(parameter.is_inference() for parameter in network.graph.parameters())


def test_a_last_batch_under_eight_inputs_is_left_out() -> None:
    assert run(linear([[1, 0], [0, 1]]), random(71, 2), table(2)).inputs == 64
    assert run(linear([[1, 0], [0, 1]]), random(72, 2), table(2)).inputs == 72
    with pytest.raises(DataError, match="5 inputs"):
        run(linear([[1, 0], [0, 1]]), random(5, 2), table(2))


def test_a_dead_site_is_reported_and_unrelated() -> None:
    model = nn.Sequential(linear([[1.0, 0], [0, 1]]), linear([[0.0, 0], [0, 0]]), nn.Linear(2, 2))
    effects = run(model, random(64, 2), table(2))
    assert [skip.what for skip in effects.skipped] == [effects.nodes[1].site, effects.nodes[2].site]
    assert effects.cka[0][1] == 0
    assert effects.nodes[1].ace == 0


def test_the_site_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(linear([[1.0, 0], [0, 1]]), linear([[1.0, 0], [0, 1]]))
    network = trace(model, random(2, 2))
    list(network.graph.parameters())[1].data.fill_(torch.inf)
    with pytest.raises(NumericalError, match=network.regions[1].info.name):
        intervene(network, Rows(random(16, 2)), table(2), InterveneSection(baselines=["zero"]), seed=0)


def test_random_weights_control_leaves_the_network_alone() -> None:
    x = random(64, 3, 8, 8)
    network: Network = trace(small_cnn(), x[:2])
    before = network.graph(x)
    control = random_init_control(network, Rows(x), InterveneSection(batch_size=64), seed=5)
    assert torch.equal(network.graph(x), before)
    assert 0 < control < 1
    assert control == random_init_control(network, Rows(x), InterveneSection(batch_size=64), seed=5)


def test_memory_does_not_grow_with_the_number_of_inputs() -> None:
    network = trace(small_cnn(16), random(2, 3, 16, 16))
    split = Noise(5000, [])
    section = InterveneSection(inputs=5000, batch_size=100, baselines=["mean"], masks=1)
    intervene(network, split, images(side=16), section, seed=0)
    assert split.resident[-1] - split.resident[10] < 20e6  # the activations of 4,000 inputs are 260 MB
