"""Targets, packages, and whether a difference in latency is one."""

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from causal_compress.cli import main
from causal_compress.deploy.bundle import Source, Wish, read_inputs, write_package
from causal_compress.deploy.onnx import export
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.deploy.targets import ModelFile, choose_entries, input_shape, model_files, read_package
from causal_compress.deploy.tensorrt import EngineOptions
from causal_compress.deploy.timing import compare_latencies, percentiles, speed_verdict, time_in_turn
from causal_compress.deploy.traffic import Traffic, onnx_traffic, why_no_speed
from causal_compress.errors import DataError, ExportError, MissingPackageError, RunFolderError, UsageError
from causal_compress.inputs.data import load_data
from causal_compress.recipe import DataSection, ExportSection

ROOT = Path(__file__).resolve().parents[1]
openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


# ---- is a difference one


def noisy(rng, centre, n=100):
    """Latencies with the right tail of a real machine."""
    return centre * (1 + rng.exponential(0.03, n))


def neighbour(rng, busy, n=100):
    """How a busy neighbour slows stretches of ten rounds, whichever model is called in them."""
    return np.repeat(np.where(rng.random(n // 10) < busy, rng.uniform(1.2, 3.0, n // 10), 1.0), 10)


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.6])
def test_the_same_latencies_read_no_difference(busy):
    rng = np.random.default_rng(1)
    verdicts = []
    for seed in range(100):
        slowed = neighbour(rng, busy)
        verdicts.append(compare_latencies(noisy(rng, 1.0) * slowed, noisy(rng, 1.0) * slowed, seed=seed).verdict)
    assert verdicts.count("no difference") >= 97


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.6])
def test_a_true_difference_is_seen_and_never_flipped(busy):
    rng = np.random.default_rng(2)
    verdicts = []
    for seed in range(50):
        slowed = neighbour(rng, busy)
        verdicts.append(compare_latencies(noisy(rng, 1.2) * slowed, noisy(rng, 1.0) * slowed, seed=seed).verdict)
    assert "slower" not in verdicts
    assert verdicts.count("faster") >= {0.0: 50, 0.3: 40, 0.6: 5}[busy]


def test_interruptions_that_meet_the_longer_call_more_often_do_not_exaggerate():
    rng = np.random.default_rng(3)
    reference, other = noisy(rng, 2.0, 400), noisy(rng, 1.0, 400)
    reference[rng.random(400) < 0.4] += 4.0
    other[rng.random(400) < 0.2] += 4.0
    assert 1.9 < compare_latencies(reference, other).value < 2.2


def test_the_margin_by_hand():
    assert [speed_verdict(*ends) for ends in ((1.031, 1.2), (1.02, 1.2), (0.8, 0.97), (0.8, 0.98), (0.5, 2))] == [
        "faster",
        "no difference",
        "slower",
        "no difference",
        "no difference",
    ]


def test_ratio_by_hand_and_its_refusals():
    ratio = compare_latencies(np.full(10, 3.0), np.full(10, 2.0))
    assert (ratio.value, ratio.low, ratio.high, ratio.rounds) == (1.5, 1.5, 1.5, 10)
    for pair in ((np.ones(3), np.ones(3)), (np.ones(10), np.ones(9)), (np.zeros(10), np.ones(10))):
        with pytest.raises(DataError):
            compare_latencies(*pair)


def test_percentiles_lie_in_their_intervals():
    spread = percentiles(np.random.default_rng(0).exponential(1.0, 300))
    for value, (low, high) in spread.values():
        assert low <= value <= high
    assert spread[50][0] < spread[95][0] < spread[99][0]


def test_calls_take_turns_and_every_order_is_reversed():
    order = []
    calls = [lambda which=which: order.append(which) for which in range(3)]
    taken = time_in_turn(calls, repeats=11, seconds=5.0)
    assert [len(column) for column in taken] == [12, 12, 12]
    rounds = np.array(order[-36:]).reshape(6, 6)
    assert (rounds[:, :3] == rounds[:, :2:-1]).all()
    assert len({tuple(row) for row in rounds}) > 1


def test_time_limit_counts_for_each_call():
    start = time.perf_counter()
    taken = time_in_turn([lambda: time.sleep(0.002)] * 2, repeats=10_000, seconds=0.05)
    assert 10 <= len(taken[0]) < 60
    assert time.perf_counter() - start < 10.0  # all of them would take 40


# ---- why fewer MACs bring no speed


BEFORE = Traffic(macs=1000, operators=40, activation_bytes=900, weight_bytes=100)


def test_reasons_by_hand():
    half = Traffic(macs=500, operators=40, activation_bytes=850, weight_bytes=50)
    assert why_no_speed(BEFORE, half, 1.9, {1: (2.0, 1.0)}) is None
    assert why_no_speed(half, BEFORE, 0.5, {1: (1.0, 2.0)}) is None  # MACs did not fall
    launch = why_no_speed(BEFORE, half, 1.1, {1: (1.1, 1.0), 64: (2.0, 1.6)})
    assert "launch-bound: 99 %" in launch
    assert "memory-bound: 0.90 of the bytes" in why_no_speed(BEFORE, half, 1.1, {1: (1.1, 1.0), 64: (70.0, 64.0)})
    lean = Traffic(macs=500, operators=40, activation_bytes=450, weight_bytes=50)
    assert "plan.align" in why_no_speed(BEFORE, lean, 1.1, {1: (1.1, 1.0), 64: (70.0, 64.0)})


# ---- a package


class Small(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    section = DataSection(source="sklearn:digits", calibration=100, validation=90)
    data = load_data(section, seed=0)
    teacher, student = Small(16).eval(), Small(4).eval()
    folder = tmp_path_factory.mktemp("run")
    export(student, teacher, data, ExportSection(inputs=16), folder)
    return Source(folder, teacher, student, data, section, ExportSection(inputs=64))


@pytest.fixture(scope="module")
def package(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    return folder, write_package(source, Wish("onnx", precisions=("fp32", "fp16")), folder)


def test_onnx_cost_by_hand(source):
    cost = onnx_traffic((source.folder / "model.onnx").read_bytes())
    assert cost.macs == 64 * 4 * 9 + 4 * 10
    assert cost.operators >= 4
    assert cost.activation_bytes >= 4 * (2 * 256 + 4 + 10)


def test_package_holds_what_the_target_needs(package, source):
    folder, written = package
    assert read_package(folder) == written
    assert {(model.role, model.precision) for model in written.models} == {
        (role, precision) for role in ("teacher", "student") for precision in ("fp32", "fp16")
    }
    assert (written.input_shape, written.macs["student"]) == ((1, 8, 8), 64 * 4 * 9 + 40)
    stored = read_inputs(folder, written)
    assert stored["inputs"].shape == (written.inputs_count, 1, 8, 8)
    np.testing.assert_allclose(
        OnnxRuntime.load(folder / "model.onnx").run(stored["inputs"]), stored["logits_student"], atol=1e-5
    )
    x, y = source.data.validation.take(range(written.inputs_count))
    np.testing.assert_array_equal(stored["inputs"], x.numpy())
    np.testing.assert_array_equal(stored["labels"], y.numpy())
    for model in written.models:
        assert (model.parity.inputs, model.parity_on) == (64, "onnxruntime")
        assert model.parity.max_abs_diff < (1e-4 if model.precision == "fp32" else 0.05)


@pytest.mark.parametrize("name", ["model.onnx", "parity.npz"])
def test_a_package_that_is_not_whole_is_refused(package, tmp_path, name):
    copy = Path(shutil.copytree(package[0], tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes() + b"x")
    with pytest.raises(RunFolderError, match=f"changed since they were written: {name}"):
        read_package(copy)
    (copy / name).unlink()
    with pytest.raises(RunFolderError, match=name):
        read_package(copy)
    (copy / "package.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"package\.json"):
        read_package(copy)


def test_a_foreign_folder_is_left_alone(source, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunFolderError, match="not a package"):
        write_package(source, Wish("onnx"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_student_that_is_another_is_refused(source, tmp_path):
    import dataclasses

    other = dataclasses.replace(source, student=Small(4).eval())
    with pytest.raises(ExportError, match="differs from PyTorch"):
        write_package(other, Wish("onnx"), tmp_path / "out")
    assert not (tmp_path / "out" / "package.json").exists()


def test_int8_needs_a_quantized_run(source, tmp_path):
    with pytest.raises(RunFolderError, match=r"no model\.int8\.onnx"):
        write_package(source, Wish("int8"), tmp_path)


def test_pt2_and_no_teacher(source, tmp_path):
    written = write_package(source, Wish("pt2", teacher=False), tmp_path)
    assert [(model.role, model.kind, model.parity_on) for model in written.models] == [("student", "pt2", "torch")]
    with pytest.raises(UsageError, match="FP32"):
        write_package(source, Wish("pt2", precisions=("fp16",)), tmp_path)


@openvino
def test_openvino_package(source, tmp_path):
    written = write_package(source, Wish("openvino"), tmp_path)
    assert {tuple(model.files) for model in written.models} == {
        ("teacher.fp32.xml", "teacher.fp32.bin"),
        ("model.fp32.xml", "model.fp32.bin"),
    }
    assert all(model.parity_on == "openvino" and model.parity.max_abs_diff < 1e-4 for model in written.models)
    assert not list(tmp_path.glob("*.onnx"))


@rtx
def test_engines_are_packaged_and_what_was_not_run_is_said(source, tmp_path):
    options = EngineOptions(batches=(1, 4))
    written = write_package(source, Wish("tensorrt-rtx", ("fp16",), ("SM86", "SM120"), options), tmp_path)
    assert [model.capability for model in written.models] == ["SM86", "SM120"] * 2
    for model in written.models:
        assert (tmp_path / next(iter(model.files))).stat().st_size == model.size_bytes
        assert "parity is that of" in model.note
        assert model.parity_on == "onnxruntime"


# ---- what runs where


def test_files_find_their_runtimes(package, source):
    files = model_files(package[0])
    assert [file.target for file in files] == ["teacher", "teacher", "student", "student"]
    entries, skipped = choose_entries(files, ("onnxruntime",), ("fp32",))
    assert [entry.file.path.name for entry in entries] == ["teacher.onnx", "model.onnx"]
    assert skipped == ()
    everywhere, left = choose_entries(model_files(source.folder), (), ())
    assert {entry.runtime for entry in everywhere} >= {"torch", "onnxruntime"}
    assert "torch-compiled" not in {entry.runtime for entry in everywhere}
    for skip in left:
        assert "install" in skip.reason or "GPU" in skip.reason


def test_int8_files_go_to_their_own_family_only():
    plain = ModelFile("m", "onnx", "int8", Path("model.int8.onnx"))
    signed = ModelFile("m", "onnx", "int8", Path("model.int8.trt.onnx"))
    (only,) = choose_entries((plain, signed), ("onnxruntime",), ())[0]
    assert only.file is plain


def test_what_cant_be_measured_is_refused(package, tmp_path, monkeypatch):
    files = model_files(package[0])
    with pytest.raises(UsageError, match="fp32"):
        choose_entries(files, (), ("int8",))
    with pytest.raises(UsageError, match="nothing here can run"):
        choose_entries(files, ("torch",), ())
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingPackageError, match="onnxruntime-gpu"):
        choose_entries(files, ("onnxruntime-cuda",), ())
    with pytest.raises(RunFolderError, match="no such file"):
        model_files(tmp_path / "absent.onnx")
    with pytest.raises(RunFolderError, match="nothing to benchmark"):
        model_files(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"a\.txt"):
        model_files(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_files_tell_their_input_shape(source, name):
    assert input_shape(model_files(source.folder / name)[0]) == (1, 8, 8)


# ---- the command


def test_benchmark_of_files_as_json_and_csv(source, capsys):
    files = [str(source.folder / name) for name in ("teacher.onnx", "model.onnx")]
    quick = ["--runtime", "onnxruntime", "--repeats", "10", "--batch", "1,4", "-q"]
    assert main(["benchmark", *files, *quick, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [(row["target"], row["batch"]) for row in table["rows"]] == [
        (name, batch) for batch in (1, 4) for name in ("teacher.onnx", "model.onnx")
    ]
    assert table["rows"][0]["verdict"] == "reference"
    assert table["rows"][1]["verdict"] in ("faster", "slower", "no difference")
    assert table["rows"][0]["accuracy"] is None
    assert table["machine"]["cpu"]
    data = ["--data", "sklearn:digits", "--set", "data.max_test=50"]
    assert main(["benchmark", *files, *quick, *data, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 4
    assert rows[0]["accuracy_n"] == "50"
    assert float(rows[1]["drop_ci_pp_low"]) <= float(rows[1]["drop_pp"]) <= float(rows[1]["drop_ci_pp_high"])


def test_a_copied_package_is_measured_with_one_command_and_nothing_else(package, tmp_path):
    shutil.copytree(package[0], tmp_path / "there")
    command = [sys.executable, "-m", "causal_compress", "benchmark", "there", "--runtime", "onnxruntime"]
    command += ["--repeats", "10", "--batch", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["notes"][0] == "accuracy: on the package's own inputs, from the validation split"
    rows = table["rows"]
    assert [(row["target"], row["precision"]) for row in rows] == [
        ("teacher", "fp32"),
        ("teacher", "fp16"),
        ("student", "fp32"),
        ("student", "fp16"),
    ]
    assert all(row["agreement_pct"] >= 99 for row in rows)
    assert all(row["accuracy"]["n"] == package[1].inputs_count for row in rows)
    assert all(row["peak_memory_bytes"] is not None for row in rows)
