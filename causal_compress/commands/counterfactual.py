"""counterfactual train and show: what would the input have to be for another answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causal_compress.commands.shared import FOLDER, as_json_text, chosen_recipe, talks
from causal_compress.console import show_table, tell, tell_lines
from causal_compress.errors import UsageError

if TYPE_CHECKING:
    from causal_compress.inputs.data import Data
    from causal_compress.recipe import Recipe
    from causal_compress.results import BiasProbe, Contrast, CounterfactualTraining
    from causal_compress.understand.trace import Network

RECIPE, BIAS = "recipe.resolved.yaml", "bias.json"
_FORMATS = (".html", ".json", ".png")


@click.group()
def counterfactual() -> None:
    """Finds near inputs that the network gives another class."""


@counterfactual.command()
@click.option("--recipe", metavar="FILE|NAME", help="Recipe file, or the name of a shipped recipe.")
@click.option("--arch", help="torchvision:NAME, timm:NAME, FILE.py:CALLABLE or PACKAGE.MODULE:CALLABLE.")
@click.option("--weights", metavar="FILE", help="Checkpoint: .pt, .pth, .th or .safetensors.")
@click.option("--data", metavar="SOURCE", help="npz:FILE, imagefolder:DIR, csv:FILE, sklearn:NAME and others.")
@click.option("--out", required=True, type=FOLDER, metavar="DIR", help="Where the trained generator is written.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Overrides a recipe key.")
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option("--force", is_flag=True, help="Go on although the network is hardly better than chance.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@talks
def train(*, out: Path, force: bool, as_json: bool, **inputs: Any) -> None:
    """Trains the generator of counterfactuals for a checkpoint."""
    recipe = chosen_recipe(**inputs)

    from causal_compress.counterfactual.bias import probe_bias
    from causal_compress.counterfactual.explainer import train_counterfactuals
    from causal_compress.counterfactual.folder import save_explainer
    from causal_compress.files import atomic_write_text, make_folder
    from causal_compress.recipe import CounterfactualSection
    from causal_compress.recipe_file import recipe_yaml
    from causal_compress.recover.distill import resolve_device
    from causal_compress.runfolder import refuse_run
    from causal_compress.stages import numerics
    from causal_compress.understand.teacher import refuse_near_chance, score_teacher

    refuse_run(out)
    make_folder(out)
    section = recipe.counterfactual or CounterfactualSection()
    with numerics(recipe):
        network, data = _network_and_data(recipe)
        refuse_near_chance(score_teacher(network, data), recipe.data, force=force)
        explainer = train_counterfactuals(
            network, data, section, seed=recipe.seed, device=resolve_device(recipe.device)
        )
        atomic_write_text(out / RECIPE, recipe_yaml(recipe))
        save_explainer(explainer, out)
        probe = probe_bias(explainer, data.validation, inputs=section.probe, seed=recipe.seed)
        atomic_write_text(out / BIAS, as_json_text(probe) + "\n")
    if as_json:
        tell_lines(as_json_text({"training": explainer.trained, "bias": probe}))
    else:
        _show_training(explainer.trained, probe, out)


@counterfactual.command()
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--index", type=click.IntRange(min=0), required=True, metavar="N", help="Which input of the split.")
@click.option("--target", required=True, metavar="CLASS", help="The class that the network should give.")
@click.option(
    "--split", type=click.Choice(["train", "calibration", "validation", "test"]), default="test", show_default=True
)
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Overrides a key of DIR's recipe.")
@click.option("--out", type=FOLDER, metavar="FILE", help="FILE.html, FILE.png or FILE.json; default: a table.")
@talks
def show(*, folder: Path, index: int, target: str, split: str, settings: tuple[str, ...], out: Path | None) -> None:
    """Shows the counterfactual of one input, and where the two part in the network."""
    if out is not None and out.suffix not in _FORMATS:
        raise UsageError(
            "--out has an unknown ending", found=str(out), wanted=", ".join(_FORMATS), remedy="name FILE.html"
        )

    from causal_compress.counterfactual.contrast import contrast
    from causal_compress.counterfactual.explainer import find, search_section, target_of
    from causal_compress.counterfactual.folder import load_explainer, read_description, refuse_other_data
    from causal_compress.files import make_room
    from causal_compress.recipe import CounterfactualSection
    from causal_compress.recipe_file import load_recipe
    from causal_compress.stages import numerics

    trained = read_description(folder).section  # a folder of another kind is refused before any work
    recipe = load_recipe(folder / RECIPE, list(settings))
    section = search_section(trained, recipe.counterfactual or CounterfactualSection())
    if out is not None:
        make_room(out)
    with numerics(recipe):
        network, data = _network_and_data(recipe)
        explainer = replace(load_explainer(folder, network), section=section)
        refuse_other_data(folder, explainer.trained, data)
        rows = getattr(data, split)
        if index >= len(rows):
            raise UsageError(
                f"the {split} split has no input {index}", wanted=f"0 to {len(rows) - 1}", remedy="correct --index"
            )
        x, _ = rows.take([index])
        found = find(explainer, x, _one_label(target_of(explainer, target)))
        told = contrast(explainer, network, found, rows, index, seed=recipe.seed)
        if out is None:
            _show_contrast(told)
        else:
            _write(out, explainer, found, told)
            tell(str(out))


def _network_and_data(recipe: Recipe) -> tuple[Network, Data]:
    from causal_compress.inputs.data import load_data
    from causal_compress.inputs.models import build_model
    from causal_compress.understand.trace import trace

    data = load_data(recipe.data, seed=recipe.seed)
    return trace(build_model(recipe.model, classes=len(data.classes)), data.example_input), data


def _one_label(label: int) -> Any:
    import torch

    return torch.tensor([label])


def _write(out: Path, explainer: Any, found: Any, told: Contrast) -> None:
    from causal_compress.counterfactual.page import counterfactual_page, picture_png
    from causal_compress.files import atomic_write_bytes, atomic_write_text

    match out.suffix:
        case ".html":
            atomic_write_text(out, counterfactual_page(explainer, found, told))
        case ".png":
            atomic_write_bytes(out, picture_png(explainer, found))
        case _:
            atomic_write_text(out, as_json_text(told) + "\n")


def _show_training(trained: CounterfactualTraining, probe: BiasProbe, out: Path) -> None:
    header = ("step", "validity", "diversity", "critic right", "mean change")
    rows = [
        (
            str(check.step),
            f"{check.validity_pct:.1f} % of {check.n}",
            f"{check.diversity:.2f}",
            f"{check.critic_accuracy_pct:.0f} %",
            f"{check.proximity:.3f}",
        )
        for check in trained.checks
    ]
    show_table(header, rows)
    tell(f"with refinement: {probe.n} of {probe.n + probe.invalid} validation inputs turned")
    for warning in (*trained.warnings, *probe.warnings):
        tell(f"warning: {warning}")
    tell(f"trained in {trained.seconds:.0f} s: {out}")


def _show_contrast(told: Contrast) -> None:
    one = told.counterfactual
    tell(
        f"input {one.index} (true class {one.true_class}): {one.predicted_class} -> {one.target_class}: {one.status}, "
        f"the network says {one.answered_class}, P({one.target_class}) {one.probability:.3f}"
    )
    tell(f"L1 {one.l1:.3g}, L2 {one.l2:.3g}, {one.l0} of {one.positions} changed, {one.violations} violations")
    show_table(
        ("feature", "before", "after"), [(change.feature, change.before, change.after) for change in one.changes]
    )
    if not told.sites:
        from causal_compress.counterfactual.contrast import TOO_FEW

        tell(f"note: where the two part in the network is {TOO_FEW}")
        return
    header = ("site", "share of the way", "usual within a class", "ACE original", "ACE counterfactual")
    rows = [
        (
            site.site + (" <- they part" if site.site == told.parts_at else ""),
            f"{site.distance:.3g}",
            f"{site.floor:.3g}",
            f"{site.ace_original:.3g}",
            f"{site.ace_counterfactual:.3g}",
        )
        for site in told.sites
    ]
    show_table(header, rows)
