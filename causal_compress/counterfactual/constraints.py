"""What a counterfactual may look like: ranges, grids of values, one-hot groups, columns that stay, rise or fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causal_compress.errors import UsageError
from causal_compress.inputs.data import Data
from causal_compress.inputs.images import ImageArray, ImageRows
from causal_compress.recipe import CounterfactualSection

_ROWS = 50_000
_TABLE_LEAST, _IMAGE_LEAST = 0.01, 0.02
_NEAR = 1e-4
_DECIMALS = (0, 1, 2)
_EXTREME = 0.002


@dataclass(frozen=True, eq=False)
class Domain:
    """The valid inputs, in normalised space; every tensor is broadcastable to one input.

    raw value = encoded * scale + offset. `step` is the grid of raw values (0: none), `least` the smallest change that
    counts, `direction` 1 for positions that may only rise, -1 only fall; `groups` are the positions of each one-hot
    column, `columns` those of each column. `copied`: one bool, whether all channels are copies of one grey channel.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    offset: Tensor
    step: Tensor
    least: Tensor
    direction: Tensor
    immutable: Tensor
    columns: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    copied: Tensor = field(default_factory=lambda: torch.tensor(False))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, for a file."""
        return {name: value for name, value in self._named() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Domain:
        """The same on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def span(self) -> Tensor:
        """High - low; 1 where a column is constant."""
        return torch.where(self.high > self.low, self.high - self.low, torch.ones_like(self.low))

    def reach(self) -> Tensor:
        """What one unit of change is: the pixel range, or a table's standard deviations (ranges hang on outliers)."""
        return torch.ones_like(self.low) if self.columns else self.span()

    def _named(self) -> list[tuple[str, object]]:
        return [(one.name, getattr(self, one.name)) for one in fields(self)]


def domain_of(data: Data, section: CounterfactualSection) -> Domain:
    """The domain that data and recipe give.

    Args:
        data: Ranges and grids are those of its training split.
        section: Immutable and monotone columns, ranges.

    Raises:
        UsageError: a constraint on a column that is not there, not numeric, or on an image.
    """
    if data.kind == "image":
        _refuse_table_constraints(section)
        return _image_domain(data)
    return _constrained(_table_domain(data), data, section)


def closeness(domain: Domain, x: Float[Tensor, "samples ..."], other: Float[Tensor, "samples ..."]) -> Tensor:
    """Mean absolute change of each input, over pixels or columns, in pixel ranges or standard deviations."""
    change = ((other - x) / domain.reach()).abs().flatten(1).sum(1)
    return change / (len(domain.columns) or x[0].numel())


def as_copies(domain: Domain, value: Float[Tensor, "samples ..."]) -> Tensor:
    """Grey images in several channels: every channel by the mean raw value of all; other inputs as they are."""
    if not domain.copied:
        return value
    raw = (value * domain.scale + domain.offset).mean(1, keepdim=True)
    return ((raw - domain.offset) / domain.scale).to(value.dtype)


def project(domain: Domain, x: Float[Tensor, "samples ..."], proposed: Float[Tensor, "samples ..."]) -> Tensor:
    """The valid input next to what was proposed, column by column.

    Args:
        domain: What is valid.
        x: The original inputs; what already lies outside the ranges there may stay as it is.
        proposed: Any values of the same shape; in one-hot groups the largest wins.

    Returns:
        Inputs without constraint violations with respect to x.
    """
    proposed = as_copies(domain, proposed)
    value = proposed.clamp(domain.low, domain.high)
    value = torch.where(domain.step > 0, _snapped(domain, value), value)
    wrong_way = (value - x) * domain.direction < 0
    unmoved = torch.minimum((value - x).abs(), (proposed - x).abs()) < domain.least
    if domain.copied:  # all channels of a pixel or none, whatever rounding does at the edge
        unmoved = unmoved.any(1, keepdim=True)
    value = torch.where(wrong_way | unmoved, x, value)
    for group in domain.groups:
        positions = list(group)
        best = proposed[:, positions].argmax(1)
        value[:, positions] = torch.nn.functional.one_hot(best, len(positions)).to(value)
    return torch.where(domain.immutable, x, value)


def straight_through(domain: Domain, x: Tensor, proposed: Tensor) -> Tensor:
    """`project` whose gradient is that of the proposal; zero for what may not change."""
    proposed = as_copies(domain, proposed)
    movable = proposed - proposed.detach()
    return project(domain, x, proposed.detach()) + torch.where(domain.immutable, torch.zeros_like(x), movable)


def violations(
    domain: Domain, x: Float[Tensor, "samples ..."], counterfactual: Float[Tensor, "samples ..."]
) -> Bool[Tensor, "samples ..."]:
    """Which positions of a counterfactual break a constraint; checked apart from how it was made.

    Args:
        domain: What is valid.
        x: The originals.
        counterfactual: Of the same shape.

    Returns:
        True where changed although immutable, outside the range, off the grid, moved the wrong way, coloured although
        grey, or in a one-hot group that is not one-hot; positions left as they were never count.
    """
    near = _NEAR * domain.span()
    changed = counterfactual != x
    outside = (counterfactual < domain.low - near) | (counterfactual > domain.high + near)
    off_grid = (domain.step > 0) & ((counterfactual - _snapped(domain, counterfactual)).abs() > near)
    wrong_way = (counterfactual - x) * domain.direction < 0
    coloured = (counterfactual - as_copies(domain, counterfactual)).abs() > near
    broken = changed & (domain.immutable | outside | off_grid | wrong_way | coloured)
    for group in domain.groups:
        positions = list(group)
        block = counterfactual[:, positions]
        one_hot = ((block == 0) | (block == 1)).all(1) & (block.sum(1) == 1)
        same = (block == x[:, positions]).all(1)
        broken[:, positions] |= ~(one_hot | same)[:, None]
    return broken


def _snapped(domain: Domain, value: Tensor) -> Tensor:
    step = torch.where(domain.step > 0, domain.step, torch.ones_like(domain.step))
    raw = ((value.double() * domain.scale + domain.offset) / step).round() * step
    return ((raw - domain.offset) / domain.scale).float()


def _image_domain(data: Data) -> Domain:
    rows = data.train.rows
    assert isinstance(rows, ImageRows)
    channels = data.input_shape[0]
    is_bytes = not isinstance(rows.store, ImageArray) or rows.store.values.dtype.kind == "u"
    low, high = rows.preparation.normalized(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, channels, 1, 1))
    if not is_bytes:
        seen = torch.cat([x.amax((0, 2, 3), keepdim=True) for x, _ in data.train.batches(500, limit=_ROWS)])
        least = torch.cat([x.amin((0, 2, 3), keepdim=True) for x, _ in data.train.batches(500, limit=_ROWS)])
        low, high = least.amin(0), seen.amax(0)
    span = torch.where(high > low, high - low, torch.ones_like(low))  # a constant channel has none
    return Domain(
        low=low,
        high=high,
        scale=(1 / span).double(),
        offset=(-low / span).double(),
        step=torch.full_like(span, 1 / 255 if is_bytes else 0.0).double(),
        least=_IMAGE_LEAST * span,
        direction=torch.zeros_like(span),
        immutable=torch.zeros_like(span, dtype=torch.bool),
        copied=torch.tensor(rows.preparation.repeat > 1),
    )


def _table_domain(data: Data) -> Domain:
    count = min(len(data.train), _ROWS)
    encoded, _ = data.train.take(range(count))
    raw = torch.from_numpy(data.train.show(range(count)))
    features = data.features
    width = encoded.shape[1]
    groups = tuple(p for p, names in zip(features.columns, features.categories, strict=True) if names)
    # every category that training knows is in range, also one that fewer rows have than a quantile cuts off
    one_hot = torch.zeros(width, dtype=torch.bool)
    one_hot[[position for group in groups for position in group]] = True
    scale, offset, step = (torch.full((width,), fill, dtype=torch.float64) for fill in (1.0, 0.0, 0.0))
    for column, positions in enumerate(features.columns):
        if not features.categories[column]:
            at = positions[0]
            scale[at], offset[at] = _affine(encoded[:, at].double(), raw[:, column])
            step[at] = _grid(raw[:, column])
    return Domain(
        low=encoded.quantile(_EXTREME, 0, interpolation="nearest").masked_fill(one_hot, 0.0),
        high=encoded.quantile(1 - _EXTREME, 0, interpolation="nearest").masked_fill(one_hot, 1.0),
        scale=scale,
        offset=offset,
        step=step,
        least=torch.full((width,), _TABLE_LEAST),
        direction=torch.zeros(width),
        immutable=torch.zeros(width, dtype=torch.bool),
        columns=features.columns,
        groups=groups,
    )


def _affine(encoded: Tensor, raw: Tensor) -> tuple[float, float]:
    """Scale and offset by the two rows that lie farthest apart; missing raw values were filled, so they don't count."""
    known = ~raw.isnan()
    encoded, raw = encoded[known], raw[known]
    if len(raw) == 0 or raw.max() == raw.min():
        return 1.0, float(raw[0] - encoded[0]) if len(raw) else 0.0
    first, last = int(raw.argmin()), int(raw.argmax())
    scale = float((raw[last] - raw[first]) / (encoded[last] - encoded[first]))
    return scale, float(raw[first] - encoded[first] * scale)


def _grid(raw: Tensor) -> float:
    """The coarsest of 1, 0.1 and 0.01 that all values are multiples of; 0 where there is none."""
    values = raw[~raw.isnan()]
    for decimals in _DECIMALS:
        if len(values) and bool(((values * 10**decimals).round() / 10**decimals - values).abs().max() < 1e-9):
            return float(10.0**-decimals)
    return 0.0


def _constrained(domain: Domain, data: Data, section: CounterfactualSection) -> Domain:
    names, categories = data.features.names, data.features.categories
    immutable, direction = domain.immutable.clone(), domain.direction.clone()
    low, high = domain.low.clone(), domain.high.clone()
    for name in section.immutable:
        immutable[list(domain.columns[_column(name, names, "immutable")])] = True
    for option, sign in (("rises", 1.0), ("falls", -1.0)):
        for name in getattr(section, option):
            direction[_numeric(name, names, categories, domain, option)] += sign
    for name, given in section.ranges.items():
        at = _numeric(name, names, categories, domain, "ranges")
        ends = _inwards(given, float(domain.step[at]))
        if ends[0] > ends[1]:
            raise UsageError(
                f"counterfactual.ranges of '{name}' is empty",
                found=f"[{given[0]:g}, {given[1]:g}]"
                + (f" in steps of {float(domain.step[at]):g}" if domain.step[at] else ""),
                remedy="give the lowest value first, and a range that holds a value of the column's grid",
            )
        low[at], high[at] = ((value - float(domain.offset[at])) / float(domain.scale[at]) for value in ends)
    immutable |= (direction == 0) & _asked_both_ways(section, names, domain)
    return replace(domain, immutable=immutable, direction=direction, low=low, high=high)


def _inwards(ends: tuple[float, float], step: float) -> tuple[float, float]:
    """A range whose ends lie on the grid: what is clamped to it is snapped afterwards, and must not leave it again."""
    if not step:
        return ends
    near = 1e-6  # 0.3 / 0.1 is not 3
    return math.ceil(ends[0] / step - near) * step, math.floor(ends[1] / step + near) * step


def _asked_both_ways(section: CounterfactualSection, names: Sequence[str], domain: Domain) -> Tensor:
    """A column that may neither rise nor fall stays as it is."""
    both = torch.zeros_like(domain.immutable)
    for name in set(section.rises) & set(section.falls):
        both[list(domain.columns[names.index(name)])] = True
    return both


def _column(name: str, names: Sequence[str], option: str) -> int:
    if name not in names:
        raise UsageError(
            f"counterfactual.{option}: the table has no column '{name}'",
            wanted=f"one of {', '.join(names[:30])}",
            remedy="correct the name",
        )
    return list(names).index(name)


def _numeric(name: str, names: Sequence[str], categories: Sequence[Sequence[str]], domain: Domain, option: str) -> int:
    column = _column(name, names, option)
    if categories[column]:
        raise UsageError(
            f"counterfactual.{option}: '{name}' is categorical, so it has no order",
            remedy="list it under counterfactual.immutable, or leave it out",
        )
    return domain.columns[column][0]


def _refuse_table_constraints(section: CounterfactualSection) -> None:
    given = [name for name in ("immutable", "rises", "falls", "ranges") if getattr(section, name)]
    if given:
        raise UsageError(
            f"counterfactual.{given[0]} is for tables", found="images", remedy=f"remove counterfactual.{given[0]}"
        )
