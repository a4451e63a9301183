"""Tables as other programs write them: one odd cell, blanks after commas, money, durations, rows that come twice."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_sample import fault, load, whole


def written(folder: Path, head: str, row: Callable[[int], str], name: str = "table.csv", n: int = 60) -> str:
    (folder / name).write_text("\n".join([head, *(row(index) for index in range(n))]) + "\n")
    return f"csv:{folder / name}"


@pytest.mark.parametrize("form", ["{}", "{}.0", "0{}"])
@pytest.mark.parametrize("header", [True, False])
def test_a_word_in_the_test_file_is_the_only_unknown_category(tmp_path: Path, form: str, header: bool) -> None:
    def row(grade: str, i: int) -> str:
        return f"{grade},{i},{i % 2}"

    train = written(tmp_path, row("1", 1) if not header else "grade,a,y", lambda i: row(form.format(i % 3 + 1), i))
    words = {0: "unknown", 1: "NA", 2: ""}
    test = written(
        tmp_path,
        row("1", 1) if not header else "grade,a,y",
        lambda i: row(words.get(i, form.format(i % 3 + 1)), i),
        "test.csv",
    ).removeprefix("csv:")
    names = {"target": "y", "categorical": ["grade"]} if header else {"target": 2, "categorical": [0]}
    data = load(train, test_source=test, header=header, **names)
    assert data.features.categories == ((), ("1", "2", "3"))
    codes = data.test.show(range(len(data.test)))[0 if header else 1 :, 1].tolist()
    assert codes == [-1, -1, -1, *(i % 3 for i in range(3, 60))]


def test_whole_numbers_too_large_for_a_float_stay_exact_beside_a_word(tmp_path: Path) -> None:
    codes = [9007199254740993, 9007199254740994, 9007199254740995]
    train = written(tmp_path, "code,a,y", lambda i: f"{codes[i % 3]},{i},{i % 2}")
    test = written(tmp_path, "code,a,y", lambda i: f"{codes[i % 3] if i else 'none'},{i},{i % 2}", "test.csv")
    data = load(train, test_source=test.removeprefix("csv:"), target="y", categorical=["code"])
    assert data.test.show(range(4))[:, 1].tolist() == [-1, 1, 2, 0]


def test_a_word_among_numbers_is_the_only_label_of_no_class(tmp_path: Path) -> None:
    train = written(tmp_path, "a,y", lambda i: f"{i},{i % 2}.0")
    test = written(tmp_path, "a,y", lambda i: f"{i},{i % 2 if i else 'maybe'}.0", "test.csv").removeprefix("csv:")
    message = fault(train, test_source=test, target="y")
    assert "found: maybe.0\n" in message


@pytest.mark.parametrize("header", [True, False])
def test_blanks_after_commas_belong_to_no_cell(tmp_path: Path, header: bool) -> None:
    words = ['"in, out"', "?", "NA", "out"]

    def row(blank: str) -> Callable[[int], str]:
        return lambda i: f",{blank}".join((str(i), "?" if i % 7 == 3 else str(i * 2), words[i % 4], "no" * (i % 2 + 1)))

    names = {"target": "y"} if header else {"target": 3}
    spaced = load(written(tmp_path, 'a, "b, c", d, y' if header else row(" ")(1), row(" ")), header=header, **names)
    dense = load(written(tmp_path, 'a,"b, c",d,y' if header else row("")(1), row("")), header=header, **names)
    assert spaced.features.names == (("a", "b, c", "d") if header else ("column_0", "column_1", "column_2"))
    assert spaced.features.categories == ((), (), ("<missing>", "NA", "in, out", "out"))
    assert spaced.classes == ("no", "nono")
    assert spaced.fingerprint == dense.fingerprint


def test_rows_longer_than_the_header_are_refused_behind_blanks(tmp_path: Path) -> None:
    assert "more fields than the header" in fault(written(tmp_path, 'y, "a, b"', lambda i: f"{i}, 1, "), target="y")


def test_decimals_and_durations_of_a_parquet_file_are_numbers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    cents = np.arange(60) * 125
    table = pd.DataFrame(
        {
            "price": [Decimal(int(value)) / 100 if value else None for value in cents],
            "wait": pd.to_timedelta([None, *cents[1:]], unit="min"),
            "y": [Decimal(i % 2) for i in range(60)],
        }
    )
    table.to_parquet(tmp_path / "table.parquet")
    data = load(f"parquet:{tmp_path / 'table.parquet'}", target="y")
    assert data.features.categories == ((), ())
    assert data.classes == ("0", "1")
    wanted = np.stack([cents / 100, cents * 60], axis=1)
    wanted[0] = np.nan
    np.testing.assert_array_equal(data.train.show(range(len(data.train))), wanted[data.train.positions])


def test_test_rows_that_are_training_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def row(i: int) -> str:
        return f"{i // 2 if i else ''},{'ab'[i // 2 % 2]},{i // 2 % 2}"

    data = load(written(tmp_path, "a,b,y", row, n=80), target="y")
    train, test = ({tuple(x) for x in whole(split).tolist()} for split in (data.train, data.test))
    copies = sum(tuple(x) in train for x in whole(data.test).tolist())
    assert copies > 2
    assert len(test) > copies
    assert f"{copies} of 16 test rows are equal to training rows" in caplog.text
    caplog.clear()
    load(written(tmp_path, "a,b,y", lambda i: f"{i},{'ab'[i % 2]},{i % 2}"), target="y")
    assert "equal to training rows" not in caplog.text
    apart = written(tmp_path, "a,b,y", lambda i: f"{i + (0 if i < 9 else 900)},{'ab'[i % 2]},1", "test.csv")
    data = load(f"csv:{tmp_path / 'table.csv'}", test_source=apart.removeprefix("csv:"), target="y")
    held_out = {*data.calibration.positions.tolist(), *data.validation.positions.tolist()}
    assert f"{9 - len(held_out & set(range(9)))} of 60 test rows are equal" in caplog.text
