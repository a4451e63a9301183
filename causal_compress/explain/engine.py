"""The batched intervention engine: many masks on many inputs, every site watched, in one stream of forward passes.

Explaining asks for thousands of forward passes that differ in their input only. So the network is prepared once (batch
norms folded, channels last, bfloat16 where the processor has it), inputs and masks are crossed chunk by chunk, and of
each activation only the units are kept. What decides (minimal sets, ablations) is asked again in float32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causal_compress.errors import NumericalError
from causal_compress.inputs.data import Features
from causal_compress.recover.networks import fold_batch_norms
from causal_compress.understand.intervene import Baseline, apply, baseline_values, feature_layout, feature_names
from causal_compress.understand.observe import network_device
from causal_compress.understand.trace import Network

Precision = Literal["auto", "fp32", "bf16"]
DONORS = 16
DONOR_ROWS = 256
"""Calibration inputs among which donors are drawn."""


@dataclass
class Spent:
    """What explaining has cost so far: inputs run through the network, and the wall time of that."""

    forwards: int = 0
    seconds: float = 0.0

    @contextmanager
    def on(self, inputs: int) -> Iterator[None]:
        """Add the block's wall time and so many forwards."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.forwards += inputs


@dataclass(frozen=True)
class Engine:
    """A network prepared for many forward passes; `spent` counts them.

    Attributes:
        network: As it was given, in float32.
        fast: Its regions, prepared; they compute the same up to rounding.
        bf16: Whether `fast` computes in bfloat16.
        batch_size: Inputs run at a time.
        spent: Counts forwards and seconds of both.
    """

    network: Network
    fast: tuple[nn.Module, ...]
    bf16: bool
    batch_size: int
    spent: Spent = field(default_factory=Spent)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return network_device(self.network)

    def answer(self, x: Float[Tensor, "samples ..."], *, exact: bool = False) -> Float[Tensor, "samples classes"]:
        """Logits in float32.

        Args:
            x: Normalised inputs, any number; run in chunks.
            exact: By the network as it was given; else by its prepared twin.
        """
        regions = [region.module for region in self.network.regions] if exact else self.fast
        return torch.cat([self._through(chunk, regions)[-1] for chunk in x.split(self.batch_size)])

    def watch(self, x: Float[Tensor, "samples ..."]) -> list[Float[Tensor, "samples units"]]:
        """Units of every site in chain order, in float32; the last are the logits."""
        chunks = [self._through(chunk, self.fast) for chunk in x.split(self.batch_size)]
        return [torch.cat(site) for site in zip(*chunks, strict=True)]

    def _through(self, x: Tensor, regions: Sequence[nn.Module]) -> list[Tensor]:
        seen = []
        with torch.inference_mode(), self.spent.on(len(x)):
            x = x.to(self.device)
            if regions is self.fast:
                x = _as_prepared(x, self.bf16)
            for region in regions:
                x = region(x)
                seen.append(_units(x))
        if not bool(torch.isfinite(seen[-1]).all()):
            raise NumericalError(
                "the network's answer to an intervened input is not finite",
                found="NaN or infinity among the logits",
                remedy="check the checkpoint; with explain.precision: fp32, or another baseline, it may stay finite",
            )
        return seen


def open_engine(network: Network, *, precision: Precision = "auto", batch_size: int = 64) -> Engine:
    """Prepare a copy of a network for many forward passes.

    Args:
        network: Traced, in evaluation mode; left unchanged.
        precision: auto: bfloat16 on processors that compute in it natively, else float32.
        batch_size: Inputs run at a time: bounds the memory; on a CPU small ones stay in its cache.

    Limits: in bfloat16 logits are off by about 1 % of their largest; `answer(exact=True)` is not.
    """
    bf16 = precision == "bf16" or (precision == "auto" and native_bf16(network_device(network)))
    twins = tuple(_prepared(region.module, bf16) for region in network.regions)
    return Engine(network, twins, bf16, batch_size)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 at full speed."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def _prepared(module: nn.Module, bf16: bool) -> nn.Module:
    twin = fold_batch_norms(copy.deepcopy(module))
    return twin.to(torch.bfloat16 if bf16 else torch.float32)


def _as_prepared(x: Tensor, bf16: bool) -> Tensor:
    x = x.to(torch.bfloat16) if bf16 else x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _units(activation: Tensor) -> Tensor:
    """As `effect.units`, but in float32: an engine looks at thousands of maps, not at sums of them."""
    if activation.ndim == 3:
        activation = activation.transpose(1, 2)
    if activation.ndim == 4 and activation.dtype == torch.bfloat16:
        # a product with ones: of channels-last maps three times as fast as their mean, which then costs a forward pass
        rows = activation.permute(0, 2, 3, 1).flatten(1, 2)
        ones = rows.new_ones(1, 1, rows.shape[1]).expand(len(rows), -1, -1)
        return (ones @ rows)[:, 0].float() / rows.shape[1]
    dims = tuple(range(2, activation.ndim))
    return activation.mean(dims, dtype=torch.float32) if dims else activation.float()


@dataclass(frozen=True)
class Scene:
    """Inputs, and what each of their features becomes when it is masked.

    Attributes:
        x: Inputs (samples, ...).
        layout: The feature that each position belongs to.
        names: The features.
        baselines: For each baseline what the inputs become where they are masked, in the shape of x.
        scope: What the inputs are, in words.
        turns: Donors of the baseline "marginal", with whom the masks of an input take turns when it is responded to;
            None: each input has one donor for all its masks.
    """

    x: Tensor
    layout: Int[Tensor, "*positions"]
    names: tuple[str, ...]
    baselines: dict[Baseline, Tensor]
    scope: str = "data"
    turns: Float[Tensor, "donors ..."] | None = None

    def masked(
        self,
        rows: Int[Tensor, " cases"],
        masks: Bool[Tensor, "cases features"],
        baseline: Baseline,
        number: Int[Tensor, " cases"] | None = None,
    ) -> Tensor:
        """do(x'): input `rows[i]` with the features of `masks[i]` at the baseline; donors take turns by `number[i]`."""
        positions = masks[:, self.layout]
        positions = positions[:, None] if self.x.ndim == 4 else positions
        values = self.baselines[baseline][rows]
        if baseline == "marginal" and self.turns is not None and number is not None:
            values = self.turns[number % len(self.turns)]
        return apply(self.x[rows], positions, values)


def open_scene(
    x: Float[Tensor, "samples ..."],
    features: Features,
    baselines: Sequence[Baseline],
    *,
    grid: int,
    donors: Tensor | None = None,
    seed: int = 0,
) -> Scene:
    """Lay out the features of inputs and their baselines.

    Args:
        x: Normalised inputs.
        features: What can be masked.
        baselines: What masked features become.
        grid: Images: patches per side.
        donors: Other inputs, from which "marginal" draws: one for each input, and 16 with whom the masks of an input
            take turns in `respond`, for one donor's effects are not those of another; without them it draws from x.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[Baseline, Tensor] = {}
    turns: Tensor | None = None
    for baseline in baselines:
        if baseline == "marginal" and donors is not None:
            values[baseline] = donors[torch.randint(len(donors), (len(x),), generator=generator)].to(x)
            turns = donors[torch.randperm(len(donors), generator=generator)[:DONORS]].to(x)
        else:
            values[baseline] = baseline_values(x, baseline, features, generator)
    layout, names = feature_layout(features, x.shape[1:], grid), feature_names(features, x.shape[1:], grid)
    return Scene(x, layout, names, values, turns=turns)


@dataclass(frozen=True)
class Responses:
    """What masks did: the logits, and for chosen sites the units; (samples, masks, ...) each."""

    logits: Float[Tensor, "samples masks classes"]
    sites: tuple[Float[Tensor, "samples masks units"], ...]


def respond(
    engine: Engine,
    scene: Scene,
    masks: Bool[Tensor, "samples masks features"],
    baselines: Sequence[Baseline],
    *,
    sites: Sequence[int] = (),
) -> Responses:
    """Run every input under every one of its masks.

    Args:
        engine: The network.
        scene: The inputs.
        masks: True where masked.
        baselines: For each mask of an input, by position, the baseline that it is filled with.
        sites: Sites whose units are kept as well.
    """
    samples, count, _ = masks.shape
    kept: dict[Baseline, list[list[Tensor]]] = {}
    order: list[int] = []
    for baseline in dict.fromkeys(baselines):
        chosen = [number for number, name in enumerate(baselines) if name == baseline]
        order += chosen
        kept[baseline] = _run(engine, scene, masks[:, chosen], baseline, sites)
    back = torch.tensor(order).argsort()

    def joined(position: int) -> Tensor:
        parts = [torch.cat(found[position]).view(samples, -1, found[position][0].shape[-1]) for found in kept.values()]
        return torch.cat(parts, 1)[:, back]

    assert len(back) == count, "one baseline for each mask"
    return Responses(joined(0), tuple(joined(1 + number) for number in range(len(sites))))


def _run(engine: Engine, scene: Scene, masks: Tensor, baseline: Baseline, sites: Sequence[int]) -> list[list[Tensor]]:
    samples, count, width = masks.shape
    rows = torch.arange(samples).repeat_interleave(count)
    number = torch.arange(count).repeat(samples)
    flat = masks.reshape(-1, width)
    kept: list[list[Tensor]] = [[] for _ in range(1 + len(sites))]
    for start in range(0, len(rows), engine.batch_size):
        part = slice(start, start + engine.batch_size)
        seen = engine.watch(scene.masked(rows[part], flat[part], baseline, number[part]))
        for position, site in enumerate((-1, *sites)):
            kept[position].append(seen[site].cpu())
    return kept
