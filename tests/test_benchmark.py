"""The benchmark: calls alternate, medians have intervals, and `no difference` is said where there is none."""

import dataclasses
import time

import numpy as np
import onnx
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from causal_compress.afterwards import benchmark_targets
from causal_compress.deploy.benchmark import Deployed, Pair, benchmark, count_agreement, deployed, time_interleaved
from causal_compress.deploy.memory import peak_memory
from causal_compress.deploy.onnx import export
from causal_compress.errors import DataError, ExportError
from causal_compress.recipe import BenchmarkSection, BudgetSection, ExportSection, Recipe
from causal_compress.results import Scorecard


class Split:
    def __init__(self, n: int, size: int = 8) -> None:
        self.x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.labels = torch.arange(n) % 4
        self.reads = 0

    def batches(self, batch_size, *, limit=None):
        self.reads += 1
        n = len(self.x) if limit is None else min(limit, len(self.x))
        for start in range(0, n, batch_size):
            stop = min(n, start + batch_size)
            yield self.x[start:stop], self.labels[start:stop]


class Data:
    def __init__(self) -> None:
        self.validation = Split(20)
        self.example_input = self.validation.x[:2]


def network(channels: int) -> nn.Module:
    torch.manual_seed(channels)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    ).eval()


class Fixed:
    """A runtime that takes so long and answers so."""

    def __init__(self, answers=(), seconds: float = 0.0, calls=None, name="") -> None:
        self.answers, self.seconds, self.calls, self.name = np.asarray(answers), seconds, calls, name
        self.seen = 0

    def run(self, x):
        if self.calls is not None:
            self.calls.append(self.name)
        time.sleep(self.seconds)
        rows = self.answers[self.seen : self.seen + len(x)]
        self.seen += len(x)
        return np.eye(4, dtype=np.float32)[rows] if len(rows) else np.zeros((len(x), 4), np.float32)

    def describe(self):
        return self.name


# ---- counting and timing


def test_agreement_by_hand():
    test = Split(6)  # labels 0 1 2 3 0 1
    pair = Pair("torch", 1, Fixed([0, 1, 2, 3, 1, 1]), Fixed([0, 0, 0, 3, 0, 1]))
    answers = count_agreement(pair, test)
    assert dataclasses.astuple(answers) == (6, 5, 4, 2, 1)


def test_calls_alternate_and_the_order_flips():
    calls: list[str] = []
    pair = Pair("torch", 1, Fixed(calls=calls, name="t"), Fixed(calls=calls, name="s"))
    teacher, learner = time_interleaved(pair, np.zeros((1, 3), np.float32), repeats=12, seconds=5)
    assert len(teacher) == len(learner) == 12
    assert "".join(calls[-24:]) == "tsst" * 6


def test_time_limit_reduces_rounds_but_not_below_ten():
    pair = Pair("torch", 1, Fixed(seconds=0.003), Fixed(seconds=0.001))
    teacher, learner = time_interleaved(pair, np.zeros((1, 3), np.float32), repeats=1000, seconds=0.001)
    assert len(teacher) == 10
    assert np.median(teacher) > np.median(learner) >= 1.0  # milliseconds


def test_memory_rises_with_weights_and_activations(tmp_path):
    data = Data()
    big = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 1024))
    export(big, network(2), data, ExportSection(inputs=8), tmp_path)
    for runtime, kind in (("onnxruntime", "onnx"), ("torch", "pt2")):
        large = peak_memory(runtime, tmp_path / f"model.{kind}", (3, 8, 8), (1, 4096), threads=1)
        assert large[1] > 16e6, runtime  # the linear layer's weights
        assert large[4096] - large[1] > 50e6, runtime  # 67 MB of the convolution's activations


def test_memory_of_a_failed_process_is_none(tmp_path):
    assert peak_memory("onnxruntime", tmp_path / "absent.onnx", (3,), (1,), threads=1) is None


# ---- the stage


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    teacher, learner = network(16), network(4)
    exported = export(learner, teacher, Data(), ExportSection(inputs=8), folder)
    test = Split(50)
    section = BenchmarkSection(batches=[1, 64], repeats=12, seconds=0.2)
    threads = torch.get_num_threads()
    card = benchmark(*deployed(exported, folder, teacher, learner), test, section, BudgetSection(macs=0.3))
    assert torch.get_num_threads() == threads
    return folder, teacher, learner, test, card


def test_rows_cover_models_runtimes_and_batches(measured):
    _, _, _, _, card = measured
    keys = [(row.runtime, row.batch, row.model) for row in card.rows]
    assert keys == [
        (runtime, batch, model)
        for runtime in ("torch", "onnxruntime")
        for batch in (1, 64)
        for model in ("teacher", "student")
    ]
    for row in card.rows:
        assert 0 < row.latency_ms_p50 <= row.latency_ms_p95 <= row.latency_ms_p99
        assert row.rounds >= 10
        assert row.n == 50
        assert row.peak_memory_bytes is not None


def test_facts_of_the_rows(measured):
    folder, teacher, learner, test, card = measured
    assert {row.macs for row in card.rows if row.model == "student"} == {36 * 4 * 27 + 4 * 4}
    assert {row.params for row in card.rows if row.model == "teacher"} == {16 * 28 + 4 * 17}
    for row in card.rows:
        stem = "model" if row.model == "student" else "teacher"
        kind = "pt2" if row.runtime == "torch" else "onnx"
        assert row.size_bytes == (folder / f"{stem}.{kind}").stat().st_size
        model = teacher if row.model == "teacher" else learner
        with torch.no_grad():
            right = (model(test.x).argmax(1) == test.labels).sum().item()
        assert row.accuracy_pct == pytest.approx(100 * right / 50)
    both = [row for row in card.rows if row.batch == 1 and row.runtime == "torch"]
    assert both[1].drop_pp == pytest.approx(both[0].accuracy_pct - both[1].accuracy_pct)
    assert both[0].speedup_ci == (1.0, 1.0)


def test_scorecard_survives_json_and_judges(measured):
    card = measured[-1]
    assert card.verdict == "PASS"  # 0.25 of the MACs
    adapter = TypeAdapter(Scorecard)
    assert adapter.validate_json(adapter.dump_json(card)) == card
    assert len(card.runtimes) == 2


def test_empty_test_split_is_refused(tmp_path):
    nowhere = Deployed(model=network(2), onnx=tmp_path / "m.onnx", pt2=tmp_path / "m.pt2")
    with pytest.raises(DataError, match="test split is empty"):
        benchmark(nowhere, nowhere, Split(0), BenchmarkSection(), BudgetSection())


# ---- files that take one batch size or other inputs only


def onnx_file(path, batch, inputs, *, classes=2):
    """Sums of inputs as logits, of a fixed batch or (a name) of any."""
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = onnx.numpy_helper.from_array(np.ones((inputs, classes), np.float32), "w")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, width])
        for name, width in (("x", inputs), ("y", classes))
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def labelled(path):
    """Rows of three numbers, in two classes."""
    rows = np.random.default_rng(0).integers(0, 9, (30, 3))
    np.savetxt(path, np.column_stack([rows, np.arange(30) % 2]), "%d", ",")
    source = {"source": f"csv:{path}", "target": "3", "header": False}
    return Recipe(data={**source, "calibration": 4, "validation": 4})


def timed(targets, batches, **options):
    section = BenchmarkSection(batches=batches, repeats=10, seconds=0.05, threads=[1])
    table = benchmark_targets(targets, section, runtimes=["onnxruntime"], **options)
    return table, [(row.target, row.batch) for row in table.rows], {skip.what: skip.reason for skip in table.skipped}


def test_a_fixed_batch_is_timed_and_the_others_are_told(tmp_path):
    fixed, free = onnx_file(tmp_path / "fixed.onnx", 4, 3), onnx_file(tmp_path / "free.onnx", "n", 3)
    table, rows, left_out = timed([free, fixed], [1, 4])
    assert rows == [("free.onnx", 1), ("free.onnx", 4), ("fixed.onnx", 4)]
    assert [row.verdict == "reference" for row in table.rows] == [True, True, False]
    assert list(left_out) == ["fixed.onnx fp32 on onnxruntime, batch 1"]
    assert "exported with a batch of 4" in left_out["fixed.onnx fp32 on onnxruntime, batch 1"]
    with pytest.raises(ExportError, match="give --batch 4"):
        timed([fixed], [1, 64])


def test_a_fixed_batch_answers_all_labelled_inputs(tmp_path):
    fixed = onnx_file(tmp_path / "fixed.onnx", 4, 3)
    table, _, _ = timed([fixed], [4], data=labelled(tmp_path / "d.csv"))
    assert table.rows[0].accuracy.n % 4 != 0  # the last part is filled up


def test_files_of_other_inputs_are_timed_on_their_own_or_told(tmp_path):
    three, six = (onnx_file(tmp_path / f"{n}.onnx", "n", n) for n in (3, 6))
    _, rows, left_out = timed([three, six], [1])
    assert rows == [("3.onnx", 1), ("6.onnx", 1)]
    assert left_out == {}
    _, rows, left_out = timed([three, six], [1], data=labelled(tmp_path / "d.csv"))
    assert rows == [("3.onnx", 1)]
    assert "(1, 3)" in left_out["6.onnx fp32 on onnxruntime"]
