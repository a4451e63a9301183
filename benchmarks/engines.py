"""TensorRT-RTX engines, built without a GPU for five generations of them, of students made by the whole way.

    python benchmarks/engines.py
    python benchmarks/engines.py --only resnet20 --capability SM89

Weights are random and inputs small (as in architectures.py): what is shown is which forms build, how large they are and
how long that takes; speed needs a GPU. Each student is cut to about 0.7 of its MACs, written as FP32, FP16 and INT8
ONNX, and built with a dynamic batch. A form that a generation can't run has TensorRT's reason in place of a size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from architectures import NETWORKS, recipe_for, write_gratings, write_weights

from causal_compress.deploy.precision import Precision, to_fp16
from causal_compress.deploy.tensorrt import CAPABILITIES, EngineOptions, build_engine
from causal_compress.errors import ExportError
from causal_compress.files import atomic_write_bytes, atomic_write_text
from causal_compress.pipeline import compress
from causal_compress.provenance import machine
from causal_compress.recipe import ModelSection, QuantizeSection, Recipe
from causal_compress.results import Exported, Log, Quantized, TeacherScore
from causal_compress.runs import read_result

ROOT = Path(__file__).resolve().parents[1]
STUDENTS: dict[str, tuple[int, dict[str, Any]]] = {  # side of the input [pixels], arguments
    "resnet20": (32, {}),
    **{name: NETWORKS[name] for name in ("alexnet", "mobilenet_v2", "vit_b_16")},
}
BATCHES = (1, 8, 64)
MACS = 0.7


def student_recipe(name: str, size: int, arguments: dict[str, Any], scratch: Path) -> Recipe:
    """The short recipe of architectures.py, and the INT8 form that TensorRT wants.

    Args:
        name: Of a network in STUDENTS.
        size: Side of the input [pixels].
        arguments: Its keyword arguments.
        scratch: Empty folder; data and weights are written there.
    """
    write_gratings(scratch / "gratings.npz", size)

    def recipe() -> Recipe:
        made = recipe_for(name, arguments, scratch, MACS)
        if name != "resnet20":
            return made
        arch = f"{ROOT / 'examples' / 'cifar_resnet.py'}:resnet20"
        return made.model_copy(update={"model": ModelSection(arch=arch, weights=made.model.weights)})

    write_weights(recipe(), scratch / "weights.pt")
    section = QuantizeSection(families=["tensorrt"], methods=["minmax"], inputs=64, scored=64, max_accuracy_drop=100.0)
    return recipe().model_copy(update={"quantize": section})


def onnx_forms(run: Path) -> dict[Precision, Path]:
    """The student's ONNX files, FP16 written beside those of the run."""
    fp32 = run / read_result(run, "export", Exported).onnx
    int8 = next(file.onnx for file in read_result(run, "quantize", Quantized).files if file.family == "tensorrt")
    fp16 = run / "model.fp16.onnx"
    atomic_write_bytes(fp16, to_fp16(fp32.read_bytes()))
    return {"fp32": fp32, "fp16": fp16, "int8": run / int8}


def engine_row(onnx: Path, precision: Precision, capability: str, scratch: Path) -> dict[str, Any]:
    """Build one engine; its size, or why there is none.

    Args:
        onnx: The student's file.
        precision: Of that file.
        capability: GPU generation, SM75 and so on.
        scratch: Where the engine is written.
    """
    row: dict[str, Any] = {"precision": precision, "capability": capability, "onnx_bytes": onnx.stat().st_size}
    path = scratch / "student.engine"
    try:
        info = build_engine(onnx, path, EngineOptions(capability=capability, batches=BATCHES))
    except ExportError as error:
        return {**row, "engine_bytes": None, "build_s": None, "refused": error.found or error.what}
    return {**row, "engine_bytes": info.size_bytes, "build_s": round(info.build_seconds, 2), "refused": None}


def rows_of(name: str, capabilities: list[str], scratch: Path) -> list[dict[str, Any]]:
    """All engines of one network's student."""
    run = scratch / "run"
    compress(student_recipe(name, *STUDENTS[name], scratch), run, force=True)
    macs = read_result(run, "prune", Log).macs / read_result(run, "teacher", TeacherScore).macs
    shape = [3, STUDENTS[name][0], STUDENTS[name][0]]
    about = {"arch": name, "input": shape, "macs_kept": round(macs, 4), "batches": list(BATCHES)}
    return [
        {**about, **engine_row(onnx, precision, capability, scratch)}
        for precision, onnx in onnx_forms(run).items()
        for capability in capabilities
    ]


def main() -> None:
    """Build, print and write; rows of networks that were not built again stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STUDENTS), default=list(STUDENTS), metavar="NAME")
    parser.add_argument("--capability", nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json")
    given = parser.parse_args()
    rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out.exists() else []
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            made = rows_of(name, given.capability, Path(folder))
        print(json.dumps(made), flush=True)
        rows = [row for row in rows if row["arch"] != name] + made
        content = {"schema": 1, "machine": machine(), "command": "python benchmarks/engines.py", "rows": rows}
        atomic_write_text(given.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
