"""The whole story, from a checkpoint to a verified small model, in straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causal_compress.deploy.absent import refuse_absent
from causal_compress.recipe import Recipe
from causal_compress.results import Plan, Scorecard
from causal_compress.runs import open_run
from causal_compress.searching import settle
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


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    scorecard: Scorecard
    folder: Path


def compress(
    recipe: Recipe, run_dir: Path, *, command: Sequence[str] = (), reuse: Path | None = None, force: bool = False
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
    with open_run(run_dir, recipe, command=command, reuse=reuse) as run, numerics(recipe):
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
    recipe: Recipe, run_dir: Path, *, command: Sequence[str] = (), reuse: Path | None = None, force: bool = False
) -> Plan:
    """Dry run: what would merge and narrow, with predicted MACs, parameters and harm; nothing is trained.

    Args:
        recipe: What is asked for.
        run_dir: Where the analysis is written; `compress` on the same folder goes on from it.
        command: The command line, for run.json.
        reuse: Another run whose analysis is taken over where it is the same.
        force: Go on with a teacher near chance.
    """
    with open_run(run_dir, recipe, command=command, reuse=reuse) as run, numerics(recipe):
        return understand(run, recipe, force=force).plan
