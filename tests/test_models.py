"""Checkpoints of every form become networks, or an error that says what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from causal_compress.errors import CausalCompressError, CheckpointError, MissingPackageError, UsageError
from causal_compress.inputs.models import build_model, checkpoint_sha256
from causal_compress.recipe import ModelSection

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CAUSAL_COMPRESS_SHARED", ROOT.parent / "shared"))
MLP = f"{ROOT / 'examples' / 'mlp.py'}:mlp"
ARGS: dict[str, Any] = {"inputs": 4, "hidden": [6, 5], "classes": 3}


def teacher() -> nn.Module:
    return build_model(ModelSection(arch=MLP, args=ARGS))


def section(weights: Path | str | None, arch: str = MLP, **args: Any) -> ModelSection:
    return ModelSection(arch=arch, args=ARGS | args, weights=None if weights is None else str(weights))


def same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def saved(folder: Path, content: Any, name: str = "weights.pt", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def test_callable_of_a_file_gives_a_network_in_eval_mode() -> None:
    model = teacher()
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.zeros(2, 4)).shape == (2, 3)


def test_callable_of_an_installed_module() -> None:
    model = build_model(ModelSection(arch="torch.nn:Linear", args={"in_features": 3, "out_features": 2}))
    assert isinstance(model, nn.Linear)


def test_the_working_folder_is_where_relative_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 7\n")
    (tmp_path / "own.py").write_text(
        "from torch import nn\nfrom helper import WIDTH\ndef net(classes=2):\n    return nn.Linear(WIDTH, classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = build_model(ModelSection(arch="own.py:net"), classes=5)
    assert model(torch.zeros(1, 7)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_torchvision_network_gets_the_data_s_classes(name: str) -> None:
    model = build_model(ModelSection(arch=f"torchvision:{name}"), classes=7)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_the_recipe_s_class_count_wins_over_the_data_s() -> None:
    model = build_model(ModelSection(arch="torchvision:mobilenet_v2", args={"num_classes": 4}), classes=7)
    assert model.get_submodule("classifier.1").get_parameter("weight").shape[0] == 4


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "best": 91.7},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model_state_dict": state},
        lambda state: {"ema": state},
        lambda state: {"model_ema": state},
        lambda state: {"net": state},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"model.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value.half() for key, value in state.items()}},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_arrive_however_they_are_wrapped(
    tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], Any], legacy: bool
) -> None:
    state = {key: value.half().float() for key, value in teacher().state_dict().items()}
    path = saved(tmp_path, wrap(state), _use_new_zipfile_serialization=not legacy)
    loaded = build_model(section(path)).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_safetensors(tmp_path: Path) -> None:
    original = teacher()
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    assert same(build_model(section(tmp_path / "weights.safetensors")), original)


def test_the_first_of_several_state_dicts_is_taken(tmp_path: Path) -> None:
    plain, averaged = teacher(), teacher()
    path = saved(tmp_path, {"ema": averaged.state_dict(), "state_dict": plain.state_dict()})
    assert same(build_model(section(path)), plain)


def test_missing_num_batches_tracked_is_no_fault(tmp_path: Path) -> None:
    arguments = {"num_features": 3}
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    state["running_mean"] += 2.0
    built = build_model(ModelSection(arch="torch.nn:BatchNorm1d", args=arguments, weights=str(saved(tmp_path, state))))
    assert torch.equal(built.state_dict()["running_mean"], torch.full((3,), 2.0))


def test_hash_follows_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [checkpoint_sha256(section(path)) for path in (tmp_path / "a.pt", None)] == [wanted, None]


def checkpoint_fault(path: Path | str, **args: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_model(section(path, **args))
    assert caught.value.remedy
    return str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pickled_module_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for legacy in (False, True):
        path = saved(tmp_path, nn.Linear(2, 2), _use_new_zipfile_serialization=not legacy)
        message = checkpoint_fault(path)
        assert "torch.nn.modules.linear.Linear" in message
        assert "torch.save(model.state_dict(), FILE)" in message


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickles_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(), protocol))
    nested = saved(tmp_path, {"state_dict": Evil()}, "nested.pt")
    for path in (tmp_path / "bare.pt", nested):
        assert "never run" in checkpoint_fault(path)
    assert not (tmp_path / "pwned").exists()


def test_damaged_files(tmp_path: Path) -> None:
    state = teacher().state_dict()
    save_file(state, tmp_path / "good.safetensors")
    whole = {
        "zip.pt": saved(tmp_path, state).read_bytes(),
        "old.pt": saved(tmp_path, state, _use_new_zipfile_serialization=False).read_bytes(),
        "cut.safetensors": (tmp_path / "good.safetensors").read_bytes(),
    }
    for name, content in whole.items():
        for size in (0, 1, 10, len(content) // 2, len(content) - 3):
            (tmp_path / name).write_bytes(content[:size])
            assert "damaged" in checkpoint_fault(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"hello world, no checkpoint", b"\0" * 300, b"<!DOCTYPE html><html>", b"\xff" * 64, b"PK\x03\x04junk"]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"junk{suffix}").write_bytes(content)
    assert "damaged" in checkpoint_fault(tmp_path / f"junk{suffix}")


def test_random_damage_never_ends_in_another_error(tmp_path: Path) -> None:
    draw = random.Random(0)
    original = teacher()
    for legacy in (False, True):
        content = saved(tmp_path, original.state_dict(), _use_new_zipfile_serialization=not legacy).read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            (tmp_path / "damaged.pt").write_bytes(bytes(damaged))
            try:
                model = build_model(section(tmp_path / "damaged.pt"))
            except CausalCompressError:
                continue
            # torch's new format has checksums: what loads is what was saved
            assert legacy or same(model, original)


def test_a_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    state = {"weight": torch.full((2, 2), 1.5), "bias": torch.zeros(2)}
    path = saved(tmp_path, state)
    content = bytearray(path.read_bytes())
    content[content.index(state["weight"].numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))
    assert "checksum" in checkpoint_fault(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in checkpoint_fault(tmp_path / "nowhere.pt")
    assert "a folder" in checkpoint_fault(tmp_path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, [1, 2], 3, {"state_dict": {"a": "text"}}])
def test_no_state_dict_inside(tmp_path: Path, content: Any) -> None:
    assert "holds no state dict" in checkpoint_fault(saved(tmp_path, content))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    state = teacher().state_dict()
    state["2.bias"] = torch.full_like(state["2.bias"], bad)
    message = checkpoint_fault(saved(tmp_path, state))
    assert "2.bias" in message
    assert "2.weight" not in message


def test_mismatches_are_listed_by_key_and_shape(tmp_path: Path) -> None:
    state = teacher().state_dict()
    state["extra.weight"] = state.pop("0.bias")
    state["2.weight"] = torch.zeros(9, 9)
    message = checkpoint_fault(saved(tmp_path, state))
    assert "missing in the file (1):" in message
    assert "0.bias (6,)" in message
    assert "extra.weight (6,)" in message
    assert "2.weight: file (9, 9), model (5, 6)" in message


def test_long_lists_of_mismatches_are_cut(tmp_path: Path) -> None:
    message = checkpoint_fault(saved(tmp_path, {f"layer{index}": torch.zeros(1) for index in range(50)}))
    assert "unexpected in the file (50)" in message
    assert "and 45 more" in message
    assert len(message.splitlines()) < 25


def test_another_class_count_is_told_as_such(tmp_path: Path) -> None:
    path = saved(tmp_path, teacher().state_dict())
    assert "--set model.args.num_classes=3" in checkpoint_fault(path, classes=8)


def test_numpy_s_numbers_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    original = teacher()
    beside = {"best_acc": np.float64(91.5), "epoch": np.int64(3), "done": np.bool_(True), "history": np.arange(4.0)}
    path = saved(tmp_path, {"model": original.state_dict()} | beside)
    assert same(build_model(section(path)), original)
    with pytest.raises(pickle.UnpicklingError):  # NumPy's names were allowed for that load only
        torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda x: x.to(torch.float8_e4m3fn), "0.weight: torch.float8_e4m3fn"),
        (lambda x: x.to_sparse(), "0.weight: not dense, torch.sparse_coo"),
        (lambda x: x.to("meta"), "0.weight: without contents"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "0.weight: quantized, torch.qint8"),
        (lambda x: (x * 10).to(torch.int8), "0.weight: file torch.int8, model torch.float32"),
        (lambda x: x.to(torch.complex64), "0.weight: file torch.complex64, model torch.float32"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_named(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], wanted: str
) -> None:
    state = {key: change(value) for key, value in teacher().state_dict().items()}
    assert wanted in checkpoint_fault(saved(tmp_path, state))
    if "float8" in wanted:
        save_file(state, tmp_path / "float8.safetensors")
        assert wanted in checkpoint_fault(tmp_path / "float8.safetensors")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_counters_and_weights_of_another_width_are_taken(tmp_path: Path, kind: torch.dtype) -> None:
    path = saved(tmp_path, {key: value.to(kind) for key, value in nn.BatchNorm1d(3).state_dict().items()})
    built = build_model(ModelSection(arch="torch.nn:BatchNorm1d", args={"num_features": 3}, weights=str(path)))
    assert built.state_dict()["num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("get_extra_state(self): return {'scale': 2}", "_extra_state, a dict"),
        ("_load_from_state_dict(self, *parts): parts[-1].append('an old layout')", "an old layout"),
    ],
)
def test_networks_that_load_in_their_own_way(tmp_path: Path, method: str, wanted: str) -> None:
    (tmp_path / "own.py").write_text(f"from torch import nn\nclass Net(nn.PReLU):\n    def {method}\n")
    path = str(saved(tmp_path, nn.PReLU().state_dict()))
    with pytest.raises(CheckpointError, match=wanted):
        build_model(ModelSection(arch=f"{tmp_path / 'own.py'}:Net", weights=path))


def usage_fault(arch: str | None, **args: Any) -> str:
    with pytest.raises(UsageError) as caught:
        build_model(ModelSection(arch=arch, args=args))
    assert caught.value.remedy
    return str(caught.value)


def test_unknown_torchvision_name() -> None:
    assert "did you mean 'resnet18'" in usage_fault("torchvision:resnet19")


def test_detectors_and_segmenters_are_no_classifiers() -> None:
    assert "has no classifier" in usage_fault("torchvision:fcn_resnet50")


@pytest.mark.parametrize("args", [{"weights": "DEFAULT"}, {"pretrained": True}, {"weights_backbone": "DEFAULT"}])
def test_nothing_is_downloaded(args: dict[str, Any]) -> None:
    assert "nothing is ever downloaded" in usage_fault("torchvision:resnet18", **args)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_asked_for_where_it_is_absent() -> None:
    with pytest.raises(MissingPackageError, match=r"pip install 'causal-compress\[timm\]'"):
        build_model(ModelSection(arch="timm:resnet18"))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_network() -> None:
    model = build_model(ModelSection(arch="timm:resnet10t"), classes=5)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("code", "name", "wanted"),
    [
        ("x = 1", "x", "a value that can't be called"),
        ("def resnet(): pass", "resnt", "did you mean 'resnet'?"),
        ("def net(): return 3", "net", "it returned int"),
        ("def net(): return None", "net", "it returned NoneType"),
        ("def net(): raise ValueError('sorry')", "net", "ValueError: sorry"),
        ("def net(a): return a", "net", "TypeError"),
        ("import no_such_package", "net", "No module named 'no_such_package'"),
        ("def net(:", "net", "SyntaxError"),
        ("1 / 0", "net", "ZeroDivisionError"),
        ("from torch import nn\ndef net(): return nn.LazyLinear(3)", "net", "parameters without a shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_faults_of_the_user_s_code(tmp_path: Path, code: str, name: str, wanted: str) -> None:
    (tmp_path / "own.py").write_text(code + "\n")
    assert wanted in usage_fault(f"{tmp_path / 'own.py'}:{name}")


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        (None, "no architecture was given"),
        ("resnet18", "names no callable"),
        ("nowhere.py:net", "does not exist"),
        ("no_such_package.models:net", "can't be imported"),
        ("torch.nn:Lineer", "did you mean 'Linear'?"),
        (":net", "names no callable"),
    ],
)
def test_faults_of_the_architecture(arch: str | None, wanted: str) -> None:
    assert wanted in usage_fault(arch)


@pytest.mark.real
@pytest.mark.parametrize(("name", "file"), [("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")])
def test_public_cifar_checkpoints_fit_our_residual_networks(name: str, file: str) -> None:
    path = SHARED / "checkpoints" / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    arch = f"{ROOT / 'examples' / 'cifar_resnet.py'}:{name}"
    model = build_model(ModelSection(arch=arch, weights=str(path)), classes=10)
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))


@pytest.mark.real
def test_the_wrong_architecture_is_told(tmp_path: Path) -> None:
    path = SHARED / "checkpoints" / "resnet56-4bfd9763.th"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    arch = f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet20"
    with pytest.raises(CheckpointError, match="unexpected in the file"):
        build_model(ModelSection(arch=arch, weights=str(path)))
