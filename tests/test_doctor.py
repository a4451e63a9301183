"""What `doctor` finds on a machine, and the remedy it names."""

import dataclasses
import json
import sys
from types import ModuleType

import pytest

from causal_compress import doctor
from causal_compress.cli import main
from causal_compress.doctor import diagnose


def found(name):
    return next(check for check in diagnose().checks if check.name == name)


def test_what_the_package_needs_really_works():
    assert found("torch cpu").status == "works"
    assert found("onnxruntime CPUExecutionProvider").status == "works"


def test_json_and_exit_code(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == 1
    assert {"versions", "machine", "checks"} <= printed.keys()
    for check in printed["checks"]:
        assert (check["remedy"] is None) == (check["status"] == "works")


def test_the_screen_names_every_check(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch cpu" in shown
    assert "tensorrt_rtx" in shown


@pytest.mark.parametrize(
    ("module", "extra"),
    [("openvino", "openvino"), ("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx"), ("timm", "timm")],
)
def test_what_is_absent_has_its_exact_remedy(monkeypatch, module, extra):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    check = found(module)
    assert check.status == "absent"
    assert check.remedy == f"pip install 'causal-compress[{extra}]'"


@pytest.mark.parametrize("module", ["openvino", "tensorrt", "tensorrt_rtx"])
def test_what_is_broken_is_said_and_does_not_end_the_examination(monkeypatch, capfd, module):
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == module else real(name))
    monkeypatch.setitem(sys.modules, module, ModuleType(module))  # a package without anything in it
    check = found(module)
    assert check.status == "broken"
    assert "AttributeError" in check.detail
    assert "reinstall" in check.remedy
    assert capfd.readouterr() == ("", "")


def test_a_runtime_that_computes_wrong_numbers_is_broken(monkeypatch):
    import numpy as np

    monkeypatch.setattr(doctor, "_ones", lambda: np.full((1, 4), 3.0, dtype=np.float32))
    check = found("onnxruntime CPUExecutionProvider")
    assert (check.status, check.detail) == ("broken", "RuntimeError: it computes wrong numbers")


def test_the_result_is_frozen():
    diagnosis = diagnose()
    with pytest.raises(dataclasses.FrozenInstanceError):
        diagnosis.checks = ()


def test_every_runtime_of_the_benchmark_is_spoken_of(monkeypatch):
    from causal_compress.deploy.absent import absence
    from causal_compress.deploy.runtimes import RUNTIMES

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")  # no compiler
    checks = {check.name: check for check in diagnose().checks}
    assert (checks["torch-compiled"].status, "g++" in checks["torch-compiled"].remedy) == ("absent", True)
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        error = absence(name)
        if error is not None:
            assert error.remedy in checks[name].remedy
    told = " ".join(checks).replace("_", "-")
    assert all(name in told for name in RUNTIMES if name not in ("onnxruntime-cuda", "onnxruntime-tensorrt"))
