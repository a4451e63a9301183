"""The run folder: each stage's result is written whole before the next begins, can be read back, and is traceable.

    recipe.resolved.yaml   what was asked for
    run.json               provenance: command, versions, machine, fingerprints, time and memory of each stage
    STAGE.json, ...        each stage's result and the files that belong to it
    .lock                  held while a run is going on
    .partial-STAGE         what a stage that is not finished has written; removed by the next run
    .progress-STAGE        what an unfinished stage keeps in order to go on where it was killed

A stage is found again by its key, a fingerprint of its name, everything it depends on, and the package's version.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from causal_compress.errors import RunFolderError
from causal_compress.files import atomic_write_bytes, atomic_write_text, sha256_of_file, sha256_of_json
from causal_compress.provenance import machine as machine
from causal_compress.provenance import package_version, peak_memory, versions
from causal_compress.recipe import Recipe
from causal_compress.recipe_differences import refuse_another
from causal_compress.recipe_file import recipe_sha256, recipe_yaml
from causal_compress.results import Provenance, StageRecord
from causal_compress.runfolder import RECORD, disk_errors, folder_error, locked, refuse_foreign, sweep

T = TypeVar("T")

logger = logging.getLogger(__name__)
_RECIPE = "recipe.resolved.yaml"
_DECISIONS = {"latency", "search", "plan"}
_UNBOUND = {"teacher"}  # after it a teacher near chance is refused, and the remedy is another recipe


class Run:
    """An open run folder; made by `open_run` only.

    Attributes:
        folder: Where everything is written.
        reused: Another run folder, from which stages with the same key are copied; None where none was given.
    """

    def __init__(self, folder: Path, provenance: Provenance, reuse: Path | None) -> None:
        self.folder = folder
        self._provenance = provenance
        self.reused = reuse
        self._reusable = [(reuse, read_provenance(reuse).stages)] if reuse else []
        self._keys: dict[str, str] = {}
        self._last: tuple[str, str] | None = None

    def stage(self, name: str, result_type: type[T], compute: Callable[[Path], T], *, depends: Mapping[str, Any]) -> T:
        """Reads a stage's result back if everything it depends on is as before, else computes and records it.

        Args:
            name: The stage; its result becomes NAME.json.
            result_type: What `compute` returns; plain data.
            compute: Is given an empty folder; the files it leaves there are moved into the run folder.
            depends: Everything the result depends on, as plain data: recipe sections, fingerprints, and the keys of
                earlier stages (`key_of`).

        Returns:
            The result as read from NAME.json, so that a resumed run sees exactly what an uninterrupted one saw.

        Raises:
            RunFolderError: The folder is full, read-only or gone.
        """
        assert re.fullmatch(r"(?!run$)[a-z][a-z0-9_-]*", name), f"'{name}' can't be a stage's name"
        key = sha256_of_json([name, depends, package_version()])
        self._keys[name] = key
        reader = TypeAdapter(result_type)
        with disk_errors(self.folder):
            found = self._has(name, key, reader) or self._copy(name, key, reader)
        if not found:
            self._compute(name, key, reader, compute)
        with disk_errors(self.folder):
            self._chain(name, key)
            shutil.rmtree(self._progress_folder(name), ignore_errors=True)
            return reader.validate_json((self.folder / f"{name}.json").read_bytes())

    def has(self, name: str) -> bool:
        """Whether this run has been through a stage."""
        return name in self._keys

    def key_of(self, name: str) -> str:
        """The key of a stage that this run has been through, for the `depends` of the stages that use its result."""
        return self._keys[name]

    def progress(self, name: str) -> Path:
        """A folder that survives kills, in which a running stage keeps what it needs to go on.

        It is empty at first, emptied when the stage's key has changed, and removed when the stage is recorded.
        """
        folder, key = self._progress_folder(name), self._keys[name]
        mark = folder / ".key"
        with disk_errors(self.folder):
            if not (mark.is_file() and mark.read_text() == key):
                _empty(folder)
                atomic_write_text(mark, key)
        return folder

    @property
    def sources(self) -> tuple[Path, ...]:
        """The folders in which a stage's result is looked for: this run's, then those that are reused."""
        return (self.folder, *(folder for folder, _ in self._reusable))

    def reuse_also(self, folder: Path) -> None:
        """From now on, stages with the same key are copied from this run folder too. It is only read."""
        self._reusable.append((folder, read_provenance(folder).stages))

    def note_inputs(self, *, checkpoint_sha256: str | None, data_sha256: str) -> None:
        """Writes the fingerprints of the checkpoint and the data, and the machine with its GPUs, into run.json."""
        self._save(checkpoint_sha256=checkpoint_sha256, data_sha256=data_sha256, machine=machine())

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file into the run folder, whole or not at all."""
        with disk_errors(self.folder):
            atomic_write_text(self.folder / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes plain data or a result as JSON into the run folder, whole or not at all."""
        with disk_errors(self.folder):
            atomic_write_bytes(self.folder / name, to_json(value, indent=2, inf_nan_mode="constants") + b"\n")

    def _has(self, name: str, key: str, reader: TypeAdapter[Any]) -> bool:
        record = _find(self._provenance.stages, name, key)
        if record is None or not _is_sound(self.folder, record, reader):
            return False
        logger.info("%s: reused", name)
        return True

    def _copy(self, name: str, key: str, reader: TypeAdapter[Any]) -> bool:
        for folder, stages in self._reusable:
            record = _find(stages, name, key)
            if record is None or not _is_sound(folder, record, reader):
                continue
            scratch = self._scratch(name)
            for file in record.files:
                (scratch / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, scratch / file)
            self._record(replace(record, files=self._move_in(scratch)))
            logger.info("%s: copied from %s", name, folder)
            return True
        return False

    def _compute(self, name: str, key: str, reader: TypeAdapter[T], compute: Callable[[Path], T]) -> None:
        logger.info("%s: begins", name)
        started, start = _now(), time.perf_counter()
        with disk_errors(self.folder):
            scratch = self._scratch(name)
        try:
            with peak_memory() as peak:
                result = self._call(compute, scratch)
            # A result of work that went on where an earlier process was cut off has taken longer than this process.
            seconds = max(time.perf_counter() - start, getattr(result, "seconds", 0.0))
            content = reader.dump_json(result, indent=1, warnings="error") + b"\n"
            with disk_errors(self.folder):
                files = self._move_in(scratch) | {f"{name}.json": hashlib.sha256(content).hexdigest()}
                atomic_write_bytes(self.folder / f"{name}.json", content)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._record(
            StageRecord(
                stage=name,
                key=key,
                files=files,
                seconds=seconds,
                peak_memory_bytes=peak.size_bytes,
                started=started,
            )
        )
        logger.info("%s: done in %.1f s, at most %.0f MB", name, seconds, peak.size_bytes / 1e6)

    def _call(self, compute: Callable[[Path], T], scratch: Path) -> T:
        """Calls a stage's work; a full disk is the folder's fault, every other error is left as it is."""
        try:
            return compute(scratch)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise folder_error(self.folder, error) from error
            if "No space left on device" in str(error):  # libraries report it in errors of their own
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise folder_error(self.folder, full) from error
            raise

    def _scratch(self, name: str) -> Path:
        return _empty(self.folder / f".partial-{name}")

    def _progress_folder(self, name: str) -> Path:
        return self.folder / f".progress-{name}"

    def _move_in(self, scratch: Path) -> dict[str, str]:
        """Moves all files of a scratch folder into the run folder; returns their names with fingerprints."""
        name = scratch.name.removeprefix(".partial-")
        others = [record for record in self._provenance.stages if record.stage != name]
        taken = {RECORD, _RECIPE, *(file for record in others for file in record.files)}
        moved = {}
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            file = path.relative_to(scratch).as_posix()
            assert file not in taken, f"{name} would overwrite {file}"
            target = self.folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            moved[file] = sha256_of_file(target)
        shutil.rmtree(scratch, ignore_errors=True)
        return moved

    def _record(self, record: StageRecord) -> None:
        """Puts a stage into run.json in place of an older record of it, whose leftover files go."""
        old = [other for other in self._provenance.stages if other.stage == record.stage]
        others = [other for other in self._provenance.stages if other.stage != record.stage]
        self._save(stages=(*others, record))
        kept = {file for other in self._provenance.stages for file in other.files}
        for file in {file for other in old for file in other.files} - kept:
            (self.folder / file).unlink(missing_ok=True)

    def _chain(self, name: str, key: str) -> None:
        """Notes after which stage this one came; decisions don't count, since a look ahead may make them anew."""
        stages = self._provenance.stages
        record = _find(stages, name, key)
        if record is not None and record.after != self._last:
            self._save(stages=tuple(replace(each, after=self._last) if each is record else each for each in stages))
        if name not in _DECISIONS:
            self._last = (name, key)

    def _save(self, **changes: Any) -> None:
        self._provenance = replace(self._provenance, **changes)
        self.write_json(RECORD, self._provenance)


@contextmanager
def open_run(run_dir: Path, recipe: Recipe, *, command: Sequence[str], reuse: Path | None = None) -> Iterator[Run]:
    """Opens a run folder, new or to be resumed, and keeps every other process out of it meanwhile.

    Args:
        run_dir: The folder; made if absent.
        recipe: What is asked for; a folder that holds finished stages of another recipe is refused. One made before a
            key of the recipe existed is the same recipe's if the key has its default now.
        command: The command line, for run.json.
        reuse: Another run folder; stages with the same key are copied from it. It is only read.

    Raises:
        RunFolderError: The path is a file, the folder holds something else or another recipe's run, another process
            works in it, it can't be written, or its run.json is damaged; nothing in it is changed then.
    """
    folder, reuse = run_dir.absolute(), reuse.absolute() if reuse else None
    if reuse is not None and reuse.resolve() == run_dir.resolve():
        reuse = None
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RECORD).exists():
            refuse_foreign(folder, but=_RECIPE)
    with locked(folder, command=command):
        with disk_errors(folder):
            provenance = _provenance(folder, recipe, tuple(command))
            run = Run(folder, provenance, reuse)
            sweep(folder)
            run.write_text(_RECIPE, recipe_yaml(recipe))
            run.write_json(RECORD, provenance)
        yield run


def read_provenance(folder: Path) -> Provenance:
    """Reads run.json of a run folder.

    Raises:
        RunFolderError: It is no run folder, or run.json is damaged.
    """
    try:
        return TypeAdapter(Provenance).validate_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunFolderError(
            f"{folder} is not a run folder",
            found="no run.json in it" if folder.is_dir() else "no such folder",
            wanted="a folder that 'causal-compress compress --out FOLDER' wrote",
            remedy="check the path",
        ) from error
    except ValidationError as error:
        raise RunFolderError(
            f"{folder / RECORD} is damaged, so no result in this folder can be traced or resumed",
            found=error.errors(include_url=False)[0]["msg"],
            wanted="the JSON that causal-compress wrote",
            remedy="restore the file, or give another --out",
        ) from error


def read_result(folder: Path, name: str, result_type: type[T]) -> T:
    """Reads the result of a finished stage from a run folder, without opening it for writing.

    Raises:
        RunFolderError: It is no run folder, or the stage is not finished, was changed since, or is of an earlier run.
    """
    stages = read_provenance(folder).stages
    record = _find(stages, name, None)
    reader = TypeAdapter(result_type)
    if record is None or not _is_sound(folder, record, reader):
        raise RunFolderError(
            f"{folder} holds no finished stage '{name}'",
            found="no record of it in run.json" if record is None else "files that are missing, damaged or changed",
            remedy="run the compress command on this folder again: it computes only what is missing",
        )
    _refuse_earlier(folder, stages, record)
    return reader.validate_json((folder / f"{name}.json").read_bytes())


def refuse_mixed(folder: Path) -> None:
    """Refuses a run folder in which models lie that a later run, which was cut off, would have made anew.

    Raises:
        RunFolderError: It is no run folder, or such a one.
    """
    stages = read_provenance(folder).stages
    for record in stages:
        if record.stage in ("export", "quantize"):
            _refuse_earlier(folder, stages, record)


def _provenance(folder: Path, recipe: Recipe, command: tuple[str, ...]) -> Provenance:
    """The run's provenance: a new one, or the folder's own with this command, machine and versions."""
    fingerprint, now = recipe_sha256(recipe), versions()
    old = read_provenance(folder) if (folder / RECORD).exists() else None
    kept = () if old is None else old.stages
    if old is None or {record.stage for record in kept} <= _UNBOUND:  # no work yet that another recipe would spoil
        return Provenance(
            command=command,
            recipe_sha256=fingerprint,
            checkpoint_sha256=None,
            data_sha256=None,
            versions=now,
            machine=machine(),
            seed=recipe.seed,
            stages=kept,
        )
    if old.recipe_sha256 != fingerprint:
        refuse_another(folder, folder / _RECIPE, recipe)
    if changed := sorted(name for name in {*old.versions, *now} if old.versions.get(name) != now.get(name)):
        logger.warning("%s is resumed with other versions than it was begun with: %s", folder, ", ".join(changed))
    return replace(old, command=command, recipe_sha256=fingerprint, versions=now, machine=machine())


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _find(stages: Sequence[StageRecord], name: str, key: str | None) -> StageRecord | None:
    return next((record for record in stages if record.stage == name and key in (None, record.key)), None)


def _refuse_earlier(folder: Path, stages: Sequence[StageRecord], record: StageRecord) -> None:
    """Refuses a stage's result if a stage that it came after, at whatever distance, is another one now."""
    before: StageRecord | None = record
    seen = {record.stage}
    while before is not None and before.after is not None and before.after[0] not in seen:
        name, key = before.after
        seen.add(name)
        before = _find(stages, name, key)
        if before is None:
            raise RunFolderError(
                f"the stage '{record.stage}' in {folder} is of an earlier run than what lies beside it",
                found=f"'{name}' was made anew since, by a run that did not come as far",
                remedy="run the compress command on this folder again: it computes only what is missing",
            )


def _is_sound(folder: Path, record: StageRecord, reader: TypeAdapter[Any]) -> bool:
    """Whether all files of a stage are as they were recorded; says in the log what is wrong."""
    fault = ""
    try:
        for file, fingerprint in record.files.items():
            if sha256_of_file(folder / file) != fingerprint:
                fault = f"{file} was damaged or changed"
                break
        else:
            reader.validate_json((folder / f"{record.stage}.json").read_bytes())
    except (OSError, ValueError) as error:
        fault = str(error).splitlines()[0]
    if fault:
        logger.warning("%s: the result in %s can't be used (%s)", record.stage, folder, fault)
    return not fault


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
