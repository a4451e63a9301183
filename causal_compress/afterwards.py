"""What can be done with a finished run: report it anew, measure its models again, carry out its surgery again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from causal_compress.deploy.benchmark import benchmark, deployed
from causal_compress.deploy.package import load
from causal_compress.errors import RunFolderError
from causal_compress.explain.report import build_report, read_report_json
from causal_compress.files import atomic_write_text
from causal_compress.inputs.data import load_data
from causal_compress.pipeline import SURGERY, WEIGHTS, numerics
from causal_compress.recipe import BenchmarkSection
from causal_compress.recipe_file import load_recipe
from causal_compress.results import Exported, Scorecard, Surgery
from causal_compress.runs import read_result
from causal_compress.shrink.surgery import replay as replay_surgery
from causal_compress.understand.trace import trace


def rebuild_report(run_dir: Path) -> Path:
    """Build report.html anew from report.json of a finished run.

    Raises:
        RunFolderError: the folder holds no finished run.
    """
    read_result(run_dir, "export", Exported)
    if not (run_dir / "report.json").exists():
        raise RunFolderError(
            f"{run_dir} holds no report.json",
            found="a run that ended before its report",
            remedy="run the compress command on this folder again: it computes only what is missing",
        )
    context = read_report_json((run_dir / "report.json").read_text(encoding="utf-8"))
    atomic_write_text(run_dir / "report.html", build_report(context))
    return run_dir / "report.html"


def rebenchmark(run_dir: Path, section: BenchmarkSection) -> Scorecard:
    """Measure a finished run's exported models again, on this machine; nothing in the folder is changed.

    Args:
        run_dir: A finished run.
        section: Only the keys that were set override the run's own.
    """
    exported = read_result(run_dir, "export", Exported)
    recipe = load_recipe(run_dir / "recipe.resolved.yaml")
    base = (recipe.benchmark or BenchmarkSection()).model_dump()
    chosen = BenchmarkSection(**{**base, **section.model_dump(exclude_unset=True)})
    data = load_data(recipe.data, seed=recipe.seed)
    with numerics(recipe):
        models = deployed(exported, run_dir, load(run_dir / exported.teacher_pt2), load(run_dir / exported.pt2))
        return benchmark(*models, data.test, chosen, recipe.budget)


def replay(model: nn.Module, run_dir: Path) -> nn.Module:
    """Carry out a run's surgery on the teacher's own architecture, for further training with live batch norms.

    Args:
        model: The teacher's architecture; its weights do not matter, it is left unchanged.
        run_dir: A finished run.

    Returns:
        The student as a torch.fx.GraphModule in training mode, with the weights of the run.

    Raises:
        TraceError: the architecture is not the one that the run was made with.
    """
    from pydantic import TypeAdapter

    read_result(run_dir, "export", Exported)
    record: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json((run_dir / SURGERY).read_bytes())
    surgery = TypeAdapter(Surgery).validate_python(record["surgery"])
    example: Tensor = torch.zeros(2, *record["input_shape"])
    return replay_surgery(trace(model, example), surgery, load_file(run_dir / WEIGHTS)).graph.train()
