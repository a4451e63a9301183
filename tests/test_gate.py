"""The gate for CI: what passes, what fails, what can't be judged."""

import json

import pytest
from pydantic import TypeAdapter
from test_scorecard import row, student

from causal_compress.cli import main
from causal_compress.deploy.gate import Limits, judge
from causal_compress.errors import UsageError
from causal_compress.results import Scorecard


def card(**changes):
    fast = {"runtime": "onnxruntime", "drop_pp": 0.3, "drop_ci_pp": (0.1, 0.5), **changes}
    return Scorecard(
        verdict="PASS", reasons=(), notes=(), rows=(row("teacher", runtime="onnxruntime"), student(**fast))
    )


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        ({"max_drop_pp": 0.5}, "PASS"),
        ({"max_drop_pp": 0.49}, "INCONCLUSIVE"),
        ({"max_drop_pp": 0.1}, "INCONCLUSIVE"),
        ({"max_drop_pp": 0.09}, "FAIL"),
        ({"min_speedup": 1.8}, "PASS"),
        ({"min_speedup": 1.81}, "INCONCLUSIVE"),
        ({"min_speedup": 2.0}, "INCONCLUSIVE"),
        ({"min_speedup": 2.01}, "FAIL"),
        ({"max_drop_pp": 0.5, "min_speedup": 3.0}, "FAIL"),
        ({"max_drop_pp": 0.3, "min_speedup": 1.5}, "INCONCLUSIVE"),
    ],
)
def test_whole_intervals_are_judged(limits, verdict):
    gated = judge(card(), Limits(**limits))
    assert gated.verdict == verdict
    assert gated.text.startswith(f"{verdict} on onnxruntime fp32, batch 1, 1 thread(s): ")
    assert "\n" not in gated.text
    assert "interval" in gated.text
    assert ("n = 1,000" in gated.text) == ("max_drop_pp" in limits)
    assert ("100 rounds" in gated.text) == ("min_speedup" in limits)


def test_nothing_to_judge_is_refused():
    with pytest.raises(UsageError, match="--max-drop"):
        judge(card(), Limits())


@pytest.mark.parametrize("other", [{"runtime": "openvino"}, {"batch": 64}, {"threads": 2}, {"precision": "int8"}])
def test_what_was_not_measured_is_refused_and_what_was_is_listed(other):
    with pytest.raises(UsageError, match="found: onnxruntime fp32, batch 1, threads 1"):
        judge(card(), Limits(max_drop_pp=1.0, **other))


def test_the_row_that_was_asked_for_is_judged():
    slow = student(runtime="onnxruntime", precision="int8", speedup=0.9, speedup_ci=(0.8, 1.0))
    both = Scorecard(verdict="PASS", reasons=(), notes=(), rows=(*card().rows, slow))
    assert judge(both, Limits(min_speedup=1.5, precision="fp32")).verdict == "PASS"
    assert judge(both, Limits(min_speedup=1.5, precision="int8")).verdict == "FAIL"


def test_the_chosen_form_is_judged_where_none_was_asked_for(tmp_path, capsys):
    eight = student(runtime="onnxruntime", precision="int8", drop_pp=3.0, drop_ci_pp=(2.0, 4.0))
    both = Scorecard(verdict="PASS", reasons=(), notes=(), rows=(*card().rows, eight))
    gated = judge(both, Limits(max_drop_pp=1.0))
    assert (gated.verdict, gated.precision) == ("FAIL", "int8")
    assert judge(card(), Limits(max_drop_pp=1.0)).precision == "fp32"
    path = tmp_path / "card.json"
    path.write_bytes(TypeAdapter(Scorecard).dump_json(both))
    assert main(["gate", str(path), "--max-drop", "1"]) == 3
    assert main(["gate", str(path), "--max-drop", "1", "--precision", "fp32"]) == 0
    assert "onnxruntime int8" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "code"), [("0.5", 0), ("0.05", 3), ("0.3", 4)])
def test_exit_codes_and_one_line(limit, code, tmp_path, capsys):
    path = tmp_path / "card.json"
    path.write_bytes(TypeAdapter(Scorecard).dump_json(card()))
    assert main(["gate", str(path), "--max-drop", limit]) == code
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["gate", str(path), "--max-drop", limit, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["verdict"] == {0: "PASS", 3: "FAIL", 4: "INCONCLUSIVE"}[code]


def test_what_is_no_run_and_no_scorecard_is_refused(tmp_path, capsys):
    assert main(["gate", str(tmp_path / "absent"), "--max-drop", "1"]) == 1
    (tmp_path / "x.json").write_text("{}")
    assert main(["gate", str(tmp_path / "x.json"), "--max-drop", "1"]) == 1
    assert "is no scorecard" in capsys.readouterr().err
