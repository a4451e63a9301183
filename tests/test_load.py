"""The student without the code that made it, and its surgery on the architecture that it came from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import digits_recipe, train
from torch import nn

from causal_compress import compress, load, replay
from causal_compress.errors import RunFolderError, TraceError
from causal_compress.inputs.data import load_data

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.last(self.body(self.stem(x))).amax((2, 3)))

def net(width=8):
    return Net(width)
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_elsewhere", ROOT / "benchmarks" / "load_elsewhere.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder, and the source of its architecture."""
    folder = tmp_path_factory.mktemp("load")
    source = folder / "their_net.py"
    source.write_text(SOURCE)
    model = {"arch": f"{source}:net", "args": {"width": 8}}
    settings = {"model": model, "budget": {"macs": 0.6}, "benchmark": None}
    weights = train(digits_recipe(None, **settings), folder / "teacher.safetensors")
    compress(digits_recipe(weights, **settings), folder / "run")
    return folder / "run", source


def bare(source: Path, width: int = 8) -> nn.Module:
    """The architecture with other weights, as its owner would build it."""
    names: dict[str, type[nn.Module]] = {}
    exec(compile(source.read_text(), str(source), "exec"), names)
    return names["net"](width)


def cases(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return load_data(digits_recipe(None).data, seed=0).test.take(np.arange(count))


def test_a_process_without_the_source_gets_the_same_network(
    finished: tuple[Path, Path], script: ModuleType, tmp_path: Path
) -> None:
    run, source = finished
    x, y = cases()
    with torch.no_grad():
        wanted = replay(bare(source), run).eval()(x)
    np.savez(tmp_path / "cases.npz", x=x.numpy(), y=y.numpy(), wanted=wanted.numpy())
    source.rename(tmp_path / "gone")
    try:
        found = script.load_elsewhere(run, tmp_path / "cases.npz", [str(source), "their_net"])
    finally:
        (tmp_path / "gone").rename(source)
    assert found["difference"] <= 1e-5
    assert found["same_weights"]
    assert found["after"] < found["before"]
    assert found["here"] == []


def test_the_guard_of_that_process_works(
    finished: tuple[Path, Path], script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished
    with pytest.raises(RuntimeError, match=r"causal_compress\.deploy\.package is not here"):
        script.load_elsewhere(run, tmp_path / "cases.npz", ["causal_compress.deploy.package"])
    np.savez(tmp_path / "pickled.npz", x=np.array([{"any": 1}], dtype=object))
    reading = script.ELSEWHERE.replace("numpy.load(cases)", "numpy.load(cases, allow_pickle=True)")
    monkeypatch.setattr(script, "ELSEWHERE", reading)
    with pytest.raises(RuntimeError, match="something unpickles"):
        script.load_elsewhere(run, tmp_path / "pickled.npz", [])


def test_loading_imports_nothing_of_the_architecture(finished: tuple[Path, Path]) -> None:
    run, _ = finished
    before = set(sys.modules)
    load(run)
    assert not [name for name in set(sys.modules) - before if "their_net" in name]


def test_the_replayed_student_equals_the_loaded_one_and_learns(finished: tuple[Path, Path]) -> None:
    run, source = finished
    x, y = cases()
    teacher = bare(source)
    replayed, loaded = replay(teacher, str(run)), load(run)  # as in the README
    assert replayed.training
    with torch.no_grad():
        assert torch.allclose(replayed.eval()(x), loaded(x), atol=1e-5)
    assert sum(p.numel() for p in replayed.parameters()) < sum(p.numel() for p in teacher.parameters())
    replayed.train()
    optimizer = torch.optim.SGD(replayed.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(replayed(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    norms = [module for module in replayed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(int(norm.num_batches_tracked or 0) > 0 for norm in norms)


def test_replay_leaves_what_it_is_given_alone(finished: tuple[Path, Path]) -> None:
    run, source = finished
    model = bare(source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replay(model, run)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_architecture_and_another_folder_are_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = finished
    with pytest.raises(TraceError):
        replay(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), run)
    with pytest.raises(TraceError):
        replay(bare(source, width=12), run)
    with pytest.raises(RunFolderError):
        replay(bare(source), tmp_path)
    with pytest.raises(RunFolderError):
        load(tmp_path)
