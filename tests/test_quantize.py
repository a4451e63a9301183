import dataclasses

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from pydantic import TypeAdapter
from torch import nn

from causal_compress.deploy.calibration import Histogram, activation_range, collect, entropy_threshold
from causal_compress.deploy.faster import choose, time_files
from causal_compress.deploy.onnx import export_onnx
from causal_compress.deploy.qdq import FORMS, compact, insert, layers, prepare
from causal_compress.deploy.quantize import quantize
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.deploy.sensitivity import fewest, mean_shifts, with_biases
from causal_compress.errors import DataError, ExportError, NumericalError
from causal_compress.recipe import QuantizeSection
from causal_compress.results import Quantized

CLASSES = 4


class Residual(nn.Module):
    """Convolutions with and without bias, a padded shortcut, an addition and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.third = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(x))
        x = F.relu(self.third(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.linear(x.mean((2, 3)))


class Sequence(nn.Module):
    """Linear layers on sequences, which ONNX writes as a product and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x.flatten(2).transpose(1, 2)))).mean(1)


class Split:
    def __init__(self, n: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % CLASSES
        self.x = torch.randn(n, 3, 8, 8, generator=random)
        for label in range(CLASSES):  # a bright corner tells the class
            rows, columns = divmod(label, 2)
            self.x[label::CLASSES, :, 4 * rows : 4 * rows + 4, 4 * columns : 4 * columns + 4] += 0.6

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size, *, limit=None):
        n = len(self) if limit is None else min(limit, len(self))
        for start in range(0, n, batch_size):
            stop = min(n, start + batch_size)
            yield self.x[start:stop], self.labels[start:stop]


class Data:
    """Without a test split: reading it would fail."""

    def __init__(self, n: int = 400) -> None:
        self.calibration, self.validation = Split(128, 1), Split(n, 2)
        self.example_input = self.calibration.x[:2]


def trained(model: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    train = Split(512, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        for x, y in train.batches(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student():
    return trained(Residual())


@pytest.fixture(scope="module")
def onnx_path(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "model.onnx"
    export_onnx(student, Data().example_input, path, opset=18)
    return path


def exported(model: nn.Module, folder):
    export_onnx(model, Data().example_input, folder / "m.onnx", opset=18)
    return (folder / "m.onnx").read_bytes()


def arrays(split: Split) -> list[np.ndarray]:
    return [x.numpy() for x, _ in split.batches(64)]


def ranged(model) -> dict[str, tuple[float, float]]:
    return {name: (one.low, one.high) for name, one in collect(model, arrays(Data().calibration)).items()}


def answers(content: bytes, folder, x) -> np.ndarray:
    (folder / "run.onnx").write_bytes(content)
    return OnnxRuntime.load(folder / "run.onnx").run(x)


def steady(fp32_ms: float, int8_ms: float):
    """A timer that says so."""

    def timer(fp32, int8, x, section):
        assert fp32.is_file()
        assert int8.is_file()
        assert x.shape == (section.batch, 3, 8, 8)
        jitter = 1 + 0.01 * (np.arange(20) % 3)
        return fp32_ms * jitter, int8_ms * jitter

    return timer


# ---- ranges


def test_a_histogram_counts_by_hand():
    histogram = Histogram()
    histogram.add(np.zeros((2, 3), np.float32))
    assert (histogram.low, histogram.high, histogram.counts.sum()) == (0, 0, 0)
    histogram.add(np.array([-1.0, 0.5, 1.0], np.float32))
    assert (histogram.low, histogram.high, histogram.limit) == (-1, 1, 1)
    assert np.flatnonzero(histogram.counts).tolist() == [0, 3072, 4095]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), min_size=1, max_size=4))
def test_growing_bins_count_as_if_the_limit_had_been_known(batches):
    grown = Histogram()
    for batch in batches:
        grown.add(np.array(batch, np.float32))
    known = Histogram(limit=grown.limit)
    for batch in batches:
        known.add(np.array(batch, np.float32))
    if grown.limit > 0 and np.any(np.array(batches[0], np.float32)):
        # a value on the edge of a bin may fall to either side of it
        assert np.abs(np.cumsum(grown.counts - known.counts)).sum() <= sum(map(len, batches))
        assert grown.counts.sum() == known.counts.sum()


def test_nan_in_an_activation_is_refused():
    with pytest.raises(NumericalError, match="not finite"):
        Histogram().add(np.array([1.0, np.nan], np.float32))


@pytest.fixture(scope="module")
def skewed() -> Histogram:
    """Half-normal values, half of them zero, and one outlier."""
    values = np.maximum(np.random.default_rng(0).normal(size=200_000), 0).astype(np.float32)
    values[0] = 10.0
    histogram = Histogram()
    histogram.add(values)
    return histogram


def test_minmax_keeps_the_outlier_percentile_and_entropy_clip_it(skewed):
    kept = {m: activation_range(skewed, m, percentile=99.99, levels=256) for m in ("minmax", "percentile", "entropy")}
    assert kept["minmax"] == (0.0, 10.0)
    assert kept["percentile"][0] == kept["entropy"][0] == 0.0
    assert 3.0 < kept["percentile"][1] < 5.0
    assert 3.0 < kept["entropy"][1] < 7.0


def test_entropy_is_not_led_by_zeros(skewed):
    few = dataclasses.replace(skewed, counts=skewed.counts.copy())
    few.counts[2048] = few.counts[2049]
    assert skewed.counts[2048] > 20 * few.counts[2048]
    ranges = [activation_range(one, "entropy", percentile=99, levels=256) for one in (skewed, few)]
    assert ranges[0] == ranges[1]


def test_entropy_keeps_all_of_what_fits_and_of_what_is_flat():
    assert entropy_threshold(np.ones(100, np.int64), 128) == 100
    assert entropy_threshold(np.full(2048, 100), 128) == 2048
    assert entropy_threshold(np.zeros(2048, np.int64), 128) == 0


def test_no_calibration_inputs_are_refused(onnx_path):
    with pytest.raises(DataError, match="calibrate"):
        collect(prepare(onnx_path.read_bytes(), "cpu"), [])


# ---- form


def scale_zero(model) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}


@pytest.mark.parametrize("family", ["cpu", "tensorrt"])
def test_weights_are_stored_as_bytes_per_channel_and_biases_as_floats(onnx_path, family):
    model = prepare(onnx_path.read_bytes(), family)
    quantized = onnx.load_model_from_string(compact(insert(model, ranged(model), FORMS[family])))
    weights, makers = scale_zero(quantized), {name: node for node in quantized.graph.node for name in node.output}
    found = [node for node in quantized.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(found) == 4
    for node in found:
        source = makers[node.input[1]]
        assert source.op_type == "DequantizeLinear"
        stored, scale, zero = (weights[name] for name in source.input)
        assert stored.dtype == np.int8
        assert not zero.any()
        assert scale.shape == (stored.shape[0],)
        assert np.abs(stored.astype(int)).max(axis=tuple(range(1, stored.ndim))).min() >= 126  # each uses its range
        if len(node.input) == 3:
            assert weights[node.input[2]].dtype == np.float32
    assert sum(weight.size for weight in weights.values() if weight.dtype == np.float32) < 200
    assert not [weight for weight in weights.values() if weight.dtype == np.int32]


def test_tensorrt_gets_signed_symmetric_activations_before_layers_only_and_no_products(onnx_path):
    model = prepare(onnx_path.read_bytes(), "tensorrt")
    quantized = insert(model, ranged(model), FORMS["tensorrt"])
    weights = scale_zero(quantized)
    roundings = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert roundings
    for node in roundings:
        zero = weights[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    kinds = [node.op_type for node in quantized.graph.node]
    assert "Gemm" not in kinds
    assert kinds.count("Relu") == 3  # only a runtime without negative steps can drop them


def test_cpus_get_unsigned_activations_and_float_logits(onnx_path):
    model = prepare(onnx_path.read_bytes(), "cpu")
    quantized = insert(model, ranged(model), FORMS["cpu"])
    weights = scale_zero(quantized)
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            assert weights[node.input[2]].dtype == np.uint8
    assert next(node.op_type for node in quantized.graph.node if "logits" in node.output) == "Gemm"


def test_compacting_keeps_answers_and_names_that_count(onnx_path, tmp_path):
    model = prepare(onnx_path.read_bytes(), "cpu")
    quantized = insert(model, ranged(model), FORMS["cpu"])
    small = compact(quantized)
    x = Data().validation.x[:5].numpy()
    np.testing.assert_array_equal(answers(small, tmp_path, x), answers(quantized.SerializeToString(), tmp_path, x))
    assert len(small) < 0.8 * quantized.ByteSize()
    again = onnx.load_model_from_string(small)
    assert (again.graph.input[0].name, again.graph.output[0].name) == ("input", "logits")
    assert set(layers(model)) <= {node.name for node in again.graph.node}
    assert not again.graph.value_info
    assert small == compact(quantized)


def test_what_is_no_model_is_refused():
    with pytest.raises(ExportError, match="prepared for INT8"):
        prepare(b"nothing", "cpu")


# ---- bias correction


@pytest.mark.parametrize("build", [Residual, Sequence])
def test_biases_take_up_the_shifts_of_all_layers(build, tmp_path):
    model = prepare(exported(trained(build()), tmp_path), "cpu")
    shifts = mean_shifts(model, insert(model, ranged(model), FORMS["cpu"]), arrays(Data().calibration), threads=1)
    assert set(shifts) == set(layers(model))
    assert all(np.abs(shift).max() > 0 for shift in shifts.values())
    lowered, done = with_biases(model, shifts)
    assert set(done) == set(layers(model))
    before, after = scale_zero(model), scale_zero(lowered)
    moved = {name: before.get(name, 0) - value for name, value in after.items() if before.get(name) is not value}
    taken = [value for value in moved.values() if value.dtype == np.float32 and np.abs(value).max() > 0]
    for shift in shifts.values():
        assert any(value.shape == shift.shape and np.allclose(value, shift, atol=1e-6) for value in taken)
    assert len(taken) == len(shifts)


def test_a_shift_by_hand(onnx_path, student):
    """The first layer reads the input itself, so torch can repeat what its twin does."""
    model = prepare(onnx_path.read_bytes(), "cpu")
    ranges = ranged(model)
    data = torch.from_numpy(np.concatenate(arrays(Data().calibration)))
    shifts = mean_shifts(model, insert(model, ranges, FORMS["cpu"]), [data.numpy()], threads=1)
    low, high = ranges["input"]
    scale = (high - low) / 255
    zero = round(-low / scale)
    rounded = (torch.clamp(torch.round(data / scale) + zero, 0, 255) - zero) * scale
    weight = student.first.weight
    steps = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    whole = torch.round(weight / steps) * steps
    wanted = (F.conv2d(rounded, whole, padding=1) - F.conv2d(data, weight, padding=1)).mean((0, 2, 3))
    np.testing.assert_allclose(shifts[layers(model)[0]], wanted.numpy(), atol=2e-5)


def test_a_shared_bias_stays_as_it_is(onnx_path):
    model = prepare(onnx_path.read_bytes(), "cpu")
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    convolutions[1].input[2] = convolutions[0].input[2]
    _, done = with_biases(model, {convolutions[0].name: np.ones(8, np.float32)})
    assert done == ()


def test_a_correction_that_raises_the_kl_is_not_kept(student, onnx_path, tmp_path, monkeypatch):
    def wrong(model, quantized, batches, *, threads):
        shifts = mean_shifts(model, quantized, batches, threads=threads)
        return {name: shift + np.linspace(-1, 1, len(shift), dtype=np.float32) for name, shift in shifts.items()}

    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=64)
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


@pytest.mark.parametrize("width", [32, 49])
def test_the_histogram_samples_every_column_of_a_map(width):
    values = np.tile(
        np.arange(1, width + 1, dtype=np.float32), 2**17
    )  # so many rows that every width-th value is taken
    histogram = Histogram()
    histogram.add(values)
    counts = histogram.counts[histogram.counts > 0]
    assert len(counts) == width
    assert counts.max() < 1.1 * counts.min()


def test_int8_that_is_slower_is_reported_and_not_chosen(student, onnx_path, tmp_path):
    section = QuantizeSection(families=["cpu"], methods=["minmax"], scored=64, batch=3)
    slower = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(1.0, 1.7))
    assert slower.chosen == "fp32"
    assert "slower" in slower.reason
    assert slower.speedup == pytest.approx(1 / 1.7)
    assert (slower.int8_latency_ms_p50, slower.rounds, slower.batch) == (pytest.approx(1.717), 20, 3)
    faster = quantize(student, onnx_path, Data(64), section, tmp_path, timer=steady(1.7, 1.0))
    assert (faster.chosen, "faster" in faster.reason) == ("int8", True)


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


def test_nothing_to_validate_on_is_refused(student, onnx_path, tmp_path):
    with pytest.raises(DataError, match="no inputs"):
        quantize(student, onnx_path, Data(0), QuantizeSection(), tmp_path)
