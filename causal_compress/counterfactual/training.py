"""Training of the counterfactual GAN: losses, the loop, and a watch for mode collapse and divergence."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from causal_compress.counterfactual.constraints import (
    Domain,
    as_copies,
    closeness,
    domain_of,
    project,
    straight_through,
)
from causal_compress.counterfactual.generator import Critic, ImageGenerator, TableGenerator, build_generator
from causal_compress.counterfactual.metrics import diversity_ratio
from causal_compress.errors import NumericalError, UsageError
from causal_compress.inputs.data import Data, Split
from causal_compress.progress import progress
from causal_compress.recipe import CounterfactualSection
from causal_compress.results import CounterfactualTraining, TrainingCheck
from causal_compress.understand.teacher import weights_sha256
from causal_compress.understand.trace import Network

log = logging.getLogger(__name__)

_WATCHED = 512
_COLLAPSED = 0.3
_SATURATED_PCT = 99.5
_LEAST_VALIDITY_PCT = 80.0
_GUMBEL_TEMPERATURE = 0.5
_BETAS = (0.0, 0.99)
_SMOOTHNESS = 1.0
_EXPLODED = 1e4


@dataclass(frozen=True, eq=False)
class Judge:
    """The network explained, frozen, cut at the perceptual site."""

    before: Sequence[nn.Module]
    after: Sequence[nn.Module]
    site: str

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs to the activation at the site and the logits."""
        for module in self.before:
            x = module(x)
        activation = x
        for module in self.after:
            x = module(x)
        return activation, x


@dataclass(eq=False)
class _Players:
    """What changes while training."""

    generator: ImageGenerator | TableGenerator
    averaged: ImageGenerator | TableGenerator
    critic: Critic
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    losses: dict[str, float] = field(default_factory=dict)


def judge_of(network: Network, site: str | None, device: torch.device) -> Judge:
    """A frozen copy of the network explained.

    Args:
        network: Left unchanged.
        site: A region's name, not the last; None: the region a third down the chain.
        device: Where the copy goes.

    Raises:
        UsageError: no region of that name.
    """
    names = [region.info.name for region in network.regions]
    if site is not None and site not in names[:-1]:
        raise UsageError(
            f"counterfactual.perceptual_site: the network has no site '{site}' before its output",
            wanted=f"one of {', '.join(names[:-1][:30])}",
            remedy="correct the name, or set null",
        )
    regions = copy.deepcopy(network).regions
    modules = [region.module.to(device).eval().requires_grad_(False) for region in regions]
    at = names.index(site) + 1 if site is not None else min(max(1, round(len(names) / 3)), max(len(names) - 1, 1))
    return Judge(modules[:at], modules[at:], names[at - 1])


def other_classes(labels: Int[Tensor, " samples"], classes: int, generator: torch.Generator) -> Int[Tensor, " samples"]:
    """For each label one of the other classes, all equally likely."""
    step = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
    return (labels + step) % classes


def train_gan(
    network: Network, data: Data, section: CounterfactualSection, *, seed: int, device: str = "cpu"
) -> tuple[ImageGenerator | TableGenerator, Domain, CounterfactualTraining]:
    """Train generator and critic against each other, on the training split; validation inputs are only watched.

    Args:
        network: The network explained; left unchanged.
        data: Its data.
        section: Weights, sizes, constraints.
        seed: Of initial weights, order and targets.
        device: Where to train.

    Returns:
        The generator with averaged weights on the CPU in evaluation mode, what it may produce, and how training went.

    Raises:
        NumericalError: losses that are not finite, or explode.
        UsageError: a constraint or perceptual site that doesn't fit.

    Limits: the same seed gives the same weights on the same machine, number of threads and library versions only.
    """
    place = torch.device(device)
    started = time.perf_counter()
    domain, judge = domain_of(data, section), judge_of(network, section.perceptual_site, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        players = _players(data, domain.to(place), section, place)
        checks = _play(players, judge, data, domain.to(place), (section, seed))
    generator = players.averaged.cpu().eval().requires_grad_(False)
    trained = CounterfactualTraining(
        steps=section.steps,
        seconds=round(time.perf_counter() - started, 1),
        seed=seed,
        generator_params=_params(players.generator),
        critic_params=_params(players.critic),
        perceptual_site=judge.site,
        network_sha256=weights_sha256(network.graph.cpu()),
        data_sha256=data.fingerprint,
        checks=tuple(checks),
        warnings=tuple(suspicions(checks)),
    )
    for warning in trained.warnings:
        log.warning("counterfactual: %s", warning)
    return generator, domain, trained


def suspicions(checks: Sequence[TrainingCheck]) -> list[str]:
    """What the checks say against the trained GAN, in sentences for the user."""
    last = checks[-1]
    found = []
    if last.diversity < _COLLAPSED:
        found.append(
            f"mode collapse: counterfactuals of one class differ {last.diversity:.2f} times as much as real inputs do; "
            "lower counterfactual.adversarial_weight or raise cycle_weight"
        )
    if len(checks) > 1 and all(check.critic_accuracy_pct > _SATURATED_PCT for check in checks[-2:]):
        found.append(
            f"the critic tells real from made in {last.critic_accuracy_pct:.1f} % of cases, so it teaches little; "
            "lower counterfactual.learning_rate or raise width"
        )
    best = max(check.validity_pct for check in checks)
    if last.validity_pct < min(best - 10, 99):
        found.append(f"divergence: validity fell from {best:.1f} % to {last.validity_pct:.1f} % while training")
    if last.validity_pct < _LEAST_VALIDITY_PCT:
        found.append(
            f"only {last.validity_pct:.1f} % of the generator's own counterfactuals reach their class; "
            "train longer (counterfactual.steps) or raise target_weight"
        )
    return found


def _players(data: Data, domain: Domain, section: CounterfactualSection, device: torch.device) -> _Players:
    classes = len(data.classes)
    generator = build_generator(domain, data.input_shape, classes, section.width).to(device)
    critic = Critic(data.input_shape, classes, section.width).to(device)
    rate = section.learning_rate
    return _Players(
        generator,
        copy.deepcopy(generator),
        critic,
        torch.optim.Adam(generator.parameters(), rate, _BETAS),
        torch.optim.Adam(critic.parameters(), rate, _BETAS),
    )


def _play(
    players: _Players, judge: Judge, data: Data, domain: Domain, how: tuple[CounterfactualSection, int]
) -> list[TrainingCheck]:
    section, seed = how
    draws = torch.Generator().manual_seed(seed)
    every = max(1, section.steps // section.checks)
    checks: list[TrainingCheck] = []
    batches = _endless(data.train, section.batch_size, seed)
    for step in progress(range(1, section.steps + 1), label="training counterfactuals", unit="step"):
        x, label = (value.to(domain.low.device) for value in next(batches))
        _anneal(players, section.learning_rate, step / section.steps)
        with torch.no_grad():
            seen, logits = judge(x)
        first = logits.argmax(1)
        target = other_classes(first, logits.shape[1], draws)
        made = _make(players.generator, domain, x, target, draws)
        _critic_step(players, (x, label), (made.detach(), target), domain.reach())
        _generator_step(players, judge, domain, section, (x, first, target, made, seen), draws)
        _average(players, section.ema, step)
        _refuse_divergence(players.losses, step)
        if step % every == 0 or step == section.steps:
            checks.append(_check(players, judge, domain, data.validation, step))
            log.info("counterfactual: %s", checks[-1])
    return checks


def _endless(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        for x, label in split.batches(batch_size, shuffle_seed=1_000_003 * seed + epoch):
            if len(x) > 1:
                yield x, label
        epoch += 1


def _anneal(players: _Players, rate: float, share: float) -> None:
    """Constant for the first half, then linearly to a tenth."""
    now = rate * min(1.0, max(0.1, 1.9 - 1.8 * share))
    for optimizer in (players.generator_optimizer, players.critic_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = now


def _make(
    generator: nn.Module, domain: Domain, x: Tensor, target: Tensor, draws: torch.Generator
) -> Float[Tensor, "samples ..."]:
    """Counterfactuals that gradients flow through: images without their grid, tables projected straight through.

    One-hot groups are drawn by their probabilities (Gumbel), so that rare categories are tried too.
    """
    proposed: Tensor = generator(x, target)
    if proposed.ndim == 4:
        return as_copies(domain, proposed)
    for group in domain.groups:
        positions = list(group)
        uniform = torch.rand(len(x), len(positions), generator=draws).clamp(1e-6, 1 - 1e-6).to(x.device)
        noisy = proposed[:, positions].clamp_min(1e-6).log() - torch.log(-torch.log(uniform))
        at = torch.tensor(positions, device=x.device)
        proposed = proposed.index_copy(1, at, (noisy / _GUMBEL_TEMPERATURE).softmax(1))
    return straight_through(domain, x, proposed)


def _critic_step(players: _Players, real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor], reach: Tensor) -> None:
    """Real from made by the logistic loss; the slope at real inputs is penalised, or the game runs away.

    Source: R1 penalty, Mescheder et al. 2018, arXiv:1801.04406, eq. 9.
    """
    players.critic.requires_grad_(True)
    seen = real[0].clone().requires_grad_()
    score, names = players.critic(seen, real[1])
    made_score, _ = players.critic(*made)
    (slope,) = torch.autograd.grad(score.sum(), seen, create_graph=True)
    steep = (slope * reach).square().flatten(1).sum(1).mean()
    adversarial = F.softplus(-score).mean() + F.softplus(made_score).mean()
    loss = adversarial + _SMOOTHNESS / 2 * steep + F.cross_entropy(names, real[1])
    players.critic_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    players.critic_optimizer.step()
    right = torch.cat([score > 0, made_score < 0]).float().mean()
    players.losses |= {"critic": float(adversarial.detach()), "critic_accuracy": float(right)}


def _generator_step(
    players: _Players,
    judge: Judge,
    domain: Domain,
    section: CounterfactualSection,
    batch: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    draws: torch.Generator,
) -> None:
    x, first, target, made, seen = batch
    players.critic.requires_grad_(False)
    score, names = players.critic(made, target)
    activation, logits = judge(made)
    proximity = closeness(domain, x, made).mean()
    back = _make(players.generator, domain, made, first, draws)
    loss = (
        section.adversarial_weight * F.softplus(-score).mean()
        + section.class_weight * F.cross_entropy(names, target)
        + section.target_weight * target_loss(logits, target, section.confidence)
        + section.proximity_weight * proximity
        + section.perceptual_weight * (activation - seen).abs().mean() / seen.abs().mean().clamp_min(1e-6)
        + section.cycle_weight * closeness(domain, x, back).mean()
    )
    players.generator_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(players.generator.parameters(), 10.0)
    players.generator_optimizer.step()
    players.losses |= {"generator": float(loss.detach()), "proximity": float(proximity.detach())}


def target_loss(
    logits: Float[Tensor, "samples classes"], target: Int[Tensor, " samples"], confidence: float
) -> Float[Tensor, ""]:
    """How far log P(target) is below log(confidence), in nats; beyond it the network is not pushed any further."""
    surprise = F.cross_entropy(logits, target, reduction="none")
    return F.relu(surprise + math.log(confidence)).mean()


@torch.no_grad()
def _average(players: _Players, decay: float, step: int) -> None:
    decay = min(decay, step / (step + 10))
    for kept, new in zip(players.averaged.parameters(), players.generator.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _refuse_divergence(losses: dict[str, float], step: int) -> None:
    bad = {name: value for name, value in losses.items() if not math.isfinite(value) or abs(value) > _EXPLODED}
    if bad:
        raise NumericalError(
            f"counterfactual: training diverged at step {step}",
            found=", ".join(f"{name} {value:g}" for name, value in bad.items()),
            wanted="finite losses",
            remedy="lower counterfactual.learning_rate or adversarial_weight, or use another seed",
        )


@torch.no_grad()
def _check(players: _Players, judge: Judge, domain: Domain, split: Split, step: int) -> TrainingCheck:
    rows = np.random.default_rng(0).permutation(len(split))[:_WATCHED]  # the same at every check
    x, label = (value.to(domain.low.device) for value in split.take(rows))
    logits = judge(x)[1]
    draws = torch.Generator().manual_seed(step)
    target = other_classes(logits.argmax(1), logits.shape[1], draws)
    made = project(domain, x, players.averaged(x, target))
    right = torch.cat([players.critic(x, label)[0] > 0, players.critic(made, target)[0] < 0])
    return TrainingCheck(
        step=step,
        validity_pct=100 * float((judge(made)[1].argmax(1) == target).float().mean()),
        diversity=diversity_ratio(made, target, x, label),
        critic_accuracy_pct=100 * float(right.float().mean()),
        critic_loss=players.losses["critic"],
        generator_loss=players.losses["generator"],
        proximity=float(closeness(domain, x, made).mean()),
        n=len(x),
    )


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
