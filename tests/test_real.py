"""The public ResNet-20 on real CIFAR-10 images, the whole way, on a subset.

The checkpoint and the script that builds the images lie in a shared folder: CAUSAL_COMPRESS_SHARED, or ../shared. The
images are built once (the script needs npm) and kept in the user's cache folder, or where CAUSAL_COMPRESS_DATA says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from causal_compress import compress, load, replay
from causal_compress.inputs.data import load_data
from causal_compress.inputs.models import build_model
from causal_compress.recipe import Recipe
from causal_compress.recipe_file import load_recipe
from causal_compress.shipped import find_recipe

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]  # the whole way, also on one slow core

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CAUSAL_COMPRESS_SHARED") or ROOT.parent / "shared")
CACHE = Path(os.environ.get("CAUSAL_COMPRESS_DATA") or Path.home() / ".cache" / "causal-compress-data")
CHECKPOINT = SHARED / "checkpoints" / "resnet20-12fca82f.th"
IMAGES = 2000


def images() -> Path:
    """cifar10.npz, built if it is not there yet."""
    found, script = CACHE / "cifar10.npz", SHARED / "data" / "get-data"
    if found.is_file():
        return found
    if not script.is_file():
        pytest.skip(f"no {found} and no {script} to build it")
    if shutil.which("npm") is None:
        pytest.skip(f"no {found}, and npm, with which {script} builds it, is not installed")
    built = subprocess.run(
        [sys.executable, str(script), "--only", "cifar10", str(CACHE)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"{script} failed: {built.stderr.strip().splitlines()[-1:]}")
    return found


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    if not CHECKPOINT.is_file():
        pytest.skip(f"no {CHECKPOINT}")
    given = {
        "model.arch": f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet20",
        "model.weights": str(CHECKPOINT),
        "data.source": f"npz:{images()}",
        "data.max_test": IMAGES,
        "budget": {"macs": 0.55, "max_accuracy_drop": 6.0},
        "intervene": {"inputs": 512, "masks": 1},
        "plan.widths": [0.875, 0.75, 0.625, 0.5, 0.25],
        "distill": None,
        "benchmark": {"batches": [1], "repeats": 30, "seconds": 2.0},
    }
    return load_recipe(find_recipe("cifar-resnet"), [f"{key}={json.dumps(value)}" for key, value in given.items()])


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(recipe, tmp_path_factory.mktemp("real") / "run").folder


def test_the_teacher_is_the_published_one(run: Path) -> None:
    teacher = json.loads((run / "teacher.json").read_text())
    assert teacher["params"] == 269_722
    assert teacher["accuracy"]["pct"] > 99  # validation images were training images of this checkpoint
    rows = json.loads((run / "scorecard.json").read_text())["rows"]
    assert rows[0]["accuracy_pct"] == pytest.approx(91.7, abs=1.5)


def test_half_the_work_is_gone_without_training_and_most_accuracy_stays(run: Path) -> None:
    teacher, student, *same_on_onnx = json.loads((run / "scorecard.json").read_text())["rows"]
    assert student["n"] == IMAGES
    assert student["macs"] <= 0.55 * teacher["macs"]
    assert student["accuracy_pct"] >= 84.0  # 86.5 when this was written; the interval of 2,000 images is 1.5 wide
    for on_torch, on_onnx in zip((teacher, student), same_on_onnx, strict=True):
        assert on_onnx["accuracy_pct"] == pytest.approx(on_torch["accuracy_pct"], abs=0.1)


def test_the_onnx_file_agrees_with_pytorch_on_real_images(run: Path, recipe: Recipe) -> None:
    import onnxruntime

    parity = json.loads((run / "export.json").read_text())["parity"]
    assert parity["agreement_pct"] >= 99.9
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    student = load(run)
    x, _ = load_data(recipe.data, seed=recipe.seed).test.take(np.arange(1024))
    for batch in (1, 7, 256):
        part = x[:batch]
        with torch.no_grad():
            wanted = student(part).numpy()
        found = session.run(None, {session.get_inputs()[0].name: part.numpy()})[0]
        assert np.abs(found - wanted).max() <= 1e-3


def test_loaded_and_replayed_students_are_the_same_network(run: Path, recipe: Recipe) -> None:
    x, _ = load_data(recipe.data, seed=recipe.seed).test.take(np.arange(64))
    bare = recipe.model.model_copy(update={"weights": None})
    with torch.no_grad():
        assert torch.allclose(load(run)(x), replay(build_model(bare), run).eval()(x), atol=1e-4)


def test_the_report_tells_of_it(run: Path) -> None:
    report = (run / "report.html").read_text(encoding="utf-8")
    assert len(report) > 10_000
    assert json.loads((run / "scorecard.json").read_text())["verdict"] in report
