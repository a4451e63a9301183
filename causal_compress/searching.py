"""A budget that limits the drop of accuracy and no cost: which size holds it is found by trying, on validation data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from causal_compress.deploy.benchmark import Pair, count_agreement
from causal_compress.deploy.runtimes import TorchRuntime
from causal_compress.errors import BudgetError, NumericalError, RunFolderError, SurgeryError
from causal_compress.inputs.data import augmentation
from causal_compress.recipe import DistillSection, Recipe
from causal_compress.results import Candidates, Pareto, RegionInfo, SearchPoint, TeacherScore
from causal_compress.runs import Run, open_run, read_result
from causal_compress.shrink.plan import least_macs
from causal_compress.shrink.search import refuse_unsure, search, searches
from causal_compress.shrink.surgery import Student
from causal_compress.stages import Understood, recover, shrink_depth, shrink_width, understand
from causal_compress.understand.statistics import paired_drop

logger = logging.getLogger(__name__)


def settle(run: Run, recipe: Recipe, candidates: Candidates, regions: Sequence[RegionInfo]) -> Recipe:
    """The recipe with the smallest share of MACs whose drop of accuracy, on validation data, lies within the budget."""
    if not searches(recipe.budget):
        return recipe
    limit = recipe.budget.max_accuracy_drop
    assert limit is not None
    full = 0 if recipe.distill is None else recipe.distill.epochs
    short = min(recipe.search.epochs, full)
    refuse_unsure(recipe.search, limit_pp=limit, n=read_result(run.folder, "teacher", TeacherScore).accuracy.n)
    pareto = run.stage(
        "search",
        Pareto,
        lambda _: search(
            partial(_attempt_or_none, run, recipe, short),
            recipe.search,
            limit_pp=limit,
            least=least_macs(candidates, recipe.plan, regions),
            in_full=partial(_attempt_or_none, run, recipe, full) if full > short else None,
        ),
        depends={
            "candidates": run.key_of("candidates"),
            "group": run.key_of("group"),
            "limit": limit,
            **{name: getattr(recipe, name) for name in ("search", "plan", "rewrite", "prune", "distill")},
            "augment": augmentation(recipe.data.augment),
        },
    )
    run.write_json("pareto.json", pareto)
    _reuse_tried(run, run)
    share = pareto.points[pareto.chosen].asked_macs
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"macs": share})})


def _reuse_tried(search: Run, run: Run) -> None:
    """Let a run take over what was done for any size of a search, those of the run that it reuses among them.

    One size shares its surgery however long it recovers, and two shares of MACs may lead to one network.
    """
    folders = [search.folder] if search.reused is None else [search.folder, search.reused]
    for path in (path for each in folders for path in sorted((each / "points").glob("*/run.json"))):
        if path.parent == run.folder:
            continue
        try:
            run.reuse_also(path.parent)
        except RunFolderError as error:  # nobody asked for this folder by name
            logger.warning("search: a size that was tried is not taken over: %s", error.what)


def _folder(folder: Path, share: float, epochs: int) -> Path:
    return folder / "points" / f"{share:.4f}-{epochs}"


def _attempt_or_none(run: Run, recipe: Recipe, epochs: int, share: float) -> SearchPoint | None:
    try:
        return attempt(run, recipe, share, epochs)
    except (BudgetError, NumericalError, SurgeryError) as error:
        why = str(error).replace("\n  ", "; ")  # with its remedy: nobody else names it
        logger.warning("search: %.3f of the MACs can't be carried out: %s", share, why)
        return None


def attempt(run: Run, recipe: Recipe, share: float, epochs: int) -> SearchPoint:
    """Compress to a share of the MACs in a run folder of its own, recover, and measure on validation data."""
    start = time.perf_counter()
    distill = None if recipe.distill is None or epochs == 0 else shortened(recipe.distill, epochs)
    budget = recipe.budget.model_copy(update={"macs": share})
    point = recipe.model_copy(update={"budget": budget, "distill": distill})
    with open_run(_folder(run.folder, share, epochs), point, command=("search",), reuse=run.folder) as one:
        _reuse_tried(run, one)
        known = understand(one, point, force=True)
        _, student = shrink_depth(one, point, known)
        log, student = shrink_width(one, point, known, student)
        distilled, student = recover(one, point, known, student)
        drop, interval, n = validation_drop(known, student)
    return SearchPoint(
        asked_macs=share,
        macs=log.macs / known.teacher.macs,
        params=log.params / known.teacher.params,
        heldout_kl=log.heldout_kl,
        drop_pp=drop,
        drop_ci_pp=interval,
        n=n,
        epochs=epochs,
        seconds=max(time.perf_counter() - start, distilled.seconds if distilled else 0.0),  # it may have been cut off
    )


def shortened(section: DistillSection, epochs: int) -> DistillSection:
    """The same recovery in fewer epochs: peak rates shrink with the square root of its length.

    The rates of a long run are for wandering far; a short one hasn't the time to come back from there.
    """
    shrunk = math.sqrt(min(1.0, epochs / section.epochs))
    rates = {name: shrunk * getattr(section, name) for name in ("learning_rate", "relative_rate")}
    return section.model_copy(update={"epochs": epochs, **rates})


def validation_drop(known: Understood, student: Student) -> tuple[float, tuple[float, float], int]:
    """Drop of accuracy on the validation split [pp], its 95 % interval, and the number of inputs."""
    models = TorchRuntime(known.network.teacher), TorchRuntime(student.graph)
    pair = Pair(runtime="torch", threads=torch.get_num_threads(), teacher=models[0], student=models[1])
    agreement = count_agreement(pair, known.data.validation)
    drop, interval = paired_drop(agreement.teacher_only, agreement.student_only, agreement.n)
    return drop, interval, agreement.n
