"""What explains a network and what compression did to it: the harm audit, and which change cost the most."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from causal_compress.results.common import Accuracy, Skip, config


@dataclass(frozen=True, kw_only=True, config=config)
class Estimate:
    """A number with its 95 % interval and what it was estimated from."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True, config=config)
class Compared:
    """Teacher and student on the same inputs: accuracies, the paired drop [pp], and McNemar's exact p-value.
    `teacher_only` and `student_only` count the inputs that one alone gets right.
    """

    teacher: Accuracy
    student: Accuracy
    drop_pp: float
    drop_ci_pp: tuple[float, float]
    teacher_only: int
    student_only: int
    p_value: float


@dataclass(frozen=True, kw_only=True, config=config)
class GroupChange:
    """One class, or one group of inputs; `p_holm` is corrected for the number of groups."""

    name: str
    compared: Compared
    p_holm: float


@dataclass(frozen=True, kw_only=True, config=config)
class FlipPath:
    """A common way in which answers change: so many inputs of a class went from one answer to another."""

    true_class: str
    teacher_class: str
    student_class: str
    count: int


@dataclass(frozen=True, kw_only=True, config=config)
class Flips:
    """How answers changed, in counts that add up to `n`; `agreement` is the share of equal answers [percent]."""

    n: int
    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other_wrong: int
    same_wrong: int
    agreement: Accuracy
    commonest: tuple[FlipPath, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class Quality:
    """How good the probabilities are: teacher's, student's, and student minus teacher with a paired interval.
    All are better when smaller, but overconfidence (mean confidence minus accuracy) is best at 0. The ECE is biased
    upwards, more so with few inputs, and so are its resamples: its change has no honest interval (None).
    `unit` says what is measured and how.
    """

    measure: Literal["overconfidence", "ece", "nll", "brier"]
    unit: str
    teacher: float
    student: float
    change: Estimate | None


@dataclass(frozen=True, kw_only=True, config=config)
class CorruptionRow:
    """One corruption at one severity (0: the same inputs, untouched). `extra_drop_pp` is the drop beyond the untouched
    inputs' own: above 0, the student is the more fragile of the two.
    """

    corruption: str
    severity: int
    setting: str
    compared: Compared
    extra_drop_pp: Estimate


@dataclass(frozen=True, kw_only=True, config=config)
class GroupGaps:
    """The groups of one column; a gap is the best group's accuracy minus the worst's [pp]; growth: student - teacher.
    Groups of fewer than `fewest` inputs are not among the rows that gaps are taken over.
    """

    column: str
    rows: tuple[GroupChange, ...]
    fewest: int
    teacher_gap_pp: float
    student_gap_pp: float
    growth_pp: Estimate


@dataclass(frozen=True, kw_only=True, config=config)
class AttributionDrift:
    """Rank agreement (Spearman, per input, mean over inputs) of the features' effects, teacher against another network.
    Both sides always have masks of their own, so `floor`, the teacher against itself, says how much of the drift is
    the masks' noise; `beyond_floor` = floor - student, paired over inputs. `apart`: a network trained apart.
    """

    features: int
    masks: int
    baseline: str
    student: Estimate
    floor: Estimate
    beyond_floor: Estimate
    apart: Estimate | None
    per_input: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, config=config)
class NodeDrift:
    """One cut point that both networks have in full width: its average causal effect [nats] in each.
    `again` is the teacher's with other masks, those of the student; `change` is student minus `again`, paired over
    inputs.
    """

    node: str
    teacher: float
    again: float
    student: float
    change: Estimate


@dataclass(frozen=True, kw_only=True, config=config)
class MapDrift:
    """The causal map before and after: effects at the nodes that both have, and their rank agreement (Spearman).
    `student` is its agreement with the teacher, `floor` the teacher's with itself, both under other masks; None where
    fewer than 3 nodes match.
    """

    nodes: tuple[NodeDrift, ...]
    inputs: int
    student: float | None
    floor: float | None


@dataclass(frozen=True, kw_only=True, config=config)
class Parting:
    """An input on which the two part, with each one's probability of its own answer; for people as picture or row.
    `index` is its index in the audited split, as `explain --index` counts.
    """

    index: int
    true_class: str
    teacher_class: str
    student_class: str
    teacher_probability: float
    student_probability: float
    picture_png_base64: str | None = None
    row: str | None = None


@dataclass(frozen=True, kw_only=True, config=config)
class Audit:
    """The harm that compression did: the student against its teacher, on the same inputs of one split.
    `gallery` shows the inputs with the largest divergence of outputs among those on which the two part.
    """

    schema: Literal[1] = 1
    split: Literal["validation", "test"]
    n: int
    classes: int
    overall: Compared
    per_class: tuple[GroupChange, ...]
    flips: Flips
    quality: tuple[Quality, ...]
    corruptions: tuple[CorruptionRow, ...]
    groups: GroupGaps | None
    attribution: AttributionDrift | None
    causal_map: MapDrift | None
    gallery: tuple[Parting, ...]
    skipped: tuple[Skip, ...]
    seed: int
    seconds: float


@dataclass(frozen=True, kw_only=True, config=config)
class Undone:
    """One change undone, all others carried out again: what came back, and what it costs.
    `harm_removed_kl` [nats] on held-out inputs and `accuracy_gained_pp` on validation, both paired with the student as
    planned; `ledger_harm_kl` is what the surgery noted when it made the change (None: nothing was noted).
    """

    node: str
    kind: str
    what: tuple[str, ...]
    ledger_harm_kl: float | None
    harm_removed_kl: Estimate
    heldout_kl: float
    accuracy: Accuracy
    accuracy_gained_pp: float
    accuracy_gained_ci_pp: tuple[float, float]
    macs_given_back: int
    params_given_back: int


@dataclass(frozen=True, kw_only=True, config=config)
class Bisection:
    """Which change costs the most: each undone alone, the most harmful first. All without distillation.
    `heldout_kl`, `accuracy`, `macs` and `params` are those of the student as planned, made again with `refit_inputs`.
    """

    schema: Literal[1] = 1
    undone: tuple[Undone, ...]
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]
    heldout_kl: float
    heldout: int
    accuracy: Accuracy
    macs: int
    params: int
    distilled: bool
    refit_inputs: int
    seconds: float
