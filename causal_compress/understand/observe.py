"""Watch every site of a network while a batch runs through, and keep Gram matrices and units instead of activations."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from causal_compress.inputs.data import Split
from causal_compress.recipe import InterveneSection
from causal_compress.understand.effect import units
from causal_compress.understand.similarity import HsicSums, gram_matrix
from causal_compress.understand.trace import Network

LEAST_ROWS = 8  # a batch smaller than this says nothing about similarity


def network_device(network: Network) -> torch.device:
    """Where the network's parameters are."""
    return next((parameter.device for parameter in network.graph.parameters()), torch.device("cpu"))


@dataclass
class Clock:
    """Seconds spent in forward passes and in what is made of them."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "analysis": 0.0})

    @contextmanager
    def measure(self, what: Literal["forward", "analysis"]) -> Iterator[None]:
        """Add the wall time of the block."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[what] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def observe_sites(
    network: Network, x: Float[Tensor, "samples ..."], clock: Clock
) -> tuple[Float[Tensor, "sites samples samples"], list[Float[Tensor, "samples units"]]]:
    """Gram matrices and units of all sites; each is taken as soon as its region has run, and no activation is kept.

    Args:
        network: Traced network.
        x: Inputs; at least 4.
        clock: Seconds are added to it.

    Raises:
        NumericalError: NaN or infinity at a site, which is named.
    """
    grams, site_units = [], []
    for region in network.regions:
        with clock.measure("forward"):
            x = region.module(x)
        with clock.measure("analysis"):
            grams.append(gram_matrix(x, region.info.name))
            site_units.append(units(x))
    return torch.stack(grams), site_units


def random_init_control(network: Network, split: Split, section: InterveneSection, *, seed: int = 0) -> float:
    """Mean CKA of neighbouring sites when the weights are drawn at random: what the architecture alone gives.

    Args:
        network: At least two sites; left unchanged, a copy is initialised anew.
        split: Calibration inputs, plain only.
        section: Inputs and batch size.
        seed: Of the weights.

    Limits: parameters that belong to no module with `reset_parameters` (class tokens, position embeddings) stay.
    """
    random_network = _reinitialised(network, seed)
    device = network_device(random_network)
    hsic, clock = HsicSums.zeros(len(network.regions), device), Clock(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for x, _ in split.batches(section.batch_size, limit=section.inputs):
            if len(x) >= LEAST_ROWS:
                hsic.add([observe_sites(random_network, x.to(device), clock)[0]], generator)
    return float(hsic.cka().diagonal(1).mean())


def _reinitialised(network: Network, seed: int) -> Network:
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for region in fresh.regions:
            for module in region.module.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
    return fresh
