"""Distillation: after surgery the student is trained to answer as the teacher does, on plain and on intervened inputs.

Both networks see the same augmented view. By default every view is new and the teacher runs on every batch: with its
batch norms folded it costs a tenth to a fifth of a step beside a student of half its size. Beside a tiny student it
is nearly all of the step; `distill.views` then fixes a number of views, and its logits are kept.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from causal_compress.errors import DataError, MissingPackageError, TraceError
from causal_compress.inputs.data import Data
from causal_compress.recipe import DistillSection
from causal_compress.recover import checkpoint
from causal_compress.recover.allocator import freed_memory_kept
from causal_compress.recover.compiling import compiled, is_compiled, is_recorded
from causal_compress.recover.networks import answer, fold_batch_norms, observed
from causal_compress.recover.norms import trained_node, with_norms, without_norms
from causal_compress.recover.training import Course, Learner, place_network, prepare, train_epoch, watch
from causal_compress.results import Distilled, Epoch
from causal_compress.understand.statistics import wilson

logger = logging.getLogger(__name__)

_NORM_INPUTS, _NORM_BATCH = 1024, 256


def distill(  # noqa: PLR0913  (what a stage needs to know; all but the networks go by name)
    student: nn.Module,
    teacher: nn.Module,
    boundaries: Sequence[tuple[str, str]],
    data: Data,
    section: DistillSection,
    *,
    seed: int,
    device: str,
    progress_dir: Path | None,
) -> tuple[nn.Module, Distilled]:
    """Train a copy of the student to answer as the teacher does.

    Args:
        student: Network after surgery; left unchanged.
        teacher: Network before surgery; left unchanged.
        boundaries: Pairs (student's graph node, teacher's graph node) whose activations should agree; both networks
            must then be torch.fx.GraphModules.
        data: Trains on `train`; `validation` is watched, never chosen by.
        section: Epochs, rates and weights of the losses.
        seed: Of shuffling, augmentation, interventions and dropout.
        device: As torch names it; several processes, started by `accelerate launch` (`torchrun` where there are only
            CPUs), take the devices given to them.
        progress_dir: Where each epoch's end is kept; a run that was cut off goes on from there. None: nowhere.

    Returns:
        The student after the last epoch (never the best one), its weights and batch norm statistics averaged over the
        steps if `section.ema` > 0, in the mode and on the device of the one passed in; and how it was trained.

    Raises:
        DataError: fewer than two training inputs per process and batch.
        NumericalError: a loss or gradient is NaN or infinite (the step is not taken), or the student has come to answer
            all inputs alike.
        RunFolderError: progress_dir can't be written, or what it holds is damaged.
        TraceError: boundaries that are absent or that differ in shape.

    Source: Hinton et al. 2015, arXiv:1503.02531, for the logits; DESIGN, section 3, for boundaries and interventions.
    Limits: bit-for-bit resumption needs the same machine, threads and number of processes, and on a GPU as much free
        memory, by which passes are recorded or not. On several processes a batch is divided among them, so batch norms
        see fewer rows; the folder must be the same for all, and the first process's student is the one to keep.
    """
    course = _set_out(teacher, [name for _, name in boundaries], data, section, seed, device)
    structure = _with_norms(student, data) if section.norms and section.epochs else copy.deepcopy(student)
    watched = observed(structure, [trained_node(structure, name) for name, _ in boundaries], role="student")
    history: list[Epoch] = []
    trained = copy.deepcopy(student)
    if section.epochs > 0:
        _check(course, watched, boundaries)
        stamp = _stamp(course, student, boundaries)
        if course.compiled:
            course = replace(course, teacher=compiled(course.teacher))
        learner = prepare(course, watched)
        course = replace(course, recorded=learner.recorded)
        with freed_memory_kept():
            history = _train(course, learner, progress_dir, stamp)
        structure.load_state_dict(learner.result.state_dict())
        trained.load_state_dict(without_norms(structure, student) if section.norms else structure.state_dict())
    return trained, _summary(course, trained, history)


def _set_out(
    teacher: nn.Module, nodes: Sequence[str], data: Data, section: DistillSection, seed: int, device: str
) -> Course:
    from accelerate import Accelerator  # takes a second to import

    # Precision and placement are set here for both networks alike, not by Accelerate for the student alone.
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision="no", device_placement=False)
    place = torch.device(device) if accelerator.num_processes == 1 else accelerator.device
    guide = fold_batch_norms(observed(teacher, nodes, role="teacher").eval())
    guide = place_network(guide.requires_grad_(False), place, data)
    course = Course(data, section, seed, guide, accelerator, place, _uses_bf16(section.precision, place), len(nodes))
    how = {"steps": course.steps, "device": place, "processes": accelerator.num_processes}
    return replace(course, compiled=is_compiled(section, **how), recorded=is_recorded(section, **how))


def _with_norms(student: nn.Module, data: Data) -> nn.Module:
    return with_norms(student, [x for x, _ in data.train.batches(_NORM_BATCH, limit=_NORM_INPUTS)])


def resolve_device(name: str) -> str:
    """`auto` becomes the first CUDA device where there is one, else the CPU.

    Raises:
        MissingPackageError: a CUDA device that is not there.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if there else "cpu"
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= there:
        raise MissingPackageError(
            f"the device {name} is not there",
            found=f"{there} usable CUDA devices",
            wanted="auto, cpu" + "".join(f", cuda:{index}" for index in range(there)),
            remedy="set device: auto, or cpu; `causal-compress doctor` says what works here",
        )
    return name


def _uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: as asked for, or where the hardware has it (elsewhere it is emulated, slowly)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def _check(course: Course, watched: nn.Module, boundaries: Sequence[tuple[str, str]]) -> None:
    rows = min(course.section.batch_size, len(course.data.train)) // course.accelerator.num_processes
    if rows < 2:
        raise DataError(
            "distill: a batch is too small",
            found=f"{rows} training inputs per process and batch",
            wanted="at least 2, because batch norms need a spread",
            remedy="raise distill.batch_size, use more training data or fewer processes, or set distill.epochs to 0",
        )
    x = course.data.example_input
    with torch.no_grad():
        _, ours = answer(copy.deepcopy(watched).eval(), x.to(next(watched.parameters()).device))
        _, theirs = answer(course.teacher, x.to(course.device))
    for names, mine, wanted in zip(boundaries, ours, theirs, strict=True):
        if mine.shape != wanted.shape:
            raise TraceError(
                f"distill: the activations at boundary {names[0]} / {names[1]} differ in shape",
                found=f"student {tuple(mine.shape[1:])}, teacher {tuple(wanted.shape[1:])}",
                wanted="equal shapes",
                remedy="leave this boundary out",
            )


def _stamp(course: Course, student: nn.Module, boundaries: Sequence[tuple[str, str]]) -> str:
    """All that the trained weights depend on; progress with another stamp is another run's."""
    place = f"{course.device.type} {course.bf16} {course.compiled} {course.accelerator.num_processes}"
    place += " recorded" if course.recorded else ""
    texts = [course.section.model_dump_json(), str(course.seed), str(list(boundaries)), course.data.fingerprint, place]
    return checkpoint.fingerprint(student, [*texts, checkpoint.fingerprint(course.teacher, ())])


def _train(course: Course, learner: Learner, folder: Path | None, stamp: str) -> list[Epoch]:
    history: list[Epoch] = []
    state = checkpoint.load(folder, stamp) if folder is not None else None
    if state is not None:
        history = [Epoch(**epoch) for epoch in state.pop("history")]
        learner.restore(state)
        logger.info("distill: goes on after epoch %d of %d", len(history), course.section.epochs)
    for index in range(len(history), course.section.epochs):
        history.append(train_epoch(course, learner, index))
        _tell(course, history[-1])
        if folder is not None and course.accelerator.is_main_process:
            checkpoint.save(folder, stamp, {**learner.state(), "history": [asdict(epoch) for epoch in history]})
    return history


def _tell(course: Course, epoch: Epoch) -> None:
    if course.accelerator.is_main_process:
        text = "distill: epoch %d of %d: loss %.4f, %.2f %% of validation right, %.0f s"
        logger.info(text, epoch.epoch, course.section.epochs, epoch.loss, epoch.validation_pct, epoch.seconds)


def _summary(course: Course, trained: nn.Module, history: Sequence[Epoch]) -> Distilled:
    seen = watch(course, copy.deepcopy(trained).to(course.device), None)
    images = len(history) * course.steps_per_epoch * min(course.section.batch_size, len(course.data.train))
    seconds = sum(epoch.seconds for epoch in history)
    return Distilled(
        epochs=tuple(history),
        validation=wilson(seen.correct, seen.n),
        images_per_second=images / seconds if seconds > 0 else 0.0,
        precision="bf16" if course.bf16 else "fp32",
        averaged=course.section.ema > 0 and bool(history),
        device=course.device.type,
        processes=course.accelerator.num_processes,
        compiled=course.compiled,
        recorded=course.recorded,
    )
