"""Where surgery has got to on the chain: student's and teacher's activations at the current cut point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from causal_compress.shrink.probe import Probe
from causal_compress.shrink.targets import before_and_after
from causal_compress.understand.trace import Network


@dataclass
class Front:
    """Chunks of activations at the cut point that the surgery has reached.

    Attributes:
        network: The teacher.
        teacher, student: Chunks of the fitting inputs' activations, each network's own.
        heldout: The student's activations on held-out inputs.
        reference: The teacher's log-probabilities on them, at `temperature`.
        at: Next region of the teacher.
        harm_kl: Output KL on the held-out inputs if the teacher went on from the student's activations.
    """

    network: Network
    teacher: list[Tensor]
    student: list[Tensor]
    heldout: list[Tensor]
    reference: list[Tensor]
    temperature: float
    at: int = 0
    harm_kl: float = 0.0
    targets: list[Tensor] | None = None

    def look_ahead(self, last: int) -> list[Tensor]:
        """Run the teacher to the end of region `last`; returns its values before that region's final activation."""
        for index in range(self.at, last + 1):
            self.targets, self.teacher = before_and_after(self.network, index, self.teacher)
        self.at = last + 1
        return self.targets or []

    def advance(self, part: fx.GraphModule) -> float:
        """Run the student's finished part; returns the rise of the output KL that it caused."""
        with torch.no_grad():
            self.student = [part(x) for x in self.student]
            self.heldout = [part(x) for x in self.heldout]
        return self._measure()

    def keep_channels(self, kept: Tensor, axis: int) -> None:
        """Narrow the student's side to some channels, which lie along `axis`."""
        self.student = [x.index_select(axis, kept) for x in self.student]
        self.heldout = [x.index_select(axis, kept) for x in self.heldout]

    def _measure(self) -> float:
        before = self.harm_kl
        logits = self.heldout
        with torch.no_grad():
            for region in self.network.regions[self.at :]:
                logits = [region.module(x) for x in logits]
        self.harm_kl = output_kl(logits, self.reference, self.temperature)
        return self.harm_kl - before


def open_front(network: Network, fit: Sequence[Tensor], heldout: Sequence[Tensor], temperature: float) -> Front:
    """A front at the input.

    Args:
        network: The teacher.
        fit: Chunks of inputs for refits.
        heldout: Chunks of other inputs, on which harm is read.
        temperature: Of the softmax.
    """
    with torch.no_grad():
        reference = [F.log_softmax(network.graph(x) / temperature, 1) for x in heldout]
    return Front(network, list(fit), list(fit), list(heldout), reference, temperature)


def fresh_front(network: Network, probe: Probe, inputs: int, temperature: float) -> Front:
    """A front at the input, on so many of the probe's surgery inputs (whole chunks of them)."""
    return open_front(network, probe.surgery[: -(-inputs // len(probe.surgery[0]))], probe.heldout, temperature)


def kl_rows(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each input [nats]; `reference` holds the teacher's log-probabilities."""
    student = F.log_softmax(logits / temperature, 1)
    return F.kl_div(student, reference, log_target=True, reduction="none").sum(1)


def output_kl(logits: Sequence[Tensor], reference: Sequence[Tensor], temperature: float) -> float:
    """Mean KL(teacher || student) of softmax outputs [nats].

    Args:
        logits: The student's, chunk by chunk.
        reference: The teacher's log-probabilities at `temperature`.
        temperature: Of the softmax.
    """
    rows = [kl_rows(y, wanted, temperature) for y, wanted in zip(logits, reference, strict=True)]
    return float(torch.cat(rows).double().mean())
