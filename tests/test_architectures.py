"""torchvision's architectures the whole way, with random weights: valid, smaller, of the same shape, equal in ONNX."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architectures = script()


def check(row: dict[str, Any]) -> None:
    assert row["macs_after"] < row["macs_before"]
    assert row["params_after"] < row["params_before"]
    assert row["macs_kept"] <= max(architectures.WANTED_MACS, 1.01 * row["least_macs_kept"])
    assert row["output_shape_ok"]
    assert row["onnx_max_abs_diff"] <= 1e-3
    assert row["onnx_batches"] == [1, 7, 256]
    assert row["merges"] + row["narrowed"] > 0
    assert row["unexplained"] == []
    assert all(row["reasons"])
    assert sum(row["reasons"].values()) == row["left_whole"]


def test_a_small_mobile_network_goes_the_whole_way(tmp_path: Path) -> None:
    setting = [[1, 8, 1, 1], [4, 16, 2, 2], [4, 24, 2, 2]]
    arguments = {"width_mult": 0.5, "inverted_residual_setting": setting, "round_nearest": 4}
    check(architectures.run_one("mobilenet_v2", 32, arguments, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(architectures.NETWORKS))
def test_an_architecture_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    check(architectures.run_one(name, *architectures.NETWORKS[name], tmp_path))
