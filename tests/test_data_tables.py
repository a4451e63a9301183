"""Tables made ready: columns are encoded by their training rows, what is missing is filled, faults are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from data_sample import fault, load, npz, splits, whole

from causal_compress.recipe import NormalizeSection

SHARED = Path(os.environ.get("CAUSAL_COMPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def frame(n: int = 120) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "age": rng.normal(40, 10, n),
            "visits": rng.integers(0, 9, n),
            "town": rng.choice(["Rome", "Oslo", "Lima"], n),
            "name": [f"person {index}" for index in range(n)],
            "label": ["yes" if index % 3 else "no" for index in range(n)],
        }
    )


def csv(folder: Path, table: pd.DataFrame, name: str = "table.csv", **options: Any) -> str:
    table.to_csv(folder / name, index=False, **options)
    return f"csv:{folder / name}"


def test_npz_table(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, (200, 4))
    data = load(npz(tmp_path, x=x, y=np.arange(200) % 2))
    assert (data.kind, data.input_shape) == ("table", (4,))
    train = whole(data.train)
    torch.testing.assert_close(train.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(4))
    np.testing.assert_array_equal(data.test.show([0]), x[data.test.positions[[0]]])


def test_csv_is_encoded(tmp_path: Path) -> None:
    table = frame()
    data = load(csv(tmp_path, table), target="label", drop=["name"])
    assert (data.kind, data.classes, data.input_shape) == ("table", ("no", "yes"), (5,))
    assert data.features.names == ("age", "visits", "town")
    assert data.features.columns == ((0,), (1,), (2, 3, 4))
    assert data.features.categories == ((), (), ("Lima", "Oslo", "Rome"))
    numbers = table.loc[data.train.positions, ["age", "visits"]].to_numpy()
    wanted = (table.loc[data.test.positions, ["age", "visits"]].to_numpy() - numbers.mean(0)) / numbers.std(0)
    np.testing.assert_allclose(whole(data.test)[:, :2].numpy(), wanted, atol=1e-5)
    towns = [data.features.categories[2][int(code)] for code in data.test.show(range(len(data.test)))[:, 2]]
    assert towns == table["town"].iloc[data.test.positions].tolist()
    assert (whole(data.test)[:, 2:].sum(1) == 1).all()
    raw_zero = data.features.zero[:2].numpy() * numbers.std(0) + numbers.mean(0)
    np.testing.assert_allclose(raw_zero, 0, atol=1e-5)
    torch.testing.assert_close(data.features.mean, whole(data.calibration).mean(0))


def test_the_encoding_is_fitted_on_the_training_rows_only(tmp_path: Path) -> None:
    table = frame()
    plain = load(csv(tmp_path, table), target="label", drop=["name"])
    table.loc[np.r_[plain.test.positions, plain.validation.positions, plain.calibration.positions], "age"] = 1e6
    changed = load(csv(tmp_path, table), target="label", drop=["name"])
    assert torch.equal(whole(plain.train), whole(changed.train))


def test_missing_values(tmp_path: Path) -> None:
    table = frame()
    table.loc[::4, "age"] = np.nan
    table.loc[::5, "town"] = None
    data = load(csv(tmp_path, table), target="label", drop=["name"])
    assert data.features.categories[2] == ("<missing>", "Lima", "Oslo", "Rome")
    inputs, raw = whole(data.train), data.train.show(range(len(data.train)))
    assert torch.isfinite(inputs).all()
    filled = inputs[torch.from_numpy(np.isnan(raw[:, 0])), 0]
    torch.testing.assert_close(filled, torch.from_numpy(np.full(len(filled), filled[0])))
    median = table["age"].iloc[data.train.positions].median()
    known = inputs[torch.from_numpy(~np.isnan(raw[:, 0])), 0]
    assert known.min() < filled[0] < known.max()
    scale = np.polyfit(raw[~np.isnan(raw[:, 0]), 0], known.numpy(), 1)
    np.testing.assert_allclose(np.polyval(scale, median), filled[0], atol=1e-4)


def test_question_marks_are_missing_values(tmp_path: Path) -> None:
    table = frame().astype({"age": object})
    table.loc[3, "age"] = "?"
    assert load(csv(tmp_path, table), target="label", drop=["name"]).features.names[0] == "age"


def test_a_second_file_is_the_test_split(tmp_path: Path) -> None:
    train, test = frame(), frame(30)
    test.loc[0, "town"] = "Atlantis"
    csv(tmp_path, test, "test.csv")
    data = load(csv(tmp_path, train), test_source=str(tmp_path / "test.csv"), target="label", drop=["name"])
    assert len(data.test) == 30
    assert whole(data.test)[0, 2:].sum() == 0
    assert data.test.show([0])[0, 2] == -1


def test_tables_without_a_header_are_known_by_number(tmp_path: Path) -> None:
    source = csv(tmp_path, frame(), header=False)
    data = load(source, header=False, target=4, drop=[3], categorical=[2, 1])
    assert data.features.names == ("column_0", "column_2", "column_1")
    message = fault(source, header=False, target=40)
    assert "a number from 0 to 4" in message


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame().to_parquet(tmp_path / "table.parquet")
    data = load(f"parquet:{tmp_path / 'table.parquet'}", target="label", drop=["name"])
    assert data.input_shape == (5,)
    assert data.fingerprint == load(csv(tmp_path, frame()), target="label", drop=["name"]).fingerprint


def test_groups_of_labels(tmp_path: Path) -> None:
    table = frame()
    table["label"] = np.array([1, 2, 3, 4])[np.arange(120) % 4]
    source = csv(tmp_path, table)
    data = load(source, target="label", drop=["name"], target_groups={"good": [1], "bad": "*"})
    assert data.classes == ("good", "bad")
    assert abs(data.train.labels.float().mean() - 0.75) < 0.05
    message = fault(source, target="label", drop=["name"], target_groups={"good": ["1", "2"], "bad": ["3"]})
    assert "labels that belong to no class" in message
    assert "no row belongs to the class 'good'" in fault(
        source, target="label", drop=["name"], target_groups={"good": ["one"], "bad": "*"}
    )


def test_normalisation_given_for_a_table(tmp_path: Path) -> None:
    table = frame()
    section = {"target": "label", "drop": ["name"]}
    data = load(csv(tmp_path, table), normalize=NormalizeSection(mean=[0, 0], std=[10, 1]), **section)
    np.testing.assert_allclose(whole(data.test)[:, 0], table["age"].iloc[data.test.positions] / 10, rtol=1e-5)
    assert "one per numeric column" in fault(csv(tmp_path, table), normalize=NormalizeSection(mean=[0]), **section)


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({}, "data.target is not set"),
        ({"target": "lable"}, "did you mean 'label'?"),
        ({"target": "label", "drop": ["nmae"]}, "did you mean 'name'?"),
        ({"target": "label", "categorical": ["twon"]}, "did you mean 'town'?"),
        ({"target": "label", "categorical": ["town"]}, "the column 'name' is not numeric"),
        ({"target": 4}, "data.header: false"),
        ({"target": "label", "drop": ["age", "visits", "town", "name"]}, "no input columns"),
    ],
)
def test_bad_columns(tmp_path: Path, section: dict[str, Any], wanted: str) -> None:
    assert wanted in fault(csv(tmp_path, frame()), **section)


def test_bad_tables(tmp_path: Path) -> None:
    section = {"target": "label", "drop": ["name"]}
    assert "does not exist" in fault(f"csv:{tmp_path / 'nowhere.csv'}", **section)
    (tmp_path / "empty.csv").write_text("")
    assert "can't be read as csv" in fault(f"csv:{tmp_path / 'empty.csv'}", **section)
    (tmp_path / "head.csv").write_text("a,label\n")
    assert "has no rows" in fault(f"csv:{tmp_path / 'head.csv'}", **section)
    (tmp_path / "ragged.csv").write_text("a,label\n1,2\n1,2,3,4\n")
    assert "can't be read as csv" in fault(f"csv:{tmp_path / 'ragged.csv'}", **section)
    (tmp_path / "bytes.csv").write_bytes(b"a,label\n\xff\xfe\xe9,1\n")
    assert "can't be read as csv" in fault(f"csv:{tmp_path / 'bytes.csv'}", **section)
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "can't be read as parquet" in fault(f"parquet:{tmp_path / 'text.parquet'}", **section)
    infinite = frame()
    infinite.loc[5, "age"] = np.inf
    assert "infinity" in fault(csv(tmp_path, infinite), **section)
    unlabelled = frame()
    unlabelled.loc[5, "label"] = None
    assert "1 rows have no label" in fault(csv(tmp_path, unlabelled), **section)
    one_class = frame().assign(label="yes")
    assert "fewer than 2 classes" in fault(csv(tmp_path, one_class), **section)
    strange = csv(tmp_path, frame().assign(label="maybe"), "strange.csv").removeprefix("csv:")
    assert "maybe" in fault(csv(tmp_path, frame()), test_source=strange, **section)
    narrow = csv(tmp_path, frame().drop(columns="age"), "narrow.csv").removeprefix("csv:")
    assert "without age" in fault(csv(tmp_path, frame()), test_source=narrow, **section)


def test_identifiers_are_not_one_hot_encoded(tmp_path: Path) -> None:
    assert "too many categories" in fault(csv(tmp_path, frame(3000)), target="label", calibration=10, validation=10)


def written(folder: Path, head: str, rows: Callable[[int], str], name: str = "written.csv") -> str:
    """A csv file of 40 rows, written as it stands."""
    (folder / name).write_text("\n".join([head, *(rows(index) for index in range(40))]) + "\n")
    return f"csv:{folder / name}"


@pytest.mark.parametrize("first", [0, 7])
def test_rows_longer_than_the_header_are_refused(tmp_path: Path, first: int) -> None:
    source = written(tmp_path, "a,b,y", lambda i: f"{i + first},{i * 2},{i % 2},")
    assert "more fields than the header" in fault(source, target="y")


@pytest.mark.parametrize("names", [("None", "Mild", "Severe"), ("NA", "EU"), ("null", "N/A"), ("NULL", "n/a", "EU")])
def test_labels_called_none_or_na_are_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = written(tmp_path, "a,y", lambda i: f"{i},{names[i % len(names)]}")
    test = written(tmp_path, "a,y", lambda i: f"{i},{names[0]}", "test.csv").removeprefix("csv:")
    data = load(source, target="y", test_source=test)
    assert data.classes == tuple(sorted(names))
    assert set(data.test.labels.tolist()) == {data.classes.index(names[0])}


@pytest.mark.parametrize("gap", ["", "?", "nan"])
def test_words_called_none_or_na_are_categories_and_gaps_are_missing(tmp_path: Path, gap: str) -> None:
    words = ["None", "NA", gap, "EU"]
    source = written(tmp_path, "word,a,y", lambda i: f"{words[i % 4]},{i},{i % 3 % 2}")
    data = load(source, target="y")
    assert data.features.categories == ((), ("<missing>", "EU", "NA", "None"))
    unheaded = written(tmp_path, "None,0,0", lambda i: f"{words[i % 4]},{i},{i % 3 % 2}")
    assert load(unheaded, target=2, header=False).features.categories == data.features.categories


def test_na_among_numbers_is_missing(tmp_path: Path) -> None:
    source = written(tmp_path, "a,b,y", lambda i: f"{'NA' if i % 4 == 0 else i},{i},{i % 2}")
    data = load(source, target="y")
    assert data.features.names == ("a", "b")
    assert np.isnan(data.train.show(range(len(data.train)))[:, 0]).any()
    unlabelled = written(tmp_path, "a,y", lambda i: f"{i},{'NA' if i == 3 else i % 2}")
    assert "1 rows have no label" in fault(unlabelled, target="y")


@pytest.mark.parametrize("header", [True, False])
def test_codes_in_the_test_file_are_those_of_training(tmp_path: Path, header: bool) -> None:
    def name(column: str, number: int) -> str | int:
        return column if header else number

    head = "code,a,y" if header else "X1,0,L1"
    source = written(tmp_path, head, lambda i: f"{('01', '02', 'X1')[i % 3]},{i},{('01', '02', 'L1')[i % 3]}")
    turned = "y,code,a" if header else "01,01,0"  # in a file with names the columns may stand in another order
    order = (lambda i: f"0{i % 2 + 1},0{i % 2 + 1},{i}") if header else (lambda i: f"0{i % 2 + 1},{i},0{i % 2 + 1}")
    test = written(tmp_path, turned if header else "01,0,01", order, "test.csv").removeprefix("csv:")
    data = load(source, test_source=test, header=header, target=name("y", 2))
    assert (whole(data.test)[:, 1:].sum(1) == 1).all()
    assert set(data.test.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(("row", "value"), [(None, "{}e300"), (None, "{}e154"), (5, "1e300")])
def test_numbers_too_large_to_be_standardised_are_refused(tmp_path: Path, row: int | None, value: str) -> None:
    source = written(tmp_path, "a,b,y", lambda i: f"{i},{value.format(i) if row in (None, i) else i},{i % 2}")
    message = fault(source, target="y")
    assert "the column 'b' holds numbers too large" in message


@pytest.mark.real
def test_nsl_kdd() -> None:
    folder = SHARED / "data" / "nsl-kdd"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    data = load(
        f"csv:{folder / 'train.csv'}",
        test_source=str(folder / "test.csv"),
        header=False,
        target=41,
        drop=[42],
        target_groups={"normal": ["normal"], "attack": "*"},
    )
    assert (len(data.features.names), data.input_shape, len(data.test)) == (41, (118,), 22544)
    assert [len(split) for split in splits(data)][:3] == [21144, 2048, 2000]
    assert all(torch.isfinite(whole(split)).all() for split in (data.calibration, data.validation))
    assert int(data.test.labels.sum()) == 12833
