"""The training itself: one epoch, one batch, one step; what a run consists of, and what it changes."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel

from causal_compress.errors import NumericalError
from causal_compress.inputs.ahead import made_ahead
from causal_compress.inputs.data import Data
from causal_compress.progress import progress
from causal_compress.recipe import DistillSection, InterveneSection
from causal_compress.recover.compiling import compiled, record
from causal_compress.recover.losses import boundary_loss, kd_loss, label_loss
from causal_compress.recover.networks import answer, unobserved
from causal_compress.recover.optimizers import averaging, optimizers_of
from causal_compress.recover.schedule import boundary_share_at, learning_rate_at
from causal_compress.results import Epoch
from causal_compress.understand.intervene import intervened

if TYPE_CHECKING:
    from accelerate import Accelerator

_ROWS_WATCHED = 2000
_EVALUATION_BATCH = 256
_FEWEST_ROWS = 50  # to say from them that a network answers everything alike


@dataclass(frozen=True)
class Course:
    """What stays the same through all epochs; `answers` are the teacher's logits for batches that come again.

    `compiled` and `recorded` say whether networks go through torch.compile, and whether their passes are CUDA graphs.
    """

    data: Data
    section: DistillSection
    seed: int
    teacher: nn.Module
    accelerator: Accelerator
    device: torch.device
    bf16: bool
    boundaries: int
    compiled: bool = False
    recorded: bool = False
    answers: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch. Rows that are left over differ from epoch to epoch, and where epochs come again
        (`views`) there are none: rows of the first batch fill the last.
        """
        rows, size = len(self.data.train), self.section.batch_size
        return max(1, rows // size) if self.section.views is None else -(-rows // size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.section.epochs

    def autocast(self, *, cached: bool = True) -> AbstractContextManager[Any]:
        """Inside, teacher and student compute in the course's precision; weights in bf16 are made once if `cached`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=cached)


@dataclass(frozen=True)
class Learner:
    """What training changes: the student and its average; and whether any passes could be `recorded`.

    `parallel` and `plain` are the same student, as prepared by Accelerate: `plain` leaves the boundary activations
    out, which are a seventh of a step even where their loss has no weight.
    """

    student: nn.Module
    parallel: nn.Module
    plain: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    average: AveragedModel | None
    recorded: bool = False

    @property
    def result(self) -> nn.Module:
        """The network whose weights count in the end."""
        return self.student if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, as tensors and plain data."""
        average = None if self.average is None else self.average.state_dict()
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"student": self.student.state_dict(), "average": average, "optimizers": optimizers}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.student.load_state_dict(state["student"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


@dataclass(frozen=True)
class _Batch:
    """One process's rows of a batch; `counted` says whose labels can be trusted (not those of intervened inputs).

    `key` names a batch that comes again, which is what `Course.answers` goes by.
    """

    x: Tensor
    labels: Tensor
    counted: Tensor
    key: tuple[int, int] | None


def place_network(network: nn.Module, device: torch.device, data: Data) -> nn.Module:
    """Moves the caller's own copy to where it will run; convolutions on images like channels last."""
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if len(data.input_shape) == 3 else network


def prepare(course: Course, watched: nn.Module) -> Learner:
    """Sets up optimizers, average and, on several processes, the exchange of gradients.

    Args:
        course: Where and how to train.
        watched: The caller's own copy of the student; all of its parameters will be trained.
    """
    section = course.section
    student = place_network(watched.requires_grad_(True), course.device, course.data)
    average = None
    if section.ema > 0:
        average = AveragedModel(student, multi_avg_fn=averaging(section.ema), use_buffers=True)
    parallel, *optimizers = course.accelerator.prepare(student, *optimizers_of(student, section))
    plain = unobserved(student) if parallel is student else parallel
    if course.compiled:
        parallel, plain = compiled(parallel), compiled(plain)
    recorded = course.recorded and _record(course, student, parallel, plain)
    return Learner(student, parallel, plain, tuple(optimizers), average, recorded)


def _record(course: Course, student: nn.Module, parallel: nn.Module, plain: nn.Module) -> bool:
    """Records the passes that a step consists of, on rows as they will come; whether any could be."""
    gc.collect()  # what was recorded for an earlier student is held by a cycle
    torch.cuda.empty_cache()
    size = min(course.section.batch_size, len(course.data.train))
    x, labels = next(iter(_filled(course.data.train.batches(size, limit=size), size)))
    example = _own_rows(course, _Batch(x, labels, labels >= 0, None)).x
    _set_training(student, parallel, plain)
    looks_inside = course.boundaries > 0 and course.section.boundary_weight > 0
    networks = [course.teacher, plain, *([parallel] if looks_inside and parallel is not plain else [])]
    done = [record(network, example, lambda: course.autocast(cached=False)) for network in networks]
    return any(done)


def _set_training(student: nn.Module, *shared: nn.Module) -> None:
    """Training mode for the student and networks that share its layers, dropout resting."""
    for network in shared:
        network.train()
    _rest_dropout(student)


def train_epoch(course: Course, learner: Learner, index: int) -> Epoch:
    """Trains for one epoch; what happens in it depends on the learner's state, the seed and `index` alone.

    Args:
        course: Data, teacher and settings.
        learner: Changed.
        index: 0 for the first epoch.

    Returns:
        Mean loss, last learning rate, accuracy on part of the validation split, seconds of training.

    Raises:
        NumericalError: a loss or gradient is NaN or infinite (the step is not taken), or the student has come to answer
            all inputs alike.
    """
    _set_training(learner.student, learner.parallel, learner.plain)
    total, rate = torch.zeros((), device=course.device), 0.0
    started = time.perf_counter()
    with _seeded(course, index):
        for number, batch in enumerate(_batches(course, index)):
            step = index * course.steps_per_epoch + number
            rate = learning_rate_at(step, course.steps, course.section.learning_rate)
            total += _step(course, learner, batch, step)
    loss = course.accelerator.reduce(total / course.steps_per_epoch, "mean").item()
    seconds = time.perf_counter() - started
    with course.autocast():
        seen = watch(course, learner.result, _ROWS_WATCHED)
    pct = 100.0 * seen.correct / max(seen.n, 1)
    _refuse_collapse(course, seen, f"after epoch {index + 1} it is right on {pct:.2f} % of {seen.n} validation inputs")
    return Epoch(epoch=index + 1, loss=loss, learning_rate=rate, validation_pct=pct, seconds=seconds)


def _rest_dropout(student: nn.Module) -> None:
    """Dropout and stochastic depth pass everything on: a small student has no units to spare, and the teacher's soft
    answers regularise enough (AlexNet, 41 hidden units: KD loss 4 with it, 0.03 without).
    """
    for module in student.modules():
        name = type(module).__name__.lower()
        inside = isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
        if "dropout" in name or name == "stochasticdepth" or inside:
            module.eval()


@contextmanager
def _seeded(course: Course, index: int) -> Iterator[None]:
    """Dropout and the like depend on seed, epoch and process only; the caller's random state is put back."""
    devices = list(range(torch.cuda.device_count())) if course.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        if course.recorded:  # passes were recorded on another stream than they are replayed on, which autograd tells of
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        torch.manual_seed(_mixed_seed(course.seed, index, course.accelerator.process_index))
        yield


def _mixed_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _batches(course: Course, index: int) -> Iterator[_Batch]:
    """This process's part of every batch of an epoch; the same batches whatever the number of processes.

    With `views` in the recipe, epochs that are so many apart have the same batches.
    """
    view = index if course.section.views is None else index % course.section.views
    seed = _mixed_seed(course.seed, view)
    generator = torch.Generator().manual_seed(seed)
    batches = course.data.train.batches(course.section.batch_size, shuffle_seed=seed, augment=True)
    batches = islice(_filled(batches, min(course.section.batch_size, len(course.data.train))), course.steps_per_epoch)
    if course.device.type != "cpu":  # which would have to make them anyway
        batches = made_ahead(batches)
    if course.accelerator.is_main_process:
        label = f"distill {index + 1}/{course.section.epochs}"
        batches = progress(batches, label=label, total=course.steps_per_epoch)
    for number, (x, labels) in enumerate(batches):
        rows = int(course.section.intervened_share * len(x))
        seen = _intervene_on(x, rows, course, generator)
        key = None if course.section.views is None else (view, number)
        yield _own_rows(course, _Batch(seen, labels, torch.arange(len(x)) >= rows, key))


def _filled(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All batches of the same size: a short last one is filled with rows of the first."""
    first: tuple[Tensor, Tensor] | None = None
    for x, labels in batches:
        first = first or (x, labels)
        missing = size - len(x)
        yield torch.cat([x, first[0][:missing]]), torch.cat([labels, first[1][:missing]])


def _intervene_on(x: Tensor, rows: int, course: Course, generator: torch.Generator) -> Tensor:
    """The batch with its first rows intervened; which inputs these are is chance.

    Baselines and patches are those of the analysis by default; each share of features is masked in as many rows.
    """
    if rows == 0:
        return x
    usual, data, fractions = InterveneSection(), course.data, course.section.intervened_fractions
    masked = [
        intervened(
            part,
            data.features,
            grid=usual.grid,
            fraction=fraction,
            baselines=tuple(usual.baselines),
            generator=generator,
        )
        for part, fraction in zip(x[:rows].tensor_split(len(fractions)), fractions, strict=True)
        if len(part)
    ]
    return torch.cat([*masked, x[rows:]])


def _own_rows(course: Course, batch: _Batch) -> _Batch:
    own = slice(course.accelerator.process_index, None, course.accelerator.num_processes)
    layout = torch.channels_last if batch.x.ndim == 4 else torch.contiguous_format
    x, labels, counted = (value[own].to(course.device) for value in (batch.x, batch.labels, batch.counted))
    return _Batch(x.contiguous(memory_format=layout), labels, counted, batch.key)


def _step(course: Course, learner: Learner, batch: _Batch, step: int) -> Tensor:
    """One optimizer step; returns the loss before it."""
    loss = _loss(course, learner, batch, step)
    for optimizer in learner.optimizers:
        optimizer.zero_grad()
    course.accelerator.backward(loss)
    norm = get_total_norm([p.grad for p in learner.student.parameters() if p.grad is not None])
    _refuse_non_finite(course, loss, norm, step)
    if course.section.clip_norm is not None:
        clip_grads_with_norm_(learner.student.parameters(), course.section.clip_norm, norm)
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, course.steps, group["peak"])
        optimizer.step()
    if learner.average is not None:
        learner.average.update_parameters(learner.student)
    return loss.detach()


def _loss(course: Course, learner: Learner, batch: _Batch, step: int) -> Tensor:
    section = course.section
    weight = section.boundary_weight * boundary_share_at(step, course.steps) if course.boundaries else 0.0
    wanted, wanted_inside = _taught(course, batch, inside=weight > 0)
    with course.autocast():
        logits, inside = answer(learner.parallel if weight > 0 else learner.plain, batch.x)
    loss = (1.0 - section.label_weight) * kd_loss(logits, wanted, section.temperature)
    if section.label_weight > 0:
        loss = loss + section.label_weight * label_loss(logits, batch.labels, batch.counted)
    return loss + weight * boundary_loss(inside, wanted_inside) if weight > 0 else loss


def _taught(course: Course, batch: _Batch, *, inside: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The teacher's logits, remembered where the batch comes again, and its boundary activations where asked for."""
    if not inside and batch.key in course.answers:
        return course.answers[batch.key], ()
    with course.autocast(), torch.no_grad():
        wanted, activations = answer(course.teacher, batch.x)
    if batch.key is not None:
        course.answers[batch.key] = wanted.clone()  # what is recorded writes its answers to the same place again
    return wanted, activations


def _refuse_non_finite(course: Course, loss: Tensor, norm: Tensor, step: int) -> None:
    if torch.isfinite(loss.detach() + norm):
        return
    epoch, number = divmod(step, course.steps_per_epoch)
    raise NumericalError(
        f"distill: loss or gradient is not finite in epoch {epoch + 1}, step {number + 1} of {course.steps_per_epoch}",
        found=f"loss {loss.item():g}, norm of the gradient {norm.item():g}",
        wanted="finite numbers; the step was not taken",
        remedy=f"lower {_rates(course.section)}, raise distill.batch_size"
        + (", or set distill.precision to fp32" if course.bf16 else ""),
    )


def _rates(section: DistillSection) -> str:
    """The keys that say how far a step goes, with their values."""
    rates = f"distill.learning_rate (now {section.learning_rate:g})"
    return rates if section.optimizer == "sgd" else f"{rates}, distill.relative_rate (now {section.relative_rate:g})"


def _refuse_collapse(course: Course, seen: Seen, found: str) -> None:
    if seen.classes > 1 or seen.n < _FEWEST_ROWS or 2 * seen.correct > seen.n:  # where one class is common, it may
        return
    raise NumericalError(
        "distill: the student gives every validation input the same class",
        found=found,
        wanted="a student that tells classes apart",
        remedy=f"lower {_rates(course.section)} or distill.clip_norm"
        f" (now {course.section.clip_norm}), or set distill to null to keep the student as the surgery left it",
    )


@dataclass(frozen=True)
class Seen:
    """How a network did on validation inputs: right answers, of how many, and how many classes it named."""

    correct: int
    n: int
    classes: int


def watch(course: Course, network: nn.Module, limit: int | None) -> Seen:
    """Validation inputs answered rightly, how many there were, and how many classes were named.

    Args:
        course: Data and device.
        network: On the course's device; left in evaluation mode.
        limit: Use at most so many inputs; None: all.
    """
    network.eval()
    correct = n = 0
    named: set[int] = set()
    with torch.no_grad():
        for x, labels in course.data.validation.batches(_EVALUATION_BATCH, limit=limit):
            logits, _ = answer(network, x.to(course.device))
            answered = logits.argmax(1).cpu()
            named.update(answered.unique().tolist())
            correct += int((answered == labels).sum())
            n += len(labels)
    return Seen(correct, n, len(named))
