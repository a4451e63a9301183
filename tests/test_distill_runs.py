"""One student however it is trained: compiled, without boundaries once they don't count, resumed, by two processes."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distill_sample
import pytest
import torch
from distill_sample import SIZE, run, same, section
from torch import nn

from causal_compress.errors import MissingPackageError, RunFolderError
from causal_compress.recipe import DistillSection
from causal_compress.recover import checkpoint, compiling, training
from causal_compress.recover.networks import answer, observed, unobserved

teacher, student = distill_sample.teacher, distill_sample.student  # fixtures


def test_compiled_training_follows_eager_training(student: nn.Module, teacher: nn.Module) -> None:
    pytest.importorskip("torch._inductor")
    settings = {"epochs": 2, "batch_size": 32, "precision": "fp32"}
    eager, told = run(student, teacher, DistillSection(**settings, compile=False))
    try:
        fused, also_told = run(student, teacher, DistillSection(**settings, compile=True))
    except MissingPackageError as error:
        pytest.skip(f"nothing here can compile: {error.found}")
    assert (told.compiled, also_told.compiled) == (False, True)
    assert eager.state_dict().keys() == fused.state_dict().keys()
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_boundaries_are_left_out_once_their_weight_is_gone(
    monkeypatch: pytest.MonkeyPatch, student: nn.Module, teacher: nn.Module
) -> None:
    calls = []

    def spied(network: nn.Module) -> nn.Module:
        plain = unobserved(network)
        plain.register_forward_pre_hook(lambda *_: calls.append(plain.training))
        return plain

    monkeypatch.setattr(training, "unobserved", spied)
    trained, _ = run(student, teacher, section())
    assert calls == [True] * 8  # 12 steps, the first third with boundaries
    monkeypatch.setattr(training, "unobserved", lambda network: network)
    assert same(trained.state_dict(), run(student, teacher, section())[0].state_dict())


def test_a_network_without_its_boundaries_is_the_same_network(student: nn.Module) -> None:
    watched = observed(student, ["relu_1"], role="student")
    plain = unobserved(watched)
    assert all(mine is theirs for mine, theirs in zip(plain.parameters(), watched.parameters(), strict=True))
    x = torch.randn(4, 2, SIZE, SIZE)
    assert torch.equal(plain(x), answer(watched, x)[0])
    assert unobserved(plain) is plain


def test_short_runs_are_not_compiled(student: nn.Module, teacher: nn.Module) -> None:
    assert not run(student, teacher, section())[1].compiled


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, student: nn.Module, teacher: nn.Module) -> None:
    monkeypatch.setattr(compiling, "_fault", lambda _: "no working C++ compiler")
    with pytest.raises(MissingPackageError, match="C\\+\\+ compiler"):
        run(student, teacher, section(compile=True))
    monkeypatch.setattr(compiling, "_WORTHWHILE_STEPS", 1)
    assert not run(student, teacher, section(compile="auto"))[1].compiled


def test_compiling_for_the_cpu_does_not_warn_of_absent_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    about_gpus, warned = logging.getLogger("torch.utils.cpp_extension"), []

    def compiles(network: Any) -> Any:
        warned.append(about_gpus.isEnabledFor(logging.WARNING))
        return network

    before = about_gpus.isEnabledFor(logging.WARNING)
    monkeypatch.setattr(torch, "compile", compiles)
    assert compiling._fault.__wrapped__("cpu") is None
    assert warned == [False]
    assert about_gpus.isEnabledFor(logging.WARNING) == before


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_run_equals_an_uninterrupted_one(
    student: nn.Module, teacher: nn.Module, tmp_path: Path, ema: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = section(epochs=4, ema=ema)
    whole, told = run(student, teacher, settings)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", interrupting_after(2, checkpoint.save))
        with pytest.raises(KeyboardInterrupt):
            run(student, teacher, settings, progress_dir=tmp_path / "stage")
    resumed, told_again = run(student, teacher, settings, progress_dir=tmp_path / "stage")
    assert same(whole.state_dict(), resumed.state_dict())
    assert [epoch.loss for epoch in told.epochs] == [epoch.loss for epoch in told_again.epochs]
    assert list((tmp_path / "stage").iterdir()) == [tmp_path / "stage" / checkpoint.FILE_NAME]


def interrupting_after(epochs: int, save: Any) -> Any:
    def save_then_stop(folder: Path, stamp: str, state: dict[str, Any]) -> None:
        save(folder, stamp, state)
        if len(state["history"]) == epochs:
            raise KeyboardInterrupt

    return save_then_stop


def test_finished_run_is_not_trained_again(
    student: nn.Module, teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(student, teacher, section(epochs=1), progress_dir=tmp_path)
    monkeypatch.setattr(training, "_step", lambda *_: pytest.fail("trained again"))
    again, _ = run(student, teacher, section(epochs=1), progress_dir=tmp_path)
    assert same(first.state_dict(), again.state_dict())


def test_progress_of_another_run_is_passed_over(student: nn.Module, teacher: nn.Module, tmp_path: Path) -> None:
    run(student, teacher, section(epochs=1), progress_dir=tmp_path)
    for changes in ({"seed": 1}, {"settings": section(epochs=1, learning_rate=0.01)}):
        settings = changes.pop("settings", section(epochs=1))
        anew, _ = run(student, teacher, settings, **changes)
        beside, _ = run(student, teacher, settings, progress_dir=tmp_path, **changes)
        assert same(anew.state_dict(), beside.state_dict())


def test_damaged_progress_is_refused(student: nn.Module, teacher: nn.Module, tmp_path: Path) -> None:
    run(student, teacher, section(epochs=1), progress_dir=tmp_path)
    path = tmp_path / checkpoint.FILE_NAME
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunFolderError, match="delete"):
        run(student, teacher, section(epochs=1), progress_dir=tmp_path)


def test_progress_with_a_flipped_bit_is_refused(student: nn.Module, teacher: nn.Module, tmp_path: Path) -> None:
    run(student, teacher, section(epochs=1), progress_dir=tmp_path)
    path = tmp_path / checkpoint.FILE_NAME
    content = path.read_bytes()
    at = content.index(weight_bytes(tmp_path))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(RunFolderError, match="delete"):
        run(student, teacher, section(epochs=1), progress_dir=tmp_path)


def weight_bytes(folder: Path) -> bytes:
    """What a weight of the student looks like in the file."""
    state = torch.load(folder / checkpoint.FILE_NAME, weights_only=True)["student"]
    return state["bn.weight"].numpy().tobytes()


LAUNCHED = """
import sys, torch
from distill_sample import BOUNDARY, data, network, section
from causal_compress.recover.distill import distill
teacher = network(12, 0)
trained, result = distill(
    network(6, 1), teacher, BOUNDARY, data(teacher), section(epochs=2), seed=0, device="cpu", progress_dir=None
)
from accelerate import PartialState
state = PartialState()
assert result.processes == 2, result.processes
torch.save(trained.state_dict(), f"{sys.argv[1]}/{state.process_index}.pt")
"""


def test_two_processes_train_one_student(student: nn.Module, teacher: nn.Module, tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in (0, 1))
    weights = [name for name in first if "running" not in name]
    assert all(torch.equal(first[name], second[name]) for name in weights)
    alone, _ = run(student, teacher, section(epochs=2))
    torch.testing.assert_close(first["head.weight"], alone.state_dict()["head.weight"], atol=0.05, rtol=0.0)
