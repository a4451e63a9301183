"""The folder of a package: whatever ends an export, the folder can be exported to again, and only its files go."""

import errno
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from causal_compress.deploy import package_folder as module
from causal_compress.deploy.package_folder import package_folder
from causal_compress.errors import RunFolderError
from causal_compress.results import Package, PackagedModel


def described(*names):
    """A package of such model files."""
    return Package(
        made_with={},
        kind="image",
        input_shape=(1, 8, 8),
        classes=("0", "1"),
        mean=None,
        std=None,
        preparation="",
        macs={"student": 1},
        params={"student": 1},
        models=tuple(
            PackagedModel(role="student", kind="onnx", precision="fp32", files={name: ""}, size_bytes=1)
            for name in names
        ),
        inputs="parity.npz",
        inputs_sha256="",
        inputs_count=1,
    )


def exported(folder, *names):
    with package_folder(folder) as (scratch, keep):
        for name in (*names, "parity.npz"):
            (scratch / name).write_text(name)
        keep(described(*names))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def states_of_an_export(folder, copies, monkeypatch, *names):
    """Copies of the folder as it was before each file was moved or removed: what a kill would have left."""
    taken = []
    for what in ("replace", "unlink"):
        original = getattr(Path, what)

        def first_copied(self, *given, original=original, **options):
            if self.exists() and folder in self.parents:
                taken.append(Path(shutil.copytree(folder, copies / str(len(taken)))))
            return original(self, *given, **options)

        monkeypatch.setattr(Path, what, first_copied)
    exported(folder, *names)
    monkeypatch.undo()
    return taken


def killed_while_writing(folder):
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit), package_folder(folder) as (scratch, _):
        (scratch / "b.onnx").write_text("b")
        patch.setattr(module, "_clear", lambda scratch: None)
        raise SystemExit


def test_an_export_that_was_killed_at_any_moment_can_be_done_again(tmp_path, monkeypatch):
    (tmp_path / "copies").mkdir()
    exported(tmp_path / "p", "a.onnx", "b.onnx")
    (tmp_path / "p" / "notes.txt").write_text("mine")
    states = states_of_an_export(tmp_path / "p", tmp_path / "copies", monkeypatch, "b.onnx", "c.onnx")
    assert len(states) > 8
    assert any("package.json" not in names_in(state) for state in states)
    for state in states:
        with pytest.raises(KeyError), package_folder(state):
            raise KeyError("refused before anything was moved")
        killed_while_writing(state)
        exported(state, "b.onnx", "d.onnx")
        kept = [name for name in names_in(state) if not name.endswith(".tmp")]
        assert kept == ["b.onnx", "d.onnx", "notes.txt", "package.json", "parity.npz"]


def test_a_first_export_that_was_killed_can_be_done_again(tmp_path, monkeypatch):
    (tmp_path / "copies").mkdir()
    (tmp_path / "p").mkdir()
    for state in states_of_an_export(tmp_path / "p", tmp_path / "copies", monkeypatch, "a.onnx"):
        exported(state, "b.onnx")
        assert [name for name in names_in(state) if not name.endswith(".tmp")] == [
            "b.onnx",
            "package.json",
            "parity.npz",
        ]


@pytest.mark.parametrize("listed", [["../precious", "model.onnx"], {"model.onnx": 1}])
def test_a_list_of_own_files_removes_nothing_elsewhere(tmp_path, listed):
    (tmp_path / "precious").write_text("x")
    scratch = tmp_path / "p" / ".partial-package"
    scratch.mkdir(parents=True)
    (scratch / "own-files.json").write_text(json.dumps(listed))
    (tmp_path / "p" / "letter.txt").write_text("dear")
    if isinstance(listed, dict):
        with pytest.raises(RunFolderError, match="not a package"):
            exported(tmp_path / "p", "a.onnx")
    else:
        exported(tmp_path / "p", "a.onnx")
    assert (tmp_path / "precious").is_file()
    assert (tmp_path / "p" / "letter.txt").is_file()


def test_a_scratch_folder_that_leads_elsewhere_is_not_emptied(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("x")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".partial-package").symlink_to(tmp_path / "home")
    exported(tmp_path / "p", "a.onnx")
    assert names_in(tmp_path / "home") == ["precious"]


@pytest.mark.parametrize("named", [("run/model.onnx", None, "p/model.onnx"), ()])
def test_a_full_disk_is_that_of_the_package_and_not_of_what_is_copied(tmp_path, named):
    exported(tmp_path / "p", "a.onnx")
    before = names_in(tmp_path / "p")
    with pytest.raises(RunFolderError, match="no space left for the package") as caught, package_folder(tmp_path / "p"):
        raise OSError(errno.ENOSPC, "No space left on device", *named)
    assert "run/" not in str(caught.value)
    assert str(tmp_path / "p") in str(caught.value)
    assert names_in(tmp_path / "p") == before
    with pytest.raises(FileNotFoundError), package_folder(tmp_path / "p"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "run/model.onnx")
