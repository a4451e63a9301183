"""Weights find their way into a network: through prefixes, older names and shared tensors, and never by halves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from causal_compress.errors import CheckpointError
from causal_compress.inputs.checkpoint import read_state
from causal_compress.inputs.weights import load_weights


def loaded(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    load_weights(model, read_state(str(path)), str(path))
    return model.state_dict()


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


def fault(model: nn.Module, path: Path) -> str:
    """What is said of the weights, which leave the network as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        loaded(model, path)
    assert equal(model.state_dict(), before)
    return str(caught.value)


def equal(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


def mnasnet() -> nn.Module:
    model: nn.Module = torchvision.models.get_model("mnasnet0_5", num_classes=4, weights=None)
    return model


def vit(classes: int = 4) -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=classes
    )


def test_networks_that_ask_for_the_layout_of_the_file_are_told(tmp_path: Path) -> None:
    original = mnasnet().state_dict()
    wrapped = nn.ModuleDict({"model": mnasnet()})
    wrapped["model"].load_state_dict(original)
    save_file(original, tmp_path / "weights.safetensors")
    for path in (saved(tmp_path, original), tmp_path / "weights.safetensors"):
        assert equal(loaded(mnasnet(), path), original)
    assert equal(loaded(mnasnet(), saved(tmp_path, {"state_dict": wrapped.state_dict()})), original)


def test_the_layout_in_the_file_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    old = mnasnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old._load_from_state_dict({}, "", {"version": 1}, False, [], [], [])
    assert old.state_dict()["layers.0.weight"].shape != mnasnet().state_dict()["layers.0.weight"].shape
    with pytest.warns(UserWarning, match="previous version"):
        assert equal(loaded(mnasnet(), saved(tmp_path, old.state_dict())), old.state_dict())


def with_older_names(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): state[key] for key in state}


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_names_of_an_older_version_that_the_network_knows(tmp_path: Path, prefix: str) -> None:
    original = vit()
    path = saved(tmp_path, {prefix + key: value for key, value in with_older_names(original).items()})
    assert equal(loaded(vit(), path), original.state_dict())


def test_another_class_count_is_told_as_such_behind_older_names(tmp_path: Path) -> None:
    message = fault(vit(classes=9), saved(tmp_path, with_older_names(vit())))
    assert "--set model.args.num_classes=4" in message
    assert "linear_1" not in message


def test_what_is_missing_is_told_behind_older_names(tmp_path: Path) -> None:
    state = with_older_names(vit())
    state["other.weight"] = state.pop("encoder.ln.bias")
    message = fault(vit(), saved(tmp_path, state))
    assert "missing in the file (1): \n      encoder.ln.bias (8,)" in message
    assert "unexpected in the file (1): \n      other.weight (8,)" in message


def test_weight_normalisation_of_the_older_kind(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(weight_norm(nn.Linear(3, 2)), nn.ReLU(), weight_norm(nn.Linear(2, 2)))
    new = nn.Sequential(*(parametrizations.weight_norm(x) if isinstance(x, nn.Linear) else x for x in plain()))
    path = saved(tmp_path, old.state_dict())
    loaded(new, path)
    x = torch.randn(4, 3)
    torch.testing.assert_close(new(x), old(x))
    assert "0.weight_g (2, 1)" in fault(plain(), path)
    wider = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 2)), nn.ReLU(), new[2])
    message = fault(wider, path)
    assert "0.weight_v (2, 3)" in message
    assert "0.parametrizations.weight.original1 (2, 5)" in message


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))


def test_a_network_whose_own_loading_fails_is_named(tmp_path: Path) -> None:
    class Own(nn.PReLU):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("scale")

    assert "can't be copied into the network\n  found: 'scale'" in fault(
        Own(), saved(tmp_path, nn.PReLU().state_dict())
    )
    assert "missing in the file (1)" in fault(Own(), saved(tmp_path, {"other": torch.zeros(1)}))


def test_weights_are_copied_even_if_the_file_asks_to_take_its_own_tensors(tmp_path: Path) -> None:
    state = plain().half().state_dict()
    state._metadata["0"]["assign_to_params_buffers"] = True  # type: ignore[attr-defined]
    assert {value.dtype for value in loaded(plain(), saved(tmp_path, state)).values()} == {torch.float32}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.alone = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_a_tensor_that_is_shared_need_be_there_only_once(tmp_path: Path) -> None:
    original = Tied()
    path = tmp_path / "weights.safetensors"
    save_model(original, str(path))
    assert not {"first.weight", "second.weight"} <= read_state(str(path)).tensors.keys()
    assert equal(loaded(Tied(), path), original.state_dict())
    state = original.state_dict()
    del state["first.weight"], state["second.weight"], state["alone.weight"]
    assert "missing in the file (3)" in fault(Tied(), saved(tmp_path, state))


class Inner(nn.Module):
    """A network that has a `model` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 2)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "model._orig_mod.", "model.module."])
def test_a_prefix_may_be_called_as_a_module_of_the_network(tmp_path: Path, prefix: str) -> None:
    original = Inner().state_dict()
    path = saved(tmp_path, {"state_dict": {prefix + key: value for key, value in original.items()}})
    assert equal(loaded(Inner(), path), original)


def test_class_weights_of_the_loss_lie_beside_the_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lightning = nn.ModuleDict({"model": plain(), "criterion": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))})
    path = saved(tmp_path, {"state_dict": lightning.state_dict()})
    assert equal(loaded(plain(), path), lightning["model"].state_dict())
    assert "passed over (1): criterion.weight" in caplog.text
    message = fault(nn.Sequential(*plain(), nn.Linear(2, 2)), path)
    assert "3.weight (2, 2)" in message
    assert "unexpected in the file (1): \n      criterion.weight" in message


def test_what_lies_behind_the_prefix_must_all_be_the_network_s(tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in plain().state_dict().items()} | {"model.more": torch.zeros(3)}
    assert "unexpected in the file (1): \n      more (3,)" in fault(plain(), saved(tmp_path, state))
