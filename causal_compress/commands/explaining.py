"""explain: why a network answers as it does, of a finished run or of any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.commands.shared import FOLDER, as_json_text, chosen_recipe, talks
from causal_compress.console import show_table, tell, tell_lines
from causal_compress.errors import UsageError
from causal_compress.files import make_room

if TYPE_CHECKING:
    from causal_compress.results import Attribution, CausalMap, Explanation, LocalExplanation, MinimalSet

_TOP = 5


@click.command()
@click.argument("target", type=FOLDER, required=False)
@click.option("--recipe", metavar="FILE|NAME", help="Without TARGET: recipe file, or the name of a shipped recipe.")
@click.option("--arch", help="torchvision:NAME, timm:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE.")
@click.option("--weights", metavar="FILE", help="Checkpoint: .pt, .pth, .th or .safetensors.")
@click.option("--data", metavar="SOURCE", help="npz:FILE, imagefolder:DIR, csv:FILE, sklearn:NAME and others.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Overrides a recipe key.")
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option("--input", "file", type=FOLDER, metavar="FILE", help="Explain the answer to this image, or .npy input.")
@click.option("--index", type=int, metavar="N", help="Explain the answer to input N of the split, from 0.")
@click.option("--class", "of_class", metavar="K", help="Only inputs that get this class (name or number) count.")
@click.option(
    "--split", type=click.Choice(["validation", "test", "calibration"]), default="validation", show_default=True
)
@click.option("--out", type=FOLDER, metavar="FILE", help="Write the explanation as .html page or as .json.")
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON.")
@talks
def explain(*, target: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Explains a finished run TARGET, or any checkpoint: what decides, and where.

    Prints the decision with its reasons, each with a 95 % interval, and the causal nodes by effect.
    """
    asked = {key: options.pop(key) for key in ("file", "index", "of_class", "split")}
    if asked["file"] is not None and asked["index"] is not None:
        raise UsageError("two inputs were named", found="--input and --index", remedy="give one of them")
    if out is not None and out.suffix not in (".html", ".json"):
        raise UsageError("the file's kind is unknown", found=str(out), wanted=".html or .json", remedy="name it so")
    recipe = _recipe_of(target, options)
    if out is not None:
        make_room(out)

    from causal_compress.explanations import explain_run_or_checkpoint, write_explanations

    explained = explain_run_or_checkpoint(target, recipe, **asked)
    if out is not None:
        write_explanations(explained, out)
    if as_json:
        tell_lines(as_json_text(explained.explanations))
        return
    for explanation in explained.explanations:
        show_explanation(explanation)
    if out is not None:
        tell(f"written: {out}")


def _recipe_of(target: Path | None, options: dict[str, Any]) -> Any:
    """The recipe of a checkpoint; None for a run, which brings its own."""
    if target is None:
        return chosen_recipe(**options)
    given = [f"--{key}" for key, value in options.items() if value not in (None, ()) and key != "settings"]
    if given:
        raise UsageError(
            "a run brings its own network and data",
            found=", ".join(given),
            remedy="leave TARGET out to explain a checkpoint, or leave these out",
        )
    from causal_compress.explanations import recipe_of_run

    return recipe_of_run(target, options["settings"])


def show_explanation(explanation: Explanation) -> None:
    """Prints an explanation: the decision first, then its features and sets, then the causal nodes by ACE."""
    tell(f"== {explanation.network} ==")
    if explanation.local is not None:
        _show_local(explanation.local)
    else:
        for attribution in explanation.classes:
            features = ", ".join(_feature(f.name, f.value, f.low, f.high) for f in top(attribution))
            tell(f"{attribution.target} ({attribution.inputs} inputs): {features or 'no feature beyond its null'}")
    found = explanation.local.causal_map if explanation.local else explanation.causal_map
    _show_nodes(found)
    for note in explanation.notes:
        tell(f"note: {note}")
    tell(f"cost: {explanation.forwards} forwards, {explanation.seconds:.1f} s")


def top(attribution: Attribution) -> Sequence[Any]:
    """The features with the largest effects beyond the null, for or against."""
    beyond = [f for f in attribution.features if not attribution.null_low <= f.value <= attribution.null_high]
    return sorted(beyond, key=lambda f: -abs(f.value))[:_TOP]


def _feature(name: str, value: float, low: float, high: float) -> str:
    return f"{name} {value:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if low == low else "")  # NaN: no interval


def _show_local(local: LocalExplanation) -> None:
    truth = f", true class {local.true_class}" if local.true_class else ""
    tell(f"{local.name}: {local.decision}, {local.confidence_pct:.1f} % sure{truth}")
    decided = local.output[0]
    null = f"null {decided.null_low:+.2f} to {decided.null_high:+.2f}"
    known = decided.null_low == decided.null_low  # NaN: nothing was drawn at random
    tell(f"for and against it [nats of log-odds{f', 95 % interval; {null}' if known else ''}]:")
    for feature in top(decided):
        tell(f"  {_feature(feature.name, feature.value, feature.low, feature.high)}")
    for found in (local.sufficient, local.necessary):
        tell(_set_in_words(found))


def _set_in_words(found: MinimalSet) -> str:
    if not found.found:
        return f"{found.kind}: none found ({found.reason}; {found.forwards} forwards)"
    checked = "verified, no single one can be left out" if found.verified and found.minimal else "NOT VERIFIED"
    names = "; ".join(found.features) or found.reason
    after = f", then {found.decision_after}" if found.kind == "necessary" else ""
    size = f"{len(found.features)} of {found.of} features"
    others = "others" if found.kind == "sufficient" else "they"
    return f"{found.kind} ({others} at {found.baseline}): {size}{after}: {names} ({checked}; {found.forwards} forwards)"


def _show_nodes(found: CausalMap) -> None:
    tell(f"causal nodes by ACE, {found.scope} (n = {found.inputs}, {found.interventions} interventions):")
    rows = [
        (
            str(node.index + 1),
            _sites(node.sites),
            f"{node.ace:.3g}",
            f"{node.low:.3g} to {node.high:.3g}" if node.low == node.low else "-",
            f"{node.null:.1g}",
        )
        for node in sorted(found.nodes, key=lambda node: -node.ace)[:10]
    ]
    show_table(("node", "sites", "ACE [nats]", "95 % interval", "null"), rows)
    if found.skipped:
        names = ", ".join(skip.what for skip in found.skipped[:_TOP])
        more = f" and {len(found.skipped) - _TOP} more" if len(found.skipped) > _TOP else ""
        tell(f"not taken apart: {names}{more}: {found.skipped[0].reason}")


def _sites(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
