"""What tests of counterfactuals share: short training, checks of it, and explainers that have learnt nothing."""

import torch

from causal_compress.counterfactual.constraints import domain_of
from causal_compress.counterfactual.explainer import Explainer
from causal_compress.counterfactual.generator import build_generator
from causal_compress.counterfactual.training import judge_of
from causal_compress.recipe import CounterfactualSection
from causal_compress.results import CounterfactualTraining, TrainingCheck
from causal_compress.understand.teacher import weights_sha256

SMALL = CounterfactualSection(steps=120, batch_size=32, width=4, checks=2, probe=60, ema=0.9, learning_rate=2e-3)


def turned(explainer, split, count=40):
    x, _ = split.take(range(count))
    return x, 1 - explainer.judge(x)[1].argmax(1)


def check(step=10, **changed):
    values = {"validity_pct": 99.0, "diversity": 0.9, "critic_accuracy_pct": 70.0, "n": 512}
    values |= {"critic_loss": 1.0, "generator_loss": 1.0, "proximity": 0.1}
    return TrainingCheck(step=step, **(values | changed))


def untrained(network, data, section):
    """An explainer whose generator has learnt nothing: it leaves inputs nearly as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        domain = domain_of(data, section)
        generator = build_generator(domain, data.input_shape, len(data.classes), section.width)
    trained = CounterfactualTraining(
        steps=1,
        seconds=0.0,
        seed=0,
        generator_params=1,
        critic_params=1,
        perceptual_site="first",
        network_sha256=weights_sha256(network.graph),
        data_sha256="",
        checks=(check(),),
        warnings=(),
    )
    judge = judge_of(network, None, torch.device("cpu"))
    frozen = generator.eval().requires_grad_(False)
    return Explainer(judge, frozen, domain, data.features, data.classes, data.input_shape, section, trained)
