"""What could go, what goes, and what it did."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from causal_compress.results.common import Accuracy, Skip, config

Adapter = Literal["reshape", "project", "borrow"]
"""What a representative gets so that it can stand for its node: another number of channels, a layer before it, or the
inner channels of the node's other regions beside its own.
"""


@dataclass(frozen=True, kw_only=True, config=config)
class Evidence:
    """Why a change was proposed."""

    cka: float | None
    same_node_share: float | None
    ace: float | None
    relative_error: float | None


@dataclass(frozen=True, kw_only=True, config=config)
class Candidate:
    """One way to carry out regions first..last: which representative, at which width, and what it would cost.
    `harm_kl` is the measured rise of the output KL (nats, at the plan's temperature) when the teacher's cut point is
    replaced by the candidate's output. `inputs_kept` is the share of channels of the cut point before `first` that it
    reads; a part that writes the share s of its outputs costs `macs_fixed + s * macs_out` MACs, parameters alike.
    `widths` names each channel group inside that shrinks: producer -> channels kept; `ranks` each layer that becomes
    two thinner ones: layer -> rank. `keeps_width` says of a representative that borrows channels that it ends with as
    many as it has of its own or more, so that nothing about it is narrower than before.
    """

    first: int
    last: int
    representative: int
    adapter: Adapter | None
    inputs_kept: float
    widths: dict[str, int]
    macs_fixed: float
    macs_out: float
    params_fixed: float
    params_out: float
    harm_kl: float
    harm_stderr: float
    relative_error: float
    ranks: dict[str, int] = field(default_factory=dict)
    keeps_width: bool = False

    @property
    def narrows_output(self) -> bool:
        """Whether the part can write fewer channels."""
        return self.macs_out > 0


@dataclass(frozen=True, kw_only=True, config=config)
class CutGroup:
    """The channels of a cut point, where one layer alone writes them and one alone reads them."""

    producer: str
    channels: int


@dataclass(frozen=True, kw_only=True, config=config)
class Candidates:
    """Every candidate that was measured; depends on the data and the teacher, not on the budget."""

    rows: tuple[Candidate, ...]
    cut_groups: dict[int, CutGroup]
    regions: int
    macs: int
    params: int
    skipped: tuple[Skip, ...]
    inputs: int
    heldout: int
    seconds: float


@dataclass(frozen=True, kw_only=True, config=config)
class LatencyTable:
    """What each candidate takes on one runtime [ms], at full input and output width; in the candidates' order.

    Times are of undisturbed calls: 10th percentiles. `teacher_ms` is the sum over the teacher's own regions, `parts`
    how many different parts were timed.
    """

    runtime: str
    batch: int
    threads: int
    ms: tuple[float, ...]
    teacher_ms: float
    parts: int
    seconds: float


DecisionKind = Literal["keep", "merge", "narrow", "merge+narrow", "low rank", "narrow+low rank"]


@dataclass(frozen=True, kw_only=True, config=config)
class Decision:
    """One decision of the plan: a candidate that is carried out, its evidence, and what was refused for it."""

    node: str
    kind: DecisionKind
    candidate: Candidate
    outputs_kept: float
    evidence: Evidence
    predicted_harm_kl: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    refused: tuple[Skip, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class FrontPoint:
    """One point of the predicted Pareto front: shares kept and predicted harm."""

    macs: float
    params: float
    harm_kl: float


@dataclass(frozen=True, kw_only=True, config=config)
class Plan:
    """What will be done, decided before anything is touched; MACs, parameters, latency: shares of the teacher's.

    `size_bytes` is the file of the plan's network as it was written out, where the budget limits it.
    """

    decisions: tuple[Decision, ...]
    macs: float
    params: float
    latency: float | None = None
    latency_measured: float | None = None
    size_bytes: int | None = None
    predicted_harm_kl: float
    front: tuple[FrontPoint, ...]
    skipped: tuple[Skip, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class Merge:
    """Surgery step: regions first..last of the teacher's chain replaced by one; enough to be replayed without data."""

    first: int
    last: int
    representative: int
    adapter: Adapter | None


@dataclass(frozen=True, kw_only=True, config=config)
class Keep:
    """Surgery step: the output channels that stay in a producer and everything coupled with it."""

    producer: str
    channels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class Factor:
    """Surgery step: a convolution or linear layer becomes two, with `rank` channels between them."""

    layer: str
    rank: int


@dataclass(frozen=True, kw_only=True, config=config)
class Fold:
    """Surgery step that is exact: a layer reads `kept` of its `inputs`, because the others are copies of them."""

    layer: str
    kind: Literal["pooling", "channels"]
    inputs: int
    kept: int


@dataclass(frozen=True, kw_only=True, config=config)
class Surgery:
    """Replayable recipe from the teacher's architecture to the student's; weights are kept apart."""

    folds: tuple[Fold, ...] = ()
    merges: tuple[Merge, ...] = ()
    keeps: tuple[Keep, ...] = ()
    biased: tuple[str, ...] = ()
    factors: tuple[Factor, ...] = ()


@dataclass(frozen=True, kw_only=True, config=config)
class Change:
    """One ledger line: what was carried out, predicted beside measured harm (output KL in nats on held-out inputs).

    `refined` is the held-out relative error of the part's output before and after Gauss-Newton steps.
    """

    node: str
    what: str
    evidence: Evidence | None
    predicted_harm_kl: float | None
    measured_harm_kl: float | None
    relative_error: float | None
    penalty: float | None
    refined: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, config=config)
class Log:
    """What a stage that touches weights did and did not do; the weights themselves lie beside it in the run folder."""

    stage: str
    surgery: Surgery
    changes: tuple[Change, ...]
    skipped: tuple[Skip, ...]
    heldout_kl: float
    validation: Accuracy
    macs: int
    params: int
