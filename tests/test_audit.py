"""The harm audit: its statistics against answers known by hand, and planted harm that it must name."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from pydantic_core import to_json
from torch import Tensor, nn

from causal_compress.errors import DataError, NumericalError, UsageError
from causal_compress.explain import subgroups
from causal_compress.explain.audit import audit, sample
from causal_compress.explain.corruptions import Corruption, corruptions
from causal_compress.explain.drift import attribution_drift, feature_effects, map_drift
from causal_compress.explain.examples import picture_png
from causal_compress.explain.findings import findings
from causal_compress.explain.paired import (
    Answers,
    Pair,
    answer_both,
    calibration_error,
    compare,
    flips,
    holm,
    mean_interval,
    quality,
)
from causal_compress.inputs.data import Data, load_data
from causal_compress.recipe import AuditSection, DataSection, NormalizeSection
from causal_compress.results import AttributionDrift, Audit, Estimate, Merge, Quality, Skip
from causal_compress.shrink.surgery import Student, assemble, copied
from causal_compress.understand.trace import Network, trace

QUICK = AuditSection(corruption_inputs=60, attribution_inputs=16, masks=24, map_inputs=64, resamples=200, examples=3)


def answers_of(predicted: list[int]) -> Answers:
    n = len(predicted)
    return Answers(np.array(predicted), np.full(n, 0.9), np.full(n, 0.1), np.full(n, 0.2))


def pair_of(labels: list[int], teacher: list[int], student: list[int]) -> Pair:
    return Pair(np.array(labels), answers_of(teacher), answers_of(student), np.zeros(len(labels)))


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


def twin(network: Network) -> Student:
    """A student that is the teacher."""
    count = len(network.regions)
    return copied(assemble(network, [Merge(first=i, last=i, representative=i, adapter=None) for i in range(count)]))


def last_layer(student: Student) -> nn.Linear:
    layers = [module for module in student.graph.modules() if isinstance(module, nn.Linear)]
    return layers[-1]


# numerics


def test_mcnemar_is_exact() -> None:
    right = np.array([True] * 5 + [True] * 20 + [False] * 3)
    still = np.array([False] * 5 + [True] * 20 + [False] * 3)
    found = compare(right, still)
    assert (found.teacher_only, found.student_only) == (5, 0)
    assert found.p_value == pytest.approx(2 * 0.5**5)
    assert found.drop_pp == pytest.approx(500 / 28)
    assert compare(right, right).p_value == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_only_raises_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()


def test_flips_add_up_and_name_the_commonest() -> None:
    pair = pair_of([0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 2], [0, 1, 1, 0, 1, 1, 2])
    found = flips(pair, ("a", "b", "c"))
    counts = (
        found.both_right,
        found.right_to_wrong,
        found.wrong_to_right,
        found.wrong_to_other_wrong,
        found.same_wrong,
    )
    assert counts == (2, 2, 1, 1, 1)
    assert sum(counts) == found.n == 7
    first = found.commonest[0]
    assert (first.true_class, first.teacher_class, first.student_class, first.count) == ("a", "a", "b", 2)
    assert found.agreement.pct == pytest.approx(300 / 7)


def test_calibration_error_by_hand() -> None:
    sure, right = np.ones(30), np.arange(30) < 15
    assert calibration_error(sure, np.ones(30, bool)) == 0.0
    assert calibration_error(sure, right, bins=1) == pytest.approx(0.5)
    two = np.array([0.9, 0.5, 0.5, 0.9])
    assert calibration_error(two, np.array([True, True, False, False]), bins=2) == pytest.approx((0 + 0.4) / 2)


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


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 800)
    found = mean_interval(values, 2000, seed=1)
    half = 1.96 * values.std() / np.sqrt(800)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.n == 800


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
    worst = digits.validation.positions[np.argsort(-pair.divergence)[:3]]
    assert [one.index for one in found.gallery] == worst.tolist()
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


def kinds_of(data: Data, seed: int = 0) -> dict[tuple[str, int], Corruption]:
    found = corruptions(data, data.validation, seed)
    assert isinstance(found, list)
    return {(kind.name, kind.severity): kind for kind in found}


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


# tables


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Data:
    rng = np.random.default_rng(0)
    size = 1000
    frame = pd.DataFrame({"age": rng.integers(20, 80, size), "dose": rng.normal(size=size)})
    frame["site"] = np.where(rng.random(size) < 0.3, "north", "south")
    frame["label"] = (frame["dose"] > 0).astype(int)
    path = tmp_path_factory.mktemp("table") / "table.csv"
    frame.to_csv(path, index=False)
    section = DataSection(source=f"csv:{path}", target="label", calibration=100, validation=200)
    return load_data(section, seed=0)


@pytest.fixture(scope="module")
def doser(table: Data) -> Network:
    """Answers by the dose alone, as the labels do."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    place = table.features.columns[table.features.names.index("dose")][0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight[0, place], model[0].weight[1, place] = 5.0, -5.0
        model[2].weight[1, 0], model[2].weight[0, 1] = 5.0, 5.0
    return trace(model, table.example_input)


def test_column_noise_leaves_categories_alone_and_dropout_empties_them(table: Data) -> None:
    kinds = kinds_of(table)
    assert {name for name, _ in kinds} == {"column noise", "column dropout"}
    clean, _ = table.validation.take(np.arange(200))
    noisy = torch.cat([x for x, _ in kinds["column noise", 3].batches(table.validation, 64)])
    assert torch.equal(noisy[:, 2:], clean[:, 2:])
    calibration, _ = table.calibration.take(np.arange(100))
    spread = calibration[:, :2].std(0, unbiased=False)
    assert torch.allclose((noisy - clean)[:, :2].std(0), 0.5 * spread, rtol=0.2)
    lost = torch.cat([x for x, _ in kinds["column dropout", 3].batches(table.validation, 64)])
    emptied = lost[:, 2:].sum(1) == 0
    assert 0.2 < float(emptied.float().mean()) < 0.4
    assert torch.allclose(lost[(lost != clean)[:, 0], 0], table.features.mean[0])


def test_groups_by_column_category_and_callable(table: Data, tmp_path: Path) -> None:
    split = table.validation
    sites = subgroups.group_names(table, split, "site", 64)
    assert set(sites) == {"north", "south"}
    ages = subgroups.group_names(table, split, "age", 64)
    assert len(set(ages)) == 4
    raw = split.show(np.arange(200))[:, list(table.features.names).index("age")]
    for name in set(ages):
        low, high = map(float, name.split(" to "))
        members = raw[[age == name for age in ages]]
        assert low <= members.min()
        assert members.max() <= high
    code = "def parity(rows, labels, positions):\n    return [p % 2 for p in positions]\n"
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    own = subgroups.group_names(table, split, f"{tmp_path / 'own.py'}:parity", 64)
    assert own == [str(position % 2) for position in split.positions]
    assert subgroups.group_names(table, split, "class", 64) == [table.classes[y] for y in split.labels.tolist()]


def test_groups_that_are_not_there_are_refused(table: Data, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'site'"):
        subgroups.group_names(table, table.validation, "sit", 64)
    (tmp_path / "own.py").write_text("def short(rows, labels, positions):\n    return [1]\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 groups for 64 rows"):
        subgroups.group_names(table, table.validation, f"{tmp_path / 'own.py'}:short", 64)
    with pytest.raises(UsageError, match="no callable"):
        subgroups.group_names(table, table.validation, f"{tmp_path / 'own.py'}:long", 64)


def test_harm_to_one_group_of_a_table_is_named(table: Data, doser: Network) -> None:
    student = twin(doser)
    place = list(table.features.columns[table.features.names.index("site")])
    categories = table.features.categories[table.features.names.index("site")]
    north = place[categories.index("north")]
    first = next(module for module in student.graph.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():  # in the north every answer becomes "1"
        first.weight[0, north] = 100.0
    found = audit(doser, student, table, QUICK.model_copy(update={"groups": "site"}), seed=0)
    assert found.groups is not None
    changed = {row.name: row.p_holm for row in found.groups.rows}
    assert changed["north"] < 1e-4
    assert changed["south"] == 1.0
    assert found.groups.growth_pp.low > 10
    assert found.gallery[0].row is not None
    assert "dose = " in found.gallery[0].row


def test_small_groups_and_too_many_are_left_out() -> None:
    pair = pair_of([0] * 50, [0] * 50, [0] * 50)
    found, small = subgroups.gaps(pair, ["a"] * 25 + ["b"] * 24 + ["c"], "x", 50, 0)
    assert found is not None
    assert [row.name for row in found.rows] == ["a", "b"]
    assert [skip.what for skip in small] == ["group c of x"]
    found, small = subgroups.gaps(pair, ["a"] * 40 + ["b"] * 10, "x", 50, 0)
    assert found is None
    assert "a gap needs two" in small[-1].reason
    many = pair_of([0] * 150, [0] * 150, [0] * 150)
    found, small = subgroups.gaps(many, [str(i) for i in range(150)], "x", 50, 0)
    assert found is None
    assert "150 different values" in small[0].reason


# drift


def test_the_column_that_decides_has_the_largest_effect(table: Data, doser: Network) -> None:
    x, _ = table.validation.take(np.arange(40))
    effects = feature_effects(doser.graph, x, table.features, QUICK, torch.Generator().manual_seed(0))
    dose = table.features.names.index("dose")
    assert float((effects.argmax(1) == dose).float().mean()) == 1.0


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


def test_two_features_have_no_ranks(table: Data, doser: Network) -> None:
    narrow = table.features.__class__("table", ("a", "b"), ((0, 1), (2, 3)), table.features.zero, table.features.mean)
    found = attribution_drift((doser.graph, doser.graph, None), table.validation, narrow, QUICK, seed=0)
    assert isinstance(found, Skip)
    assert "2 features" in found.reason


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


def answered(confidence: np.ndarray, right: np.ndarray) -> Answers:
    return Answers(np.where(right, 0, 1), confidence, np.zeros(len(right)), np.zeros(len(right)))


def test_the_interval_of_overconfidence_covers_the_true_change() -> None:
    rng, covered = np.random.default_rng(0), 0
    for round_ in range(40):
        sure = rng.uniform(0.5, 1, 400)
        right = rng.random(400) < sure  # the teacher is calibrated, the student too sure by 0.03
        pair = Pair(
            np.zeros(400, int), answered(sure, right), answered(sure + 0.03, rng.random(400) < sure), np.zeros(400)
        )
        found = {one.measure: one for one in quality(pair, 200, round_)}
        change = found["overconfidence"].change
        assert change is not None
        covered += change.low <= 0.03 <= change.high
        assert found["ece"].change is None
    assert covered >= 33


def test_a_close_call_is_not_called_sure() -> None:
    pair = pair_of([0] * 1000, [0] * 1000, [0] * 1000)
    whole = audit_of(pair)
    torn = dataclasses.replace(whole.overall, drop_ci_pp=(0.01, 0.4), p_value=0.06)
    assert findings(dataclasses.replace(whole, overall=torn))[0].sign == "unclear"
    sure = dataclasses.replace(torn, p_value=0.04)
    assert findings(dataclasses.replace(whole, overall=sure))[0].sign == "worse"


def audit_of(pair: Pair) -> Audit:
    """An audit that looked at answers alone."""
    nothing = dict.fromkeys(("per_class", "quality", "corruptions", "gallery", "skipped"), ())
    absent = dict.fromkeys(("groups", "attribution", "causal_map"))
    told = {"overall": pair.compared(), "flips": flips(pair, ("a",))}
    return Audit(split="validation", n=len(pair.labels), classes=1, seed=0, seconds=0.0, **told, **nothing, **absent)


def test_surer_is_worse_only_where_confidence_exceeds_accuracy() -> None:
    whole = audit_of(pair_of([0] * 10, [0] * 10, [0] * 10))
    for ends, change, sign in (
        ((0.0, 0.1), (0.05, 0.15), "worse"),
        ((-0.2, -0.1), (0.05, 0.15), "better"),
        ((0.2, 0.1), (-0.15, -0.05), "better"),
        ((0.0, -0.1), (-0.15, -0.05), "unclear"),
    ):
        change = Estimate(value=sum(change) / 2, low=change[0], high=change[1], n=10)
        one = Quality(measure="overconfidence", unit="share", teacher=ends[0], student=ends[1], change=change)
        assert findings(dataclasses.replace(whole, quality=(one,)))[1].sign == sign


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


@pytest.mark.parametrize("channels", [2, 5])
def test_pictures_of_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    x = np.random.default_rng(0).integers(0, 255, size=(60, 8, 8, channels), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", x=x, y=np.arange(60) % 2)
    data = load_data(DataSection(source=f"npz:{tmp_path / 'many.npz'}", calibration=10, validation=10), seed=0)
    assert picture_png(data.validation, 0).startswith(b"\x89PNG")
