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
from causal_compress.errors import BudgetError, NumericalError, SurgeryError
from causal_compress.recipe import DistillSection, Recipe
from causal_compress.results import Candidates, Pareto, RegionInfo, SearchPoint
from causal_compress.runs import Run, open_run
from causal_compress.shrink.plan import least_macs
from causal_compress.shrink.search import search, searches
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
    pareto = run.stage(
        "search",
        Pareto,
        lambda _: search(
            partial(_attempt_or_none, run.folder, recipe, short),
            recipe.search,
            limit_pp=limit,
            least=least_macs(candidates, recipe.plan, regions),
            in_full=partial(_attempt_or_none, run.folder, recipe, full) if full > short else None,
        ),
        depends={
            "candidates": run.key_of("candidates"),
            "group": run.key_of("group"),
            "limit": limit,
            **{name: getattr(recipe, name) for name in ("search", "plan", "rewrite", "prune", "distill")},
            "augment": recipe.data.augment,
        },
    )
    run.write_json("pareto.json", pareto)
    share = pareto.points[pareto.chosen].asked_macs
    for folder in _tried(run.folder, share):
        run.reuse_also(folder)
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"macs": share})})


def _tried(folder: Path, share: float) -> list[Path]:
    """Run folders of a size; they share its surgery."""
    return [path.parent for path in sorted((folder / "points").glob(f"{share:.4f}-*/run.json"))]


def _folder(folder: Path, share: float, epochs: int) -> Path:
    return folder / "points" / f"{share:.4f}-{epochs}"


def _attempt_or_none(folder: Path, recipe: Recipe, epochs: int, share: float) -> SearchPoint | None:
    try:
        return attempt(folder, recipe, share, epochs)
    except (BudgetError, NumericalError, SurgeryError) as error:
        logger.warning("search: %.3f of the MACs can't be carried out: %s", share, error.what)
        return None


def attempt(folder: Path, recipe: Recipe, share: float, epochs: int) -> SearchPoint:
    """Compress to a share of the MACs in a run folder of its own, recover, and measure on validation data."""
    start = time.perf_counter()
    distill = None if recipe.distill is None or epochs == 0 else shortened(recipe.distill, epochs)
    budget = recipe.budget.model_copy(update={"macs": share})
    point = recipe.model_copy(update={"budget": budget, "distill": distill})
    with open_run(_folder(folder, share, epochs), point, command=("search",), reuse=folder) as run:
        for other in _tried(folder, share):
            if other != run.folder:
                run.reuse_also(other)
        known = understand(run, point, force=True)
        _, student = shrink_depth(run, point, known)
        log, student = shrink_width(run, point, known, student)
        distilled, student = recover(run, point, known, student)
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
