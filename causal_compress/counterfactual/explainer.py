"""Counterfactuals: train the GAN that makes them, and find and describe the counterfactual of an input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from causal_compress.counterfactual.constraints import Domain, closeness, project, straight_through, violations
from causal_compress.counterfactual.generator import ImageGenerator, TableGenerator
from causal_compress.counterfactual.metrics import distances
from causal_compress.counterfactual.readable import largest_changes
from causal_compress.counterfactual.training import Judge, judge_of, train_gan
from causal_compress.errors import UsageError
from causal_compress.inputs.data import Data, Features, Split
from causal_compress.recipe import CounterfactualSection
from causal_compress.results import Counterfactual, CounterfactualStatus, CounterfactualTraining
from causal_compress.understand.trace import Network

SEARCHED = ("refine_steps", "proximity_weight", "grid")
"""What the search for a counterfactual reads; all other keys count while the generator is trained."""
_RATE = 0.1
_BATCH = 256
_RISING = 1e-3
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Explainer:
    """A trained generator beside the network that it explains."""

    judge: Judge
    generator: ImageGenerator | TableGenerator
    domain: Domain
    features: Features
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    section: CounterfactualSection
    trained: CounterfactualTraining


@dataclass(frozen=True, eq=False)
class Found:
    """Counterfactuals of some inputs; `status` was recomputed on them as they are here."""

    x: Float[Tensor, "samples ..."]
    counterfactual: Float[Tensor, "samples ..."]
    predicted: Int[Tensor, " samples"]
    target: Int[Tensor, " samples"]
    answered: Int[Tensor, " samples"]
    probability: Float[Tensor, " samples"]
    status: tuple[CounterfactualStatus, ...]

    @property
    def valid(self) -> Tensor:
        """Which of them the network gives the target class."""
        return torch.tensor([status == "valid" for status in self.status], dtype=torch.bool)


def train_counterfactuals(
    network: Network, data: Data, section: CounterfactualSection, *, seed: int, device: str = "cpu"
) -> Explainer:
    """Train a counterfactual GAN for a network.

    Args:
        network: The network to be explained; left unchanged.
        data: Its data; the test split is not read.
        section: Losses, sizes, constraints.
        seed: Of initial weights, order and targets.
        device: Where to train; the result is on the CPU.

    Raises:
        NumericalError: training diverged.
        UsageError: a constraint or a perceptual site that doesn't fit.
    """
    generator, domain, trained = train_gan(network, data, section, seed=seed, device=device)
    judge = judge_of(network, section.perceptual_site, torch.device("cpu"))
    return Explainer(judge, generator, domain, data.features, data.classes, data.input_shape, section, trained)


def search_section(trained: CounterfactualSection, asked: CounterfactualSection) -> CounterfactualSection:
    """The section of a search with a trained generator: as it was trained, and searched as it is asked.

    Args:
        trained: Of the training.
        asked: The same, with overrides.

    Raises:
        UsageError: another value of a key that no longer counts once the generator is trained.
    """
    changed = [key for key in CounterfactualSection.model_fields if getattr(trained, key) != getattr(asked, key)]
    fixed = [key for key in changed if key not in SEARCHED]
    if fixed:
        raise UsageError(
            f"counterfactual.{fixed[0]} can't be changed once the generator is trained",
            found=f"{getattr(asked, fixed[0])!r}, trained with {getattr(trained, fixed[0])!r}",
            wanted=f"one of {', '.join(SEARCHED)}",
            remedy=f"leave counterfactual.{fixed[0]} out, or run `causal-compress counterfactual train` with it",
        )
    return trained.model_copy(update={key: getattr(asked, key) for key in changed})


def find(explainer: Explainer, x: Float[Tensor, "samples ..."], target: Int[Tensor, " samples"]) -> Found:
    """The counterfactuals of some inputs: one pass of the generator, and a few gradient steps where that fails.

    Args:
        explainer: Trained generator and network, on the CPU.
        x: Inputs, normalised.
        target: The class that each should be given.

    Returns:
        Valid inputs without constraint violations, with their status: "invalid" where the search came to rest at
        another class, "not converged" where it was still gaining when its steps ran out.

    Raises:
        UsageError: a target that the network gives the input already, or that is no class.

    Limits: near by training, not provably nearest.
    """
    pieces = [_find_batch(explainer, *batch) for batch in zip(x.split(_BATCH), target.split(_BATCH), strict=True)]
    if len(pieces) == 1:
        return pieces[0]
    tensors = ("x", "counterfactual", "predicted", "target", "answered", "probability")
    joined = {name: torch.cat([getattr(piece, name) for piece in pieces]) for name in tensors}
    return Found(**joined, status=tuple(status for piece in pieces for status in piece.status))


def describe(explainer: Explainer, found: Found, split: Split, indices: Sequence[int]) -> list[Counterfactual]:
    """Counterfactuals as plain results for people and files.

    Args:
        explainer: It made them.
        found: Of the inputs at `indices`, in this order.
        split: Where the inputs come from.
        indices: Positions in the split.
    """
    names = explainer.classes
    near = distances(found.x, found.counterfactual, 0.0)
    columns = _changed_columns(explainer.domain, found)
    broken = violations(explainer.domain, found.x, found.counterfactual).flatten(1).sum(1)
    return [
        Counterfactual(
            index=int(index),
            true_class=names[int(split.labels[index])],
            predicted_class=names[int(found.predicted[row])],
            target_class=names[int(found.target[row])],
            answered_class=names[int(found.answered[row])],
            status=found.status[row],
            probability=float(found.probability[row]),
            l1=float(near["l1"][row]),
            l2=float(near["l2"][row]),
            l0=int(columns[row]),
            positions=len(explainer.domain.columns) or math.prod(explainer.input_shape),
            violations=int(broken[row]),
            changes=largest_changes(
                explainer.domain, explainer.features, found.x[row], found.counterfactual[row], explainer.section.grid
            )[:_SHOWN],
        )
        for row, index in enumerate(indices)
    ]


def target_of(explainer: Explainer, name: str) -> int:
    """The label of a class, given its name.

    Raises:
        UsageError: no such class.
    """
    if name not in explainer.classes:
        raise UsageError(
            f"there is no class '{name}'",
            wanted=f"one of {', '.join(explainer.classes[:30])}",
            remedy="correct --target",
        )
    return explainer.classes.index(name)


def _find_batch(explainer: Explainer, x: Tensor, target: Tensor) -> Found:
    with torch.no_grad():
        predicted = explainer.judge(x)[1].argmax(1)
        _check_targets(explainer, predicted, target)
        made = project(explainer.domain, x, explainer.generator(x, target))
        logits = explainer.judge(made)[1]
    failed = torch.nonzero(logits.argmax(1) != target)[:, 0]
    rising = torch.zeros(len(x), dtype=torch.bool)
    if len(failed) and explainer.section.refine_steps:
        made[failed], rising[failed] = _refine(explainer, x[failed], target[failed], made[failed])
        with torch.no_grad():
            logits[failed] = explainer.judge(made[failed])[1]
    answered = logits.argmax(1)
    status: list[CounterfactualStatus] = [
        "valid" if right else "not converged" if unfinished else "invalid"
        for right, unfinished in zip((answered == target).tolist(), rising.tolist(), strict=True)
    ]
    probability = logits.softmax(1).gather(1, target[:, None])[:, 0]
    return Found(x, made, predicted, target, answered, probability, tuple(status))


def _check_targets(explainer: Explainer, predicted: Tensor, target: Tensor) -> None:
    if int(target.min()) < 0 or int(target.max()) >= len(explainer.classes):
        raise UsageError(
            "a target is no class", found=f"{target.tolist()[:8]}", remedy=f"0 to {len(explainer.classes) - 1}"
        )
    if bool((predicted == target).any()):
        already = explainer.classes[int(target[predicted == target][0])]
        raise UsageError(
            f"the network gives the input the class '{already}' already",
            wanted="another class as target",
            remedy="choose another --target",
        )


def _refine(explainer: Explainer, x: Tensor, target: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Walk in the generator's latent space until the class turns; the first hit of each input is kept.

    Returns:
        The inputs found, the most probable where none was; and whether the probability still rose at the end.
    """
    domain, section = explainer.domain, explainer.section
    with torch.no_grad():
        start = explainer.generator.encode(x, target)
    spread = start.flatten(1).std(1).view(-1, *[1] * (start.ndim - 1))
    walk = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([walk], _RATE)
    best, best_surprise = made.clone(), torch.full((len(x),), math.inf)
    done = torch.zeros(len(x), dtype=torch.bool)
    last = before = best_surprise
    with torch.enable_grad():
        for _ in range(section.refine_steps + 1):  # the first look is at where the walk begins
            candidate = straight_through(domain, x, explainer.generator.decode(start + spread * walk, x))
            logits = explainer.judge(candidate)[1]
            surprise = F.cross_entropy(logits, target, reduction="none")
            hit = logits.detach().argmax(1) == target  # may come with a larger loss than a miss among three classes
            better = ~done & (hit | (surprise.detach() < best_surprise))
            best = torch.where(_rows(better, x), candidate.detach(), best)
            best_surprise = torch.where(better, surprise.detach(), best_surprise)
            done |= hit
            before, last = last, surprise.detach()
            if bool(done.all()):
                break
            optimizer.zero_grad()
            (surprise + section.proximity_weight * closeness(domain, x, candidate)).sum().backward()
            optimizer.step()
    return best, ~done & (last < before - _RISING)


def _rows(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.view(-1, *[1] * (like.ndim - 1))


def _changed_columns(domain: Domain, found: Found) -> Tensor:
    """Changed columns (tables) or positions (images) of each counterfactual."""
    moved = found.counterfactual != found.x
    if not domain.columns:
        return moved.flatten(1).sum(1)
    return torch.stack([moved[:, list(positions)].any(1) for positions in domain.columns], 1).sum(1)
