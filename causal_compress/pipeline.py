"""The whole story, from a checkpoint to a verified small model, in straight lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from causal_compress.deploy.absent import refuse_absent
from causal_compress.errors import BudgetError
from causal_compress.planning import recorded
from causal_compress.recipe import Recipe
from causal_compress.results import Candidates, Plan, RegionInfo, Scorecard
from causal_compress.runs import Run, open_run
from causal_compress.searching import settle
from causal_compress.shrink.plan import least_macs
from causal_compress.shrink.search import first_share, searches
from causal_compress.stages import (
    check_harm,
    deploy,
    look_at_examples,
    numerics,
    recover,
    report,
    score,
    shrink_bits,
    shrink_depth,
    shrink_width,
    understand,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
_OPEN = "the budget leaves the size open"


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    scorecard: Scorecard
    folder: Path


def compress(
    recipe: Recipe,
    run_dir: Path | str,
    *,
    command: Sequence[str] = (),
    reuse: Path | str | None = None,
    force: bool = False,
) -> Outcome:
    """Compress a checkpoint: understand, shrink, recover, deploy, explain.

    Args:
        recipe: What is asked for.
        run_dir: Where everything is written; resumed if it holds an unfinished run of the same recipe.
        command: The command line, for run.json.
        reuse: Another run whose analysis is taken over where it is the same.
        force: Go on with a teacher near chance.

    Raises:
        CausalCompressError: whatever the user has to mend; what was finished by then stays in the folder.
    """
    if recipe.benchmark is not None:
        refuse_absent(recipe.benchmark.runtimes)  # before the work, not after it
    with _opened(run_dir, recipe, command, reuse) as run:
        known = understand(run, recipe, force=force, settle=settle)
        rewritten, student = shrink_depth(run, recipe, known)
        pruned, student = shrink_width(run, recipe, known, student)
        distilled, student = recover(run, recipe, known, student)
        exported = deploy(run, recipe, known, student)
        files = exported, shrink_bits(run, recipe, known, student, exported)
        scorecard = score(run, recipe, known, student, files)
        examples = look_at_examples(run, recipe, known, student)
        audited = check_harm(run, recipe, known, student)
        report(run, recipe, known, (rewritten, pruned, distilled, files, scorecard, examples, audited))
        return Outcome(scorecard, run.folder)


def analyze(
    recipe: Recipe,
    run_dir: Path | str,
    *,
    command: Sequence[str] = (),
    reuse: Path | str | None = None,
    force: bool = False,
) -> Plan:
    """Dry run: what would merge and narrow, with predicted MACs, parameters and harm; nothing is trained.

    Where the budget leaves the size open, the plan is for the size that a finished search chose, in this folder or in
    the one to reuse, else for the size that a search begins with.

    Args:
        recipe: What is asked for.
        run_dir: Where the analysis is written; `compress` on the same folder goes on from it.
        command: The command line, for run.json.
        reuse: Another run whose analysis is taken over where it is the same.
        force: Go on with a teacher near chance.
    """
    with _opened(run_dir, recipe, command, reuse) as run:
        folders = [run.folder] if reuse is None else [run.folder, Path(reuse)]
        return understand(run, recipe, force=force, settle=partial(_foresee, folders=folders)).plan


class _NotFinishedError(Exception):
    """A stage would have to be computed."""


@dataclass(frozen=True)
class _OnlyFinished:
    """A run in which no stage is computed, only read from these folders."""

    run: Run
    folders: Sequence[Path]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)

    def stage(self, name: str, result_type: type[T], compute: Callable[[Path], T], *, depends: Mapping[str, Any]) -> T:
        def refuse(_: Path) -> T:
            raise _NotFinishedError

        if not any(recorded(folder, name, depends) for folder in self.folders):
            raise _NotFinishedError
        return self.run.stage(name, result_type, refuse, depends=depends)  # what is recorded may still be damaged


def _foresee(
    run: Run, recipe: Recipe, candidates: Candidates, regions: Sequence[RegionInfo], *, folders: Sequence[Path]
) -> Recipe:
    """A recipe that leaves the size open, with the one that a search chose or, where none is finished, begins with."""
    if not searches(recipe.budget):
        return recipe
    try:
        found = settle(cast("Run", _OnlyFinished(run, folders)), recipe, candidates, regions)
    except _NotFinishedError:
        share = first_share(least_macs(candidates, recipe.plan, regions))
        logger.info("%s: here %g of the MACs are planned for, with which the search of compress begins", _OPEN, share)
        return recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"macs": share})})
    logger.info("%s: the search that lies there chose %g of the MACs", _OPEN, found.budget.macs)
    return found


@contextmanager
def _opened(run_dir: Path | str, recipe: Recipe, command: Sequence[str], reuse: Path | str | None) -> Iterator[Run]:
    """The run folder; a budget that can't be met is told with the way on, as another budget is another recipe."""
    old = Path(reuse) if reuse else None
    with open_run(Path(run_dir), recipe, command=command, reuse=old) as run, numerics(recipe):
        try:
            yield run
        except BudgetError as error:
            remedy = f"{error.remedy}; and give another --out (with --reuse {run_dir} it takes over what is the same)"
            raise BudgetError(error.what, found=error.found, wanted=error.wanted, remedy=remedy) from error
