"""The whole story, from a checkpoint to a verified small model, in straight lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from causal_compress.deploy.absent import refuse_absent
from causal_compress.errors import BudgetError
from causal_compress.recipe import Recipe
from causal_compress.results import Plan, Scorecard
from causal_compress.runs import Run, open_run
from causal_compress.searching import settle
from causal_compress.shrink.search import searches
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

    Args:
        recipe: What is asked for.
        run_dir: Where the analysis is written; `compress` on the same folder goes on from it.
        command: The command line, for run.json.
        reuse: Another run whose analysis is taken over where it is the same.
        force: Go on with a teacher near chance.
    """
    with _opened(run_dir, recipe, command, reuse) as run:
        plan = understand(run, recipe, force=force).plan
    if searches(recipe.budget):
        logger.info("the budget leaves the size open: half of the MACs are planned for here; compress searches for it")
    return plan


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
