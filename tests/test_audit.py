"""The harm audit on images: planted harm that it must name, corruptions, and drift against its noise floor."""

from __future__ import annotations

import base64
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from audit_sample import QUICK, kinds_of, twin
from pydantic import TypeAdapter
from pydantic_core import to_json
from torch import Tensor, nn

from causal_compress.errors import NumericalError
from causal_compress.explain.audit import audit, sample
from causal_compress.explain.corruptions import Corruption, corruptions
from causal_compress.explain.drift import attribution_drift, map_drift
from causal_compress.explain.examples import picture_png
from causal_compress.explain.paired import answer_both, quality
from causal_compress.inputs.data import Data, load_data
from causal_compress.recipe import DataSection, NormalizeSection
from causal_compress.results import AttributionDrift, Audit, Merge, Skip
from causal_compress.shrink.surgery import Student, assemble
from causal_compress.understand.trace import Network, trace


@pytest.fixture(scope="module")
def digits() -> Data:
    normalize = NormalizeSection(mean=[0.305], std=[0.376])
    return load_data(DataSection(source="sklearn:digits", normalize=normalize, calibration=200, validation=400), seed=0)


@pytest.fixture(scope="module")
def teacher(digits: Data) -> Network:
    """A perceptron of three layers that has learnt the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)]
        model = nn.Sequential(nn.Flatten(), *layers)
        x, y = digits.train.take(np.arange(len(digits.train)))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(80):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return trace(model, digits.example_input)


def last_layer(student: Student) -> nn.Linear:
    layers = [module for module in student.graph.modules() if isinstance(module, nn.Linear)]
    return layers[-1]


def test_nll_and_brier_are_those_of_torch(teacher: Network, digits: Data) -> None:
    student = twin(teacher)
    with torch.no_grad():
        last_layer(student).weight.mul_(0.5)
    pair = answer_both(teacher.graph, student.graph, digits.validation.batches(100))
    x, y = digits.validation.take(np.arange(len(digits.validation)))
    with torch.no_grad():
        p, q = torch.softmax(teacher.graph(x), 1), torch.log_softmax(student.graph(x), 1)
    *_, nll, brier = quality(pair, 100, seed=0)
    assert nll.student == pytest.approx(float(F.nll_loss(q, y)), rel=1e-5)
    assert brier.teacher == pytest.approx(float((p - F.one_hot(y, 10)).square().sum(1).mean()), rel=1e-4)
    assert pair.divergence.mean() == pytest.approx(float((p * (p.log() - q)).sum(1).mean()), rel=1e-3)
    assert nll.change.low < nll.change.value < nll.change.high
    assert nll.change.value == pytest.approx(nll.student - nll.teacher)


def test_an_equal_student_shows_no_harm_at_all(teacher: Network, digits: Data) -> None:
    found = audit(teacher, twin(teacher), digits, QUICK, seed=0)
    assert found.overall.drop_pp == 0
    assert found.overall.p_value == 1.0
    assert found.flips.agreement.pct == 100
    assert not found.gallery
    assert all(one.change.value == 0 == one.change.high for one in found.quality if one.change is not None)
    assert [one.measure for one in found.quality if one.change is None] == ["ece"]
    assert all(row.extra_drop_pp.value == 0 for row in found.corruptions)
    assert found.attribution is not None
    assert found.attribution.beyond_floor.value == 0
    assert found.causal_map is not None
    assert found.causal_map.student == found.causal_map.floor
    assert all(node.again == pytest.approx(node.student, rel=1e-6) for node in found.causal_map.nodes)


# planted harm


def test_a_class_that_was_planted_to_suffer_is_named(teacher: Network, digits: Data) -> None:
    student = twin(teacher)
    with torch.no_grad():
        last_layer(student).bias[3] -= 30.0
    found = audit(teacher, student, digits, QUICK.model_copy(update={"groups": "class"}), seed=0)
    harmed = [row.name for row in found.per_class if row.p_holm < 0.05]
    assert harmed == ["3"]
    assert found.flips.right_to_wrong >= 30
    assert found.overall.p_value < 1e-6
    assert found.flips.commonest[0].true_class == "3"
    assert found.groups is not None
    assert found.groups.growth_pp.low > 0
    assert found.groups.student_gap_pp == pytest.approx(
        max(row.compared.student.pct for row in found.groups.rows)
        - min(row.compared.student.pct for row in found.groups.rows)
    )
    assert len(found.gallery) == 3
    assert all(one.teacher_class == "3" and one.picture_png_base64 for one in found.gallery)
    assert {row.corruption for row in found.corruptions} == {"none", "noise", "blur", "contrast", "jpeg"}
    assert len(found.corruptions) == 13
    clean = found.corruptions[0].compared.drop_pp
    for row in found.corruptions:
        assert row.extra_drop_pp.value == pytest.approx(row.compared.drop_pp - clean)
    pair = answer_both(teacher.graph, student.graph, digits.validation.batches(100))
    worst = np.argsort(-pair.divergence)[:3].tolist()
    assert [one.index for one in found.gallery] == worst
    sampled = audit(teacher, student, digits, QUICK.model_copy(update={"inputs": 100}), seed=0)
    assert len(sampled.gallery) == 3
    for one in sampled.gallery:  # numbered as `explain --index` numbers them, also where the audit saw a sample
        assert one.picture_png_base64 == base64.b64encode(picture_png(digits.validation, one.index)).decode()
        assert digits.classes[int(digits.validation.labels[one.index])] == one.true_class
    assert all(row.compared.teacher.n == 60 for row in found.corruptions)
    adapter = TypeAdapter(Audit)
    assert adapter.validate_json(to_json(found, inf_nan_mode="constants")) == found


def test_what_was_not_measured_is_told(teacher: Network, digits: Data) -> None:
    nothing = {"corruption_inputs": 0, "attribution_inputs": 0, "map_inputs": 0, "inputs": 50, "split": "test"}
    found = audit(teacher, twin(teacher), digits, QUICK.model_copy(update=nothing), seed=0)
    told = {skip.what for skip in found.skipped}
    assert {"corruptions", "attribution drift", "causal-map drift", "gaps between groups"} <= told
    assert "an untouched test split" in told
    assert (found.n, found.split) == (50, "test")


def test_logits_that_are_not_finite_are_refused(teacher: Network, digits: Data) -> None:
    student = twin(teacher)
    with torch.no_grad():
        last_layer(student).bias[0] = torch.nan
    with pytest.raises(NumericalError, match="student"):
        audit(teacher, student, digits, QUICK, seed=0)


# corruptions


def damaged(digits: Data, kind: Corruption, size: int = 64) -> Tensor:
    split = sample(digits.validation, 64, 0)
    x = torch.cat([x for x, _ in kind.batches(split, size)])
    return x * 0.376 + 0.305


def test_damage_is_the_same_for_one_seed_whatever_the_batches(digits: Data) -> None:
    for key, kind in kinds_of(digits).items():
        once = damaged(digits, kind)
        assert torch.allclose(once, damaged(digits, kind, size=17)), key
        assert once.min() > -1e-5, key
        assert once.max() < 1 + 1e-5, key
    noise = [damaged(digits, kinds_of(digits, seed)["noise", 2]) for seed in (0, 1)]
    assert not torch.allclose(*noise)


@pytest.mark.parametrize("name", ["noise", "blur", "contrast", "jpeg"])
def test_damage_grows_with_severity(digits: Data, name: str) -> None:
    clean, _ = sample(digits.validation, 64, 0).take(np.arange(64))
    clean = clean * 0.376 + 0.305
    errors = [float((damaged(digits, kinds_of(digits)[name, s]) - clean).square().mean()) for s in (1, 2, 3)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_contrast_keeps_the_mean_and_noise_has_its_size(digits: Data) -> None:
    clean, _ = sample(digits.validation, 64, 0).take(np.arange(64))
    clean = clean * 0.376 + 0.305
    flat = damaged(digits, kinds_of(digits)["contrast", 2])
    assert torch.allclose(flat.mean((1, 2, 3)), clean.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(flat.std((1, 2, 3)), 0.5 * clean.std((1, 2, 3)), atol=1e-4)
    middle = (clean > 0.3) & (clean < 0.7)  # where clipping plays no part
    noise = (damaged(digits, kinds_of(digits)["noise", 1]) - clean)[middle]
    assert float(noise.std()) == pytest.approx(0.04, rel=0.1)


def test_pixels_of_an_unknown_scale_are_not_corrupted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "floats.npz", x_train=x, y_train=np.arange(60) % 2, x_test=x, y_test=np.arange(60) % 2)
    data = load_data(DataSection(source=f"npz:{tmp_path / 'floats.npz'}", calibration=10, validation=10), seed=0)
    found = corruptions(data, data.validation, 0)
    assert isinstance(found, Skip)
    assert "not in [0, 1]" in found.reason


def test_pixels_a_hair_outside_their_range_are_corrupted_too(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random(size=(60, 6, 6)).astype(np.float32)
    x[:, 0, 0], x[:, 0, 1] = 1 + 1e-6, -1e-6
    np.savez(tmp_path / "hair.npz", x_train=x, y_train=np.arange(60) % 2, x_test=x, y_test=np.arange(60) % 2)
    data = load_data(DataSection(source=f"npz:{tmp_path / 'hair.npz'}", calibration=10, validation=10), seed=0)
    kinds = kinds_of(data)
    for kind in kinds.values():
        made = torch.cat([x for x, _ in kind.batches(data.validation, 10)])
        assert made.min() >= 0
        assert made.max() <= 1


# drift


def drift_of(models: tuple[nn.Module, nn.Module, nn.Module | None], data: Data) -> AttributionDrift:
    section = QUICK.model_copy(update={"masks": 96})
    found = attribution_drift(models, sample(data.validation, 24, 0), data.features, section, seed=0)
    assert isinstance(found, AttributionDrift)
    return found


def test_other_reasons_drift_further_than_the_noise_floor(teacher: Network, digits: Data) -> None:
    stranger = copy.deepcopy(teacher.graph)
    with torch.no_grad():
        first = next(module for module in stranger.modules() if isinstance(module, nn.Linear))
        first.weight.copy_(first.weight.flip(1))  # looks at the other end of the image
    found = drift_of((teacher.graph, stranger, teacher.graph), digits)
    assert found.floor.value > 0.5
    assert found.beyond_floor.low > 0.1
    assert found.apart is not None
    assert found.apart.value == found.floor.value
    assert len(found.per_input) == found.student.n


def test_nodes_that_a_merge_swallowed_are_told(teacher: Network, digits: Data) -> None:
    merges = [Merge(first=0, last=0, representative=0, adapter=None)]
    count = len(teacher.regions)
    merges.append(Merge(first=1, last=count - 1, representative=count - 1, adapter="project"))
    section = QUICK.model_copy(update={"batch_size": 64})
    found, skips = map_drift(teacher, assemble(teacher, merges), digits.validation, digits.features, section, seed=0)
    assert found is not None
    assert [node.node for node in found.nodes] == [teacher.regions[0].info.name, teacher.regions[-1].info.name]
    assert [skip.what for skip in skips] == [f"causal effect at {r.info.name}" for r in teacher.regions[1:-1]]
    assert found.student is None


def test_a_node_that_was_made_louder_shows_in_the_map(teacher: Network, digits: Data) -> None:
    student = twin(teacher)
    with torch.no_grad():
        last_layer(student).weight.mul_(3)
    found, skips = map_drift(teacher, student, digits.validation, digits.features, QUICK, seed=0)
    assert found is not None
    assert not skips
    *inner, output = found.nodes
    assert output.change.low > 0
    assert all(abs(edge) < 1e-6 for node in inner for edge in (node.change.low, node.change.high))  # the same masks
    assert any(node.again != node.teacher for node in inner)  # other masks


def test_samples_keep_the_order_and_the_labels(digits: Data) -> None:
    split = digits.validation
    part = sample(split, 30, 7)
    assert len(part) == 30
    where = [int(np.flatnonzero(split.positions == position)[0]) for position in part.positions]
    assert where == sorted(where)
    assert torch.equal(part.labels, split.labels[torch.tensor(where)])
    assert sample(split, None, 0) is split


@pytest.mark.parametrize("channels", [2, 5])
def test_pictures_of_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    x = np.random.default_rng(0).integers(0, 255, size=(60, 8, 8, channels), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", x=x, y=np.arange(60) % 2)
    data = load_data(DataSection(source=f"npz:{tmp_path / 'many.npz'}", calibration=10, validation=10), seed=0)
    assert picture_png(data.validation, 0).startswith(b"\x89PNG")
