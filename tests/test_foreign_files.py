"""The benchmark on ONNX files that other tools wrote: weights beside the file, answers and batches of other shapes."""

from math import prod

import numpy as np
import onnx

from causal_compress.afterwards import benchmark_targets
from causal_compress.deploy.memory import peak_memory
from causal_compress.deploy.targets import files_of
from causal_compress.deploy.traffic import Traffic, onnx_traffic
from causal_compress.recipe import BenchmarkSection, Recipe


def onnx_file(path, batch, *, hidden=4, ends=(), **saved):
    """Three inputs to two logits over a hidden layer, of a fixed batch or (a name) of any; `ends` follow the logits."""
    weights = {"w": np.ones((3, hidden), np.float32), "v": np.ones((hidden, 2 * prod(ends)), np.float32)}
    held = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"]), onnx.helper.make_node("MatMul", ["h", "v"], ["z"])]
    if ends:
        held.append(onnx.numpy_helper.from_array(np.array([0, 2, *ends], np.int64), "s"))
        nodes.append(onnx.helper.make_node("Reshape", ["z", "s"], ["y"]))
    shapes = {"x": [batch, 3], nodes[-1].output[0]: [batch, 2, *ends]}
    given, answered = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()
    )
    graph = onnx.helper.make_graph(nodes, "g", [given], [answered], held)
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path, **saved)
    return path


def labelled(path):
    """Rows of three numbers, in two classes."""
    rows = np.random.default_rng(0).integers(0, 9, (30, 3))
    np.savetxt(path, np.column_stack([rows, np.arange(30) % 2]), "%d", ",")
    source = {"source": f"csv:{path}", "target": "3", "header": False}
    return Recipe(data={**source, "calibration": 4, "validation": 4})


def timed(targets, batches=(4,), **options):
    section = BenchmarkSection(batches=list(batches), repeats=10, seconds=0.05, threads=[1])
    table = benchmark_targets(targets, section, runtimes=["onnxruntime"], **options)
    return table, {skip.what: skip.reason for skip in table.skipped}


# ---- weights beside the file


def test_weights_beside_the_file_are_counted_and_not_read(tmp_path):
    whole = onnx_file(tmp_path / "whole.onnx", "n")
    split = onnx_file(tmp_path / "split.onnx", "n", save_as_external_data=True, location="split.bin", size_threshold=0)
    assert onnx_traffic(split.read_bytes()) == onnx_traffic(whole.read_bytes())
    assert onnx_traffic(split.read_bytes()).weight_bytes == 4 * (12 + 8)
    table, left_out = timed([whole, split])
    both = split.stat().st_size + (tmp_path / "split.bin").stat().st_size
    assert [row.size_bytes for row in table.rows] == [whole.stat().st_size, both]
    assert left_out == {}


def test_constants_beside_the_file_are_counted_too(tmp_path):
    model = onnx.load(onnx_file(tmp_path / "plain.onnx", "n"))
    weight = model.graph.initializer.pop(0)
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=weight))
    stored = {"save_as_external_data": True, "location": "c.bin", "size_threshold": 0, "convert_attribute": True}
    onnx.save(model, tmp_path / "c.onnx", **stored)
    row = timed([tmp_path / "c.onnx"])[0].rows[0]
    assert row.size_bytes == sum((tmp_path / name).stat().st_size for name in ("c.onnx", "c.bin"))


# ---- a fixed batch


def test_multiply_adds_are_those_of_one_input_whatever_the_batch(tmp_path):
    free, fixed = (onnx_file(tmp_path / f"{batch}.onnx", batch) for batch in ("n", 4))
    assert onnx_traffic(free.read_bytes()) == Traffic(12 + 8, 2, 4 * (4 + 2), 4 * (12 + 8))
    assert onnx_traffic(fixed.read_bytes()) == onnx_traffic(free.read_bytes())


# ---- answers of other shapes


def test_answers_that_are_not_a_row_of_classes_are_timed_and_not_judged(tmp_path):
    shapes = {"plain": (), "convolutional": (1, 1), "pixels": (2, 2)}
    files = [onnx_file(tmp_path / f"{name}.onnx", "n", ends=ends) for name, ends in shapes.items()]
    table, left_out = timed(files[::-1], data=labelled(tmp_path / "d.csv"))
    judged = {row.target: row.accuracy for row in table.rows}
    assert list(judged) == ["pixels.onnx", "convolutional.onnx", "plain.onnx"]
    assert judged["pixels.onnx"] is None
    assert judged["convolutional.onnx"] == judged["plain.onnx"]
    assert judged["plain.onnx"].n > 0
    assert list(left_out) == ["pixels.onnx fp32 on onnxruntime, accuracy"]
    assert "a first output of shape (6, 2, 2, 2)" in left_out["pixels.onnx fp32 on onnxruntime, accuracy"]


# ---- folders of others


def test_a_package_json_of_another_program_makes_no_package(tmp_path):
    plain = onnx_file(tmp_path / "model.onnx", "n")
    (tmp_path / "package.json").write_text('{"name": "web-site", "version": "1.0.0"}')
    table, left_out = timed([plain], data=labelled(tmp_path / "d.csv"))
    assert table.rows[0].accuracy.n > 0
    assert left_out == {}


def test_memory_is_measured_where_files_have_names_of_standard_modules(tmp_path, monkeypatch):
    plain = onnx_file(tmp_path / "model.onnx", "n")
    for name in ("html", "json", "subprocess"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not the standard module')\n")
    monkeypatch.chdir(tmp_path)
    assert peak_memory("onnxruntime", plain, (3,), (4,), threads=1)


def test_the_working_folder_has_its_name(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "inner").mkdir(parents=True)
    onnx_file(run / "model.onnx", "n")
    for given, here in ((".", run), ("..", run / "inner")):
        monkeypatch.chdir(here)
        assert [file.target for file in files_of([type(run)(given)])] == ["run student"]
