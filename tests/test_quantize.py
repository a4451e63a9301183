"""Eight bits as a stage: corrections kept, layers left in FP32, what is measured of the files, and the choice."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import quantize_sample
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from pydantic import TypeAdapter
from quantize_sample import Data, Sequence, steady, trained
from torch import nn

from causal_compress.deploy import saturation
from causal_compress.deploy.faster import choose, chosen_for_size, chosen_within, time_files
from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.qdq import layers, prepare
from causal_compress.deploy.quantize import quantize
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.deploy.sensitivity import fewest, mean_shifts
from causal_compress.errors import DataError
from causal_compress.recipe import QuantizeSection
from causal_compress.results import Accuracy, Quantized

student, onnx_path = quantize_sample.student, quantize_sample.onnx_path  # fixtures


def test_a_correction_that_raises_the_kl_is_not_kept(student, onnx_path, tmp_path, monkeypatch):
    def wrong(model, quantized, batches, *, threads):
        shifts = mean_shifts(model, quantized, batches, threads=threads)
        return {name: shift + np.linspace(-1, 1, len(shift), dtype=np.float32) for name, shift in shifts.items()}

    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=64, max_accuracy_drop=100)
    monkeypatch.setattr("causal_compress.deploy.quantize.mean_shifts", wrong)
    file = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(2, 1)).files[0]
    assert file.bias_corrected == ()
    assert file.kl == file.method_kl["minmax"]


# ---- layers left in FP32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 250))
def test_the_fewest_are_found_in_few_questions(most, needed):
    asked = []

    def holds(count: int) -> bool:
        asked.append(count)
        assert 1 <= count <= most
        return count >= needed

    assert fewest(holds, most) == (needed if needed <= most else None)
    assert len(asked) <= 2 * np.log2(most) + 2
    assert len(asked) == len(set(asked))


def test_nothing_can_be_spared_of_nothing():
    assert fewest(lambda count: True, 0) is None


class Loud(nn.Module):
    """A layer whose input holds one channel of huge values that it doesn't read; all others are rounded away."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.read = nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            self.read.weight.zero_()
            self.read.bias.zero_()
            self.read.weight[:, :3, 0, 0] = torch.eye(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.read(torch.cat([x, 1e4 * x[:, :1] ** 2], 1)))


def test_the_layer_that_hurts_is_found_and_left_in_fp32(student, tmp_path):
    model = Loud(student).eval().requires_grad_(False)
    path = tmp_path / "model.onnx"
    export_onnx(model, Data().example_input, path, opset=18)
    section = QuantizeSection(families=["cpu"], methods=["minmax"], max_accuracy_drop=1.0)
    file = quantize(model, path, Data(), section, tmp_path, timer=steady(2, 1)).files[0]
    assert file.layers == 5
    assert [layer.layer for layer in file.excluded] == [layers(prepare(path.read_bytes(), "cpu"))[0]]
    assert file.excluded[0].harm_kl > 0.05
    assert file.within_budget
    assert file.drop_pp <= 1.0


def test_a_budget_that_no_form_meets_is_said_so(student, onnx_path, tmp_path, monkeypatch):
    monkeypatch.setattr("causal_compress.deploy.quantize._drop", lambda logits, reference: (5.0, (4.0, 6.0)))
    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=32)
    result = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(2, 1))
    assert not result.files[0].within_budget
    assert result.files[0].excluded == ()
    assert result.chosen == "fp32"
    assert "max_accuracy_drop" in result.reason


# ---- the stage


def test_the_whole_stage(student, onnx_path, tmp_path, capfd):
    data = Data()
    result = quantize(student, onnx_path, data, QuantizeSection(), tmp_path, timer=steady(2, 1))
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.int8.onnx", "model.int8.trt.onnx"]
    assert [file.family for file in result.files] == ["cpu", "tensorrt"]
    x, labels = data.validation.x, data.validation.labels.numpy()
    logits = student(x)
    right = logits.argmax(1).numpy() == labels
    assert 60 < result.fp32.pct < 100
    assert result.fp32.pct == pytest.approx(100 * right.mean())
    for file in result.files:
        path = tmp_path / file.onnx
        got = np.concatenate([OnnxRuntime.load(path).run(part.numpy()) for part in x.split(64)])
        after = got.argmax(1) == labels
        assert file.size_bytes == path.stat().st_size
        assert file.size_ratio == file.size_bytes / onnx_path.stat().st_size
        assert file.accuracy.pct == pytest.approx(100 * after.mean())
        assert file.drop_pp == pytest.approx(100 * (right.mean() - after.mean()))
        assert file.drop_ci_pp[0] < file.drop_pp < file.drop_ci_pp[1]
        assert file.agreement_pct == pytest.approx(100 * (got.argmax(1) == logits.argmax(1).numpy()).mean())
        assert file.agreement_pct > 97
        assert file.max_abs_diff == pytest.approx(np.abs(got - logits.numpy()).max(), abs=1e-5)
        assert (file.n, file.scored, file.layers, file.excluded) == (400, 400, 4, ())
        assert set(file.method_kl) == {"minmax", "percentile", "entropy"}
        assert file.method_kl[file.method] == min(file.method_kl.values())
        assert file.kl <= file.method_kl[file.method]
        assert bool(file.bias_corrected) == (file.kl < file.method_kl[file.method])
        assert file.kl < 0.01
    adapter = TypeAdapter(Quantized)
    assert adapter.validate_json(adapter.dump_json(result)) == result


def test_quantizing_twice_gives_the_same_bytes(student, onnx_path, tmp_path):
    section = QuantizeSection(families=["cpu"], scored=64)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quantize(student, onnx_path, Data(64), section, tmp_path / name, timer=steady(2, 1))
    assert (tmp_path / "a" / "model.int8.onnx").read_bytes() == (tmp_path / "b" / "model.int8.onnx").read_bytes()


def test_int8_that_is_slower_is_reported_and_not_chosen(student, onnx_path, tmp_path):
    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=64, batch=3)
    slower = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(1.0, 1.7))
    assert slower.chosen == "fp32"
    assert "slower" in slower.reason
    assert slower.speedup == pytest.approx(1 / 1.7)
    assert (slower.int8_latency_ms_p50, slower.rounds, slower.batch) == (pytest.approx(1.717), 20, 3)
    faster = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(1.7, 1.0))
    assert (faster.chosen, "faster" in faster.reason) == ("int8", True)


def accuracy(pct):
    return Accuracy(pct=pct, n=10_000, low_pct=pct - 1, high_pct=pct + 1)


@pytest.fixture
def chosen_for_speed(student, onnx_path, tmp_path):
    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=64, bias_correction="never")
    made = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(1.7, 1.0))

    def with_accuracies(fp32, int8):
        file = replace(made.files[0], accuracy=accuracy(int8), within_budget=True)
        return replace(made, fp32=accuracy(fp32), files=(file,))

    return with_accuracies


@pytest.mark.parametrize(
    ("speedup", "interval", "within", "chosen", "told"),
    [
        (1.8, (1.7, 1.9), True, "int8", "faster"),
        (0.6, (0.5, 0.7), True, "fp32", "slower"),
        (1.02, (0.97, 1.06), True, "fp32", "not measurably faster"),
        (1.02, (1.01, 1.03), True, "fp32", "not measurably faster"),  # the scorecard counts 3 % as none
        (1.8, (1.7, 1.9), False, "fp32", "max_accuracy_drop"),
    ],
)
def test_the_choice(speedup, interval, within, chosen, told):
    precision, reason = choose(speedup, interval, within_budget=within)
    assert precision == chosen
    assert told in reason
    assert f"{speedup:.2f}x" in reason


@pytest.mark.parametrize(
    ("fp32", "int8", "limit", "chosen", "told"),
    [
        (
            89.7,
            89.41,
            0.5,
            "fp32",
            "but it loses 0.59 pp against the teacher on validation and FP32 0.30, with 0.5 allowed",
        ),
        (89.7, 89.5, 0.5, "int8", "it loses 0.50 pp against the teacher on validation and FP32 0.30, with 0.5 allowed"),
        (89.4, 89.2, 0.5, "int8", "it loses 0.80 pp against the teacher on validation and FP32 0.60, with 0.5 allowed"),
        (89.7, 80.0, None, "int8", None),
    ],
)
def test_int8_for_speed_keeps_the_budget_that_fp32_keeps(fp32, int8, limit, chosen, told, chosen_for_speed):
    made = chosen_for_speed(fp32, int8)
    judged = chosen_within(made, accuracy(90.0), limit)
    assert judged.chosen == chosen
    assert judged.reason == (made.reason if told is None else f"{made.reason}; {told} (budget.max_accuracy_drop)")


def test_what_is_not_chosen_for_speed_is_not_asked_how_much_it_loses(chosen_for_speed):
    slow = replace(chosen_for_speed(89.7, 80.0), chosen="fp32", reason="INT8 is slower")
    assert chosen_within(slow, accuracy(90.0), 0.5) is slow
    lossy = chosen_within(chosen_for_speed(89.7, 89.0), accuracy(90.0), 0.5)
    small = chosen_for_size(lossy, lossy.files[0].size_bytes)
    assert (lossy.chosen, small.chosen) == ("fp32", "int8")  # the file has no other way to be small enough
    assert small.reason.startswith("only INT8 is small enough")


def test_without_a_file_for_cpus_nothing_is_timed(student, onnx_path, tmp_path):
    section = QuantizeSection(families=["tensorrt"], methods=["minmax"], scored=64, bias_correction="never")
    result = quantize(student, onnx_path, Data(64), section, tmp_path)
    assert (result.runtime, result.speedup, result.rounds, result.chosen) == (None, None, 0, "fp32")
    assert "nothing was timed" in result.reason
    assert result.files[0].bias_corrected == ()


def test_real_latencies_are_measured(onnx_path):
    section = QuantizeSection(repeats=10, seconds=0.1)
    fp32, int8 = time_files(onnx_path, onnx_path, np.zeros((1, 3, 8, 8), np.float32), section)
    assert len(fp32) == len(int8) == 10
    assert fp32.min() > 0


def test_sequences_go_the_whole_way(tmp_path):
    model = trained(Sequence())
    path = tmp_path / "model.onnx"
    export_onnx(model, Data().example_input, path, opset=18)
    result = quantize(model, path, Data(128), QuantizeSection(scored=128), tmp_path, timer=steady(2, 1))
    for file in result.files:
        assert file.agreement_pct > 95
        kinds = {weight.data_type for weight in onnx.load(tmp_path / file.onnx).graph.initializer}
        assert TensorProto.INT8 in kinds


@pytest.mark.parametrize("case", [(True, "auto", 7), (False, "auto", 8), (True, False, 8), (False, True, 7)])
def test_weights_have_seven_bits_where_eight_overflow(student, onnx_path, tmp_path, monkeypatch, case):
    here, asked, bits = case
    monkeypatch.setattr("causal_compress.deploy.quantize.saturates", lambda: here)
    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=32, reduce_range=asked)
    file = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(2, 1)).files[0]
    assert file.weight_bits == bits
    weights = [numpy_helper.to_array(w) for w in onnx.load(tmp_path / file.onnx).graph.initializer]
    largest = max(int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8 and w.ndim > 1)
    assert (largest <= 64) == (bits == 7)


@pytest.mark.parametrize(("product", "overflows"), [(64 * 255 * 127, False), (32 * 32767, True)])
def test_whether_products_overflow_is_found_by_multiplying(product, overflows, monkeypatch):
    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feed):
            return [np.full((1, 16), product, dtype=np.int32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert saturation.saturates.__wrapped__() == overflows


def test_nothing_to_validate_on_is_refused(student, onnx_path, tmp_path):
    with pytest.raises(DataError, match="no inputs"):
        quantize(student, onnx_path, Data(0), QuantizeSection(), tmp_path)
