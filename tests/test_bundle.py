"""Packages that replace packages, forms that can't be shipped, and names of several targets."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from causal_compress.afterwards import benchmark_targets
from causal_compress.cli import main
from causal_compress.deploy import bundle, tensorrt, versus
from causal_compress.deploy.bundle import Source, Wish, write_package
from causal_compress.deploy.onnx import export
from causal_compress.deploy.runtimes import OnnxRuntime, for_any_batch
from causal_compress.deploy.targets import PACKAGE, choose_entries, files_of, model_files, read_package
from causal_compress.deploy.tensorrt import EngineOptions
from causal_compress.errors import ExportError, RunFolderError, UsageError
from causal_compress.files import sha256_of_file
from causal_compress.inputs.data import load_data
from causal_compress.recipe import BenchmarkSection, DataSection, ExportSection
from causal_compress.results import Accuracy, EngineInfo, Quantized, QuantizedFile

QUICK = BenchmarkSection(batches=[1], repeats=10, seconds=0.05, threads=[1])


def network(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    section = DataSection(source="sklearn:digits", calibration=64, validation=70)
    data = load_data(section, seed=0)
    teacher, student = network(16), network(4)
    folder = tmp_path_factory.mktemp("run")
    export(student, teacher, data, ExportSection(inputs=16), folder)
    return Source(folder, teacher, student, data, section, ExportSection(inputs=70))


@pytest.fixture(scope="module")
def package(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages") / "one"
    write_package(source, Wish("onnx"), folder)
    return folder


# ---- the folder


def test_a_foreign_package_json_is_not_deleted(source, tmp_path):
    (tmp_path / PACKAGE).write_text('{"name": "my-web-site"}')
    with pytest.raises(RunFolderError, match="not a package"):
        write_package(source, Wish("onnx"), tmp_path)
    assert (tmp_path / PACKAGE).read_text() == '{"name": "my-web-site"}'


def test_a_refused_export_leaves_the_older_package_whole(source, package, tmp_path):
    folder = Path(shutil.copytree(package, tmp_path / "p"))
    before = {path.name: sha256_of_file(path) for path in folder.iterdir()}
    with pytest.raises(RunFolderError, match="no model"):
        write_package(source, Wish("int8"), folder)
    with pytest.raises(ExportError, match="differs from PyTorch"):
        write_package(replace(source, student=network(4)), Wish("onnx"), folder)
    assert {path.name: sha256_of_file(path) for path in folder.iterdir()} == before
    read_package(folder)


def test_replacing_a_package_removes_its_files_and_only_those(source, package, tmp_path):
    folder = Path(shutil.copytree(package, tmp_path / "p"))
    (folder / "notes.txt").write_text("mine")
    written = write_package(source, Wish("pt2", teacher=False), folder)
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "parity.npz", PACKAGE, "notes.txt"}
    assert read_package(folder) == written


def test_a_package_json_that_points_elsewhere_deletes_nothing_there(source, package, tmp_path):
    folder = Path(shutil.copytree(package, tmp_path / "p"))
    (tmp_path / "precious").write_text("x")
    (folder / PACKAGE).write_text(json.dumps(json.loads((folder / PACKAGE).read_text()) | {"inputs": "../precious"}))
    write_package(source, Wish("onnx"), folder)
    assert (tmp_path / "precious").is_file()


# ---- forms that can't be shipped


def test_fp16_that_cant_be_written_is_left_out_and_the_rest_is_shipped(source, tmp_path):
    student = network(4)
    with torch.no_grad():
        student[1].weight.fill_(1e6)
        student[3].weight.mul_(1e-6)
    for path in source.folder.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    limits = ExportSection(inputs=16, max_abs_diff=1e3)
    export(student, source.teacher, source.data, limits, tmp_path)
    run = replace(source, folder=tmp_path, student=student, parity=limits)
    written = write_package(run, Wish("onnx", ("fp32", "fp16")), tmp_path / "out")
    assert [(model.role, model.precision) for model in written.models] == [
        ("teacher", "fp32"),
        ("student", "fp32"),
        ("teacher", "fp16"),
    ]
    assert [skip.what for skip in written.skipped] == ["student fp16"]
    assert "can't be held in 16 bits" in written.skipped[0].reason
    read_package(tmp_path / "out")


class Overflowing:
    """ONNX Runtime's CPU computes FP16 in 32 bits, so the overflow of a GPU has to be acted here."""

    def __init__(self, path):
        self.inner = OnnxRuntime.load(path)
        self.broken = path.name == "model.fp16.onnx"

    def run(self, x):
        return self.inner.run(x) * (np.nan if self.broken else 1)


def test_fp16_whose_activations_overflow_is_left_out_and_the_rest_is_shipped(source, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "open_runtime", lambda name, path, *, threads: Overflowing(path))
    written = write_package(source, Wish("onnx", ("fp32", "fp16")), tmp_path / "out")
    assert len(written.models) == 3
    assert [skip.what for skip in written.skipped] == ["student fp16"]
    assert "activations overflow 16 bits" in written.skipped[0].reason
    assert not (tmp_path / "out" / "model.fp16.onnx").exists()
    read_package(tmp_path / "out")
    with pytest.raises(ExportError, match="no model could be written"):
        write_package(source, Wish("onnx", ("fp16",)), tmp_path / "other")


def with_int8(source, folder, sha256=None):
    """The run with an "INT8" file that missed its budget (the FP32 file serves)."""
    for path in source.folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(folder / "model.onnx", folder / "model.int8.onnx")
    accuracy = Accuracy(pct=85.7, n=70, low_pct=76.0, high_pct=92.0)
    file = QuantizedFile(
        onnx="model.int8.onnx",
        family="cpu",
        sha256=sha256 or sha256_of_file(folder / "model.int8.onnx"),
        size_bytes=1,
        size_ratio=1.0,
        layers=2,
        excluded=(),
        method="minmax",
        method_kl={},
        kl=0.1,
        scored=70,
        bias_corrected=(),
        n=70,
        agreement_pct=90.0,
        max_abs_diff=0.1,
        accuracy=accuracy,
        drop_pp=7.25,
        drop_ci_pp=(1.5, 13.0),
        within_budget=False,
    )
    nothing = dict.fromkeys(("runtime", "fp32_latency_ms_p50", "int8_latency_ms_p50", "speedup", "speedup_ci"))
    quantized = Quantized(
        files=(file,),
        fp32=accuracy,
        fp32_size_bytes=1,
        calibration=64,
        batch=1,
        rounds=0,
        chosen="fp32",
        reason="INT8 is slow here",
        **nothing,
    )
    return replace(source, folder=folder, quantized=quantized)


def test_int8_that_missed_its_budget_says_so(source, tmp_path):
    written = write_package(with_int8(source, tmp_path), Wish("int8"), tmp_path / "out")
    note = next(model.note for model in written.models if model.precision == "int8")
    assert "7.25 pp (95 % interval 1.50 to 13.00)" in note
    assert "MISSES quantize.max_accuracy_drop" in note
    assert "INT8 is slow here" in note
    assert all(model.note == "" for model in written.models if model.precision != "int8")


def test_an_int8_file_that_was_exchanged_is_refused(source, tmp_path):
    with pytest.raises(RunFolderError, match="not the file that the run measured"):
        write_package(with_int8(source, tmp_path, sha256="0" * 64), Wish("int8"), tmp_path / "out")


# ---- engines and their batches


class Narrow:
    """ONNX Runtime with an engine's profile."""

    def __init__(self, path, low, high):
        self.inner, self.limits, self.seen = OnnxRuntime.load(path), (low, high), []

    def run(self, x):
        self.seen.append(len(x))
        if not self.limits[0] <= len(x) <= self.limits[1]:
            raise UsageError("beyond the profile", remedy="none")
        return self.inner.run(x)

    def describe(self):
        return "narrow"


@pytest.mark.parametrize(
    ("low", "high", "sizes"), [(1, 1, (1,)), (8, 16, (8, 16)), (128, 128, (128, 128)), (1, 64, (1, 7, 64))]
)
def test_parity_of_engines_keeps_to_their_profile(source, tmp_path, monkeypatch, low, high, sizes):
    def build(onnx, path, options):
        path.write_bytes(b"engine")
        tensorrt.sidecar(path).write_text("{}")
        return EngineInfo(
            runtime="tensorrt",
            version="10.3",
            capability="SM89",
            precision="fp32",
            onnx_sha256="",
            engine_sha256="",
            input_shape=(1, 8, 8),
            profile=(low, low, high),
            workspace_bytes=1,
            hardware_compatible=False,
            version_compatible=False,
            build_seconds=0.0,
            size_bytes=6,
        )

    opened = []

    def open_narrow(name, path, *, threads):
        role = "teacher" if path.name.startswith("teacher") else "model"
        opened.append(Narrow(source.folder / f"{role}.onnx", low, high))
        return opened[-1]

    monkeypatch.setattr(bundle, "build_engine", build)
    monkeypatch.setattr(bundle, "absence", lambda name: None)
    monkeypatch.setattr(bundle, "_is_here", lambda capability: True)
    monkeypatch.setattr(bundle, "open_runtime", open_narrow)
    options = EngineOptions(batches=(low, high))
    written = write_package(source, Wish("tensorrt", ("fp32",), engine=options), tmp_path / "out")
    for model in written.models:
        assert model.parity_on == "tensorrt"
        assert model.parity.inputs == 70
        assert model.parity.max_abs_diff < 1e-4
        assert set(model.parity.batches) == set(sizes)
        assert any(name.endswith(".onnx") for name in model.files)  # what its parity may be that of
    read_package(tmp_path / "out")


def test_batches_are_cut_and_filled_up(source):
    x = np.random.default_rng(0).standard_normal((21, 1, 8, 8)).astype(np.float32)
    narrow = Narrow(source.folder / "model.onnx", 4, 8)
    np.testing.assert_allclose(for_any_batch(narrow)(x), narrow.inner.run(x), atol=1e-5)
    assert narrow.seen == [8, 8, 5]
    assert len(for_any_batch(narrow)(x[:1])) == 1


def test_an_engine_that_cant_run_a_batch_size_is_left_out_and_the_others_are_timed(package, monkeypatch):
    def open_one(name, path, *, threads, batches=None):
        assert batches == (1, 4)
        return Narrow(path, 1, 1) if path.name == "model.onnx" else OnnxRuntime.load(path)

    monkeypatch.setattr(versus, "open_runtime", open_one)
    section = QUICK.model_copy(update={"batches": [1, 4]})
    table = benchmark_targets([package], section, runtimes=["onnxruntime"])
    assert {row.target for row in table.rows} == {"teacher"}
    assert [skip.what for skip in table.skipped] == ["student fp32 on onnxruntime"]
    assert "batch of 4" in table.skipped[0].reason


def test_turing_is_known_by_its_device_too(source, tmp_path, monkeypatch):
    built = []

    def keep(trt, content, options, name):
        built.append(content)
        return b"engine", (1, 8, 8)

    trt = SimpleNamespace(__version__="1.7")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    monkeypatch.setattr(tensorrt, "_build", keep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    info = tensorrt.build_engine(source.folder / "model.onnx", tmp_path / "e", EngineOptions())
    assert info.capability == "SM75"
    assert "2 linear layer(s) built as 1x1 convolutions" in info.notes[0]
    assert b"as_conv" in built[0]


# ---- several targets


def test_targets_of_one_name_are_told_apart(source, package, tmp_path):
    for place in ("x", "y"):
        shutil.copytree(package, tmp_path / place / "pkg")
        shutil.copytree(source.folder, tmp_path / place / "run")
    names = {
        place: {file.target for file in files_of([tmp_path / one for one in place.split()])}
        for place in ("x/pkg", "x/pkg y/pkg", "x/run y/run", "x/run/model.onnx y/run/model.onnx", "x/run x/run")
    }
    assert names["x/pkg"] == {"teacher", "student"}
    assert names["x/pkg y/pkg"] == {f"{place}/pkg {role}" for place in "xy" for role in ("teacher", "student")}
    assert names["x/run y/run"] == {f"{place}/run {role}" for place in "xy" for role in ("teacher", "student")}
    assert names["x/run/model.onnx y/run/model.onnx"] == {"x/run/model.onnx", "y/run/model.onnx"}
    assert {name[-2:] for name in names["x/run x/run"]} == {"#1", "#2"}


def test_agreement_is_with_the_answers_of_ones_own_package(source, package, tmp_path):
    other = network(4)
    (tmp_path / "run").mkdir()
    export(other, source.teacher, source.data, ExportSection(inputs=16), tmp_path / "run")
    second = tmp_path / "second"
    write_package(replace(source, folder=tmp_path / "run", student=other), Wish("onnx"), second)
    table = benchmark_targets([package, second], QUICK, runtimes=["onnxruntime"])
    assert {row.target: row.agreement_pct for row in table.rows} == {
        f"{folder} {role}": 100.0 for folder in ("one", "second") for role in ("teacher", "student")
    }


def test_a_runtime_that_was_asked_for_does_not_vanish(package):
    entries, skipped = choose_entries(model_files(package), ("onnxruntime", "torch"), ())
    assert {entry.runtime for entry in entries} == {"onnxruntime"}
    assert [skip.what for skip in skipped] == ["torch"]
    assert "pt2" in skipped[0].reason


# ---- how --data is read


def test_data_for_a_package_are_prepared_as_the_package_says(source, tmp_path, capsys, monkeypatch):
    prepared = source.prepared.model_copy(
        update={"normalize": source.prepared.normalize.model_copy(update={"mean": [0.25], "std": [0.5]})}
    )
    write_package(replace(source, prepared=prepared), Wish("onnx"), tmp_path / "p")
    seen = []

    def keep(targets, section, *, data, **rest):
        seen.append(data.data)
        raise UsageError("enough", remedy="none")

    monkeypatch.setattr("causal_compress.afterwards.benchmark_targets", keep)
    assert main(["benchmark", str(tmp_path / "p"), "--data", "sklearn:digits", "-q"]) == 2
    assert (seen[0].source, seen[0].normalize.mean, seen[0].normalize.std) == ("sklearn:digits", [0.25], [0.5])
    write_package(replace(source, prepared=prepared.model_copy(update={"image_size": 8})), Wish("onnx"), tmp_path / "p")
    assert main(["benchmark", str(tmp_path / "p"), "--data", "sklearn:digits", "-q"]) == 2
    assert len(seen) == 1
    assert "does not say how --data is to be prepared" in capsys.readouterr().err
