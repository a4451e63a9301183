"""The harm audit on tables: damaged columns, groups of rows, and the column that decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from audit_sample import QUICK, audit_of, kinds_of, pair_of, twin
from torch import nn

from causal_compress.commands.auditing import _audit_rows
from causal_compress.errors import DataError, UsageError
from causal_compress.explain import subgroups
from causal_compress.explain.audit import audit
from causal_compress.explain.drift import attribution_drift, feature_effects
from causal_compress.explain.paired import by_group
from causal_compress.inputs.data import Data, load_data
from causal_compress.recipe import DataSection
from causal_compress.results import Skip
from causal_compress.understand.trace import Network, trace


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


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1000001, 1000002, 1000003], {"1000001", "1000002", "1000003"}),
        ([0.5, 1.25], {"0.5", "1.25"}),
        ([1013.2501, 1013.2502], {"1013.2501", "1013.2502"}),
        (
            range(20240101, 20240129),
            {"20240101 to 20240108", "20240108 to 20240115", "20240115 to 20240121", "20240121 to 20240128"},
        ),
    ],
)
def test_groups_keep_their_numbers_whole(tmp_path: Path, values: list[float], wanted: set[str]) -> None:
    rows = 28 * 20
    frame = pd.DataFrame(
        {"code": [list(values)[i % len(values)] for i in range(rows)], "y": [i % 2 for i in range(rows)]}
    )
    frame.to_csv(tmp_path / "codes.csv", index=False)
    data = load_data(
        DataSection(source=f"csv:{tmp_path / 'codes.csv'}", target="y", calibration=50, validation=300), seed=0
    )
    assert set(subgroups.group_names(data, data.validation, "code", 64)) == wanted


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


def test_a_column_called_class_is_printed_beside_the_classes() -> None:
    pair = pair_of([0, 1] * 50, [0, 1] * 50, [0, 1] * 25 + [1, 0] * 25)
    names = {"own": ["first"] * 50 + ["second"] * 50, "same": ["a", "b"] * 50}
    for kind, shown in (
        ("own", {"class a", "class b", "class first", "class second"}),
        ("same", {"class a", "class b"}),
    ):
        found, _ = subgroups.gaps(pair, names[kind], "class", 50, 0)
        classes = by_group(pair, [(name, np.flatnonzero(pair.labels == label)) for label, name in enumerate("ab")])
        whole = dataclasses.replace(audit_of(pair), per_class=classes, groups=found)
        printed = [row[0] for row in _audit_rows(whole, "audit.json") if row[0].startswith("class ")]
        assert sorted(printed) == sorted(shown)


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


def test_two_features_have_no_ranks(table: Data, doser: Network) -> None:
    narrow = table.features.__class__("table", ("a", "b"), ((0, 1), (2, 3)), table.features.zero, table.features.mean)
    found = attribution_drift((doser.graph, doser.graph, None), table.validation, narrow, QUICK, seed=0)
    assert isinstance(found, Skip)
    assert "2 features" in found.reason
