"""Export: the file answers as PyTorch does, or the stage fails."""

import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from causal_compress import stages
from causal_compress.deploy.onnx import check_parity, export, export_onnx
from causal_compress.deploy.package import load
from causal_compress.deploy.runtimes import OnnxRuntime
from causal_compress.errors import DataError, ExportError
from causal_compress.files import sha256_of_file
from causal_compress.pipeline import analyze
from causal_compress.recipe import ExportSection, Recipe


class PaddedResidual(nn.Module):
    """The public CIFAR ResNets' forms: sliced and padded shortcut, pool by size, view by size(0)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.linear = nn.Linear(2 * channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        half = self.channels // 2
        shortcut = F.pad(out[:, :, ::2, ::2], (0, 0, 0, 0, half, half), "constant", 0)
        out = F.relu(self.bn2(self.conv2(out)) + shortcut)
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).reshape(x.shape[0], 16, -1).permute(0, 2, 1)
        tokens = self.norm(torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1))
        return self.head((tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])[:, 0])


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )


def warmed(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 8, 8) * 2 + 0.5)
    return model.eval()


class Split:
    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = torch.zeros(n, dtype=torch.int64)

    def batches(self, batch_size, *, limit=None):
        n = len(self.x) if limit is None else min(limit, len(self.x))
        for start in range(0, n, batch_size):
            stop = min(n, start + batch_size)
            yield self.x[start:stop], self.labels[start:stop]


class Data:
    def __init__(self, n: int = 40) -> None:
        self.validation = Split(n)
        self.example_input = self.validation.x[:2]


X = Split(2).x
SECTION = ExportSection()


@pytest.mark.parametrize(
    "build",
    [PaddedResidual, Attention, pooled, lambda: fx.symbolic_trace(PaddedResidual())],
    ids=["padded", "attention", "pooled", "traced"],
)
def test_export_runs_every_batch_size_and_equals_pytorch(build, tmp_path):
    model = warmed(build())
    before, after = export_onnx(model, X, tmp_path / "m.onnx", opset=18)
    parity = check_parity(
        model,
        OnnxRuntime.load(tmp_path / "m.onnx").run,
        [Split(30).x],
        section=ExportSection(max_abs_diff=1e-5, min_agreement_pct=100),
        name="m.onnx",
    )
    assert parity.batches == (1, 7, 256)
    assert parity.inputs == 30
    assert after < before
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_file_is_simplified_named_and_without_traces_of_the_machine(tmp_path):
    _, after = export_onnx(warmed(PaddedResidual()), X, tmp_path / "m.onnx", opset=18)
    model = onnx.load(tmp_path / "m.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 2
    assert "BatchNormalization" not in kinds
    assert "Identity" not in kinds
    assert len(kinds) == after
    assert model.opset_import[0].version == 18
    for value, name in ((model.graph.input[0], "input"), (model.graph.output[0], "logits")):
        assert value.name == name
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b".py" not in (tmp_path / "m.onnx").read_bytes()


def test_exporting_twice_gives_the_same_bytes(tmp_path):
    model = warmed(pooled())
    for name in ("a", "b"):
        export_onnx(model, X, tmp_path / name, opset=18)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stage_writes_all_files_and_answers_for_them(tmp_path):
    student, teacher = fx.symbolic_trace(warmed(PaddedResidual(4))), warmed(PaddedResidual(8))
    exported = export(student, teacher, Data(), ExportSection(inputs=32), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model.onnx",
        "model.pt2",
        "teacher.onnx",
        "teacher.pt2",
    ]
    assert exported.sha256 == sha256_of_file(tmp_path / "model.onnx")
    assert exported.size_bytes == (tmp_path / "model.onnx").stat().st_size
    for parity in (exported.parity, exported.pt2_parity, exported.teacher_parity):
        assert (parity.inputs, parity.batches, parity.agreement_pct) == (32, (1, 7, 256), 100.0)
        assert parity.max_abs_diff < 1e-5
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(X), student(X), atol=1e-5)


def test_difference_beyond_the_limit_is_refused():
    model = warmed(PaddedResidual())

    def shifted(x):
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy() + np.float32(0.03)

    with pytest.raises(ExportError, match=r"differs from PyTorch by 3\.0e-02 \(limit 1e-03\)"):
        check_parity(model, shifted, [X], section=SECTION, name="m.onnx")


def test_nan_is_refused():
    model = warmed(PaddedResidual())
    with pytest.raises(ExportError, match="nan"):
        check_parity(model, lambda x: np.full((len(x), 4), np.nan), [X], section=SECTION, name="m.onnx")


def test_other_answers_are_refused():
    model = warmed(PaddedResidual())

    def reversed_classes(x):
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy()[:, ::-1]

    section = ExportSection(max_abs_diff=1e6)
    with pytest.raises(ExportError, match=r"answers as PyTorch on 0\.00 %"):
        check_parity(model, reversed_classes, [X], section=section, name="m.onnx")


def test_no_inputs_are_refused():
    with pytest.raises(DataError):
        check_parity(warmed(pooled()), lambda x: x, [], section=SECTION, name="m.onnx")


def test_batch_size_that_fails_is_named():
    model = warmed(pooled())

    def only_two(x):
        if len(x) != 2:
            raise ValueError("wants 2")
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy()

    with pytest.raises(ExportError, match=r"can't run a batch of 1"):
        check_parity(model, only_two, [X], section=SECTION, name="m.onnx")


def test_large_inputs_are_not_repeated_to_gigabytes():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.zeros(1, 3, 512, 512)

    def run(x):
        return model(torch.from_numpy(x)).numpy()

    assert check_parity(model, run, [x], section=SECTION, name="m.onnx").batches == (1, 7, 21)


def test_operator_without_onnx_form_is_named(tmp_path):
    class Special(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x.flatten(1))

    with pytest.raises(ExportError, match="airy_ai") as caught:
        export_onnx(Special(), X, tmp_path / "m.onnx", opset=18)
    assert "remedy" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_warning_escapes(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(warmed(Attention()), X, tmp_path / "m.onnx", opset=20)
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")


def test_an_opset_that_is_not_written_is_refused_rather_than_recorded(tmp_path):
    with pytest.raises(ExportError, match="opset 99") as caught:
        export_onnx(warmed(pooled()), X, tmp_path / "m.onnx", opset=99)
    assert "wrote opset 18" in str(caught.value)
    assert "export.opset to 18" in caught.value.remedy
    assert not list(tmp_path.iterdir())
    export_onnx(warmed(pooled()), X, tmp_path / "m.onnx", opset=21)
    assert [entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import if not entry.domain] == [21]


def test_an_opset_that_nobody_knows_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_data", lambda *_, **__: pytest.fail("work was done before"))
    sections = {"model": {"arch": "m.py:build"}, "data": {"source": "npz:x.npz"}, "export": {"opset": 99}}
    with pytest.raises(ExportError, match=r"export\.opset 99 is not known") as caught:
        analyze(Recipe.model_validate(sections), tmp_path / "run")
    assert str(onnx.defs.onnx_opset_version()) in caught.value.remedy
