"""The model in one file: saved, loaded without its source, trained on."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from causal_compress.deploy.package import load, save_pt2
from causal_compress.errors import ExportError, RunFolderError

ROOT = Path(__file__).resolve().parents[1]


class PaddedResidual(nn.Module):
    """The public CIFAR ResNets' forms: sliced and padded shortcut, pool by size, view by size(0)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        shortcut = F.pad(out[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        out = F.relu(self.bn2(self.conv2(out)) + shortcut)
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1))


def warmed(model: nn.Module, seed: int = 0) -> nn.Module:
    """With batch-norm statistics that are not the initial ones."""
    torch.manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 8, 8) * 2 + 0.5)
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [PaddedResidual, Attention, lambda: fx.symbolic_trace(PaddedResidual())])
def test_loaded_model_equals_the_saved_one_at_every_batch_size(build, tmp_path):
    model = warmed(build())
    save_pt2(model, X, tmp_path / "model.pt2")
    loaded = load(tmp_path)
    for batch in (1, 7, 256):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert set(loaded.state_dict()) == set(model.state_dict())


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = warmed(PaddedResidual()).train()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_pt2(model, X, tmp_path / "m.pt2")
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert load(tmp_path / "m.pt2").get_parameter("conv1.weight").requires_grad


def test_one_example_input_does_not_fix_the_batch_size(tmp_path):
    save_pt2(warmed(PaddedResidual()), X[:1], tmp_path / "m.pt2")
    assert load(tmp_path / "m.pt2")(torch.randn(5, 3, 8, 8)).shape == (5, 4)


def test_training_lowers_the_loss_and_leaves_batch_norm_statistics(tmp_path):
    save_pt2(warmed(PaddedResidual()), X, tmp_path / "model.pt2")
    student = load(tmp_path).train()
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    statistics = student.get_buffer("bn1.running_mean").clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    student.eval()
    assert losses[-1] < losses[0]
    assert torch.equal(statistics, student.get_buffer("bn1.running_mean"))


def test_loads_in_a_process_without_the_source_and_without_pickle(tmp_path):
    source = tmp_path / "their_network.py"
    source.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(5, 3)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x).relu()\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import their_network

        torch.manual_seed(0)
        model = their_network.Net().eval()
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("their_network", None)
    x = torch.randn(3, 5)
    save_pt2(model, x, tmp_path / "model.pt2")
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "expected.pt")
    source.unlink()
    script = (
        "import sys, pickle, torch, torch.export.pt2_archive, torch._dynamo\n"
        "def refuse(*a, **k): raise SystemExit('unpickled')\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "from causal_compress.deploy.package import load\n"
        "pickle.loads = pickle.load = torch.load = refuse\n"
        "model = load(sys.argv[1])\n"
        "assert torch.allclose(model(expected['x']), expected['y'], atol=1e-5)\n"
        "try:\n    import their_network\nexcept ImportError:\n    sys.stdout.write('ok')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.stdout == "ok", done.stderr


def test_neither_inputs_nor_paths_are_stored(tmp_path):
    save_pt2(warmed(PaddedResidual()), X, tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        inputs = next(name for name in archive.namelist() if "sample_inputs" in name)
        graph = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        assert archive.read(inputs) == b""
        assert b".py" not in archive.read(graph)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = warmed(PaddedResidual())
    save_pt2(model, X, tmp_path / "a.pt2")
    save_pt2(model, X, tmp_path / "b.pt2")
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_file_is_refused(content, tmp_path):
    save_pt2(warmed(PaddedResidual()), X, tmp_path / "model.pt2")
    whole = (tmp_path / "model.pt2").read_bytes()
    (tmp_path / "model.pt2").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(RunFolderError, match="damaged"):
        load(tmp_path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="can't read the model"):
        load(tmp_path)
    with pytest.raises(RunFolderError, match="can't read the model"):
        load(str(tmp_path / "absent"))


def rewritten(path, change):
    """The same archive after `change(name, content)`, where it gives bytes; and with the records it adds."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w", zipfile.ZIP_STORED) as archive:
        for name, content in change(records).items():
            archive.writestr(name, content)
    path.write_bytes(text.getvalue())


def in_graph(old, new):
    def change(records):
        return {
            name: content.replace(old, new) if name.endswith("models/model.json") else content
            for name, content in records.items()
        }

    return change


def with_sample_inputs(records):
    buffer = io.BytesIO()
    torch.save((X,), buffer)
    return {name: buffer.getvalue() if "sample_inputs" in name else old for name, old in records.items()}


def with_pickled_weight(records):
    def mark(content):
        config = json.loads(content)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    return {name: mark(old) if name.endswith("weights_config.json") else old for name, old in records.items()}


def with_library(records):
    prefix = next(iter(records)).split("/")[0]
    return {**records, f"{prefix}/data/aotinductor/model/evil.so": b"\x7fELF"}


@pytest.mark.parametrize(
    "change",
    [
        with_sample_inputs,
        with_pickled_weight,
        with_library,
        in_graph(b"torch.ops.aten.relu.default", b"torch.os.system"),
        in_graph(b"Symbol('s", b"__import__('os').getpid() + Symbol('s"),
        in_graph(b'"as_none": true', b'"as_operator": "torch.os.system"'),
        in_graph(b'"name": "relu"', b'"name": "relu=print(1)"'),
        in_graph(b'\\"context\\": \\"[]\\"', b'\\"context\\": \\"[\\\\\\"a=1\\\\\\"]\\"'),
    ],
)
def test_archive_that_could_run_code_is_refused(change, tmp_path):
    path = tmp_path / "model.pt2"
    save_pt2(warmed(PaddedResidual()), X, path)
    rewritten(path, lambda records: records)
    load(path)  # rewriting alone does no harm
    rewritten(path, change)
    with pytest.raises(RunFolderError, match="could run code"):
        load(path)


def test_branch_on_values_is_refused_with_a_remedy(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="remedy"):
        save_pt2(Branches(), X, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_fixed_batch_size_is_refused(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1)

    with pytest.raises(ExportError, match="batch"):
        save_pt2(Fixed(), X, tmp_path / "m.pt2")
