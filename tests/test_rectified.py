"""Refits before a rectifier: the target bounds the error behind it, and following it lowers that error."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from causal_compress.shrink.refit import NormalEquations, ridge
from causal_compress.shrink.repair import accumulate, rectified_target
from causal_compress.understand.tail import rectifier_ceiling

FINITE = st.floats(-20, 20, allow_nan=False)


def through(value, ceiling):
    return value.clamp(0, None if math.isinf(ceiling) else ceiling)


@given(FINITE, FINITE, FINITE, st.sampled_from([math.inf, 6.0]))
def test_the_squared_error_to_the_target_bounds_the_error_behind_the_rectifier(wanted, now, other, ceiling):
    wanted, now, other = (torch.tensor([v], dtype=torch.float64) for v in (wanted, now, other))
    goal = rectified_target(wanted, now, ceiling)
    behind = (through(other, ceiling) - through(wanted, ceiling)).square()
    assert float((other - goal).square()) >= float(behind) - 1e-9


@given(FINITE, FINITE, st.sampled_from([math.inf, 6.0]))
def test_the_bound_is_tight_where_the_student_is_on_the_teacher_s_side(wanted, now, ceiling):
    same_side = (wanted > 0) == (now > 0) and (wanted >= ceiling) == (now >= ceiling)
    wanted, now = torch.tensor([wanted]), torch.tensor([now])
    behind = (through(now, ceiling) - through(wanted, ceiling)).square()
    if same_side:
        torch.testing.assert_close((now - rectified_target(wanted, now, ceiling)).square(), behind)


def test_rounds_lower_the_error_behind_the_rectifier():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 12, generator=generator)
    wanted = z @ torch.randn(12, 6, generator=generator) - 0.5
    few = z[:, :5]  # most of what the teacher read is gone

    def solved(target):
        sums = NormalEquations(5, 6)
        sums.add(few, target)
        return ridge(sums, 1e-6)

    def error(weight, bias):
        return float((F.relu(few.double() @ weight + bias) - F.relu(wanted)).square().mean())

    solution = solved(wanted)
    errors = [error(*solution)]
    for _ in range(4):
        now = (few.double() @ solution[0] + solution[1]).float()
        solution = solved(rectified_target(wanted, now, math.inf))
        errors.append(error(*solution))
    assert errors[2] < 0.9 * errors[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors[1:]))


def test_targets_alone_can_be_added_to_known_rows():
    z, t, other = torch.randn(50, 4), torch.randn(50, 3), torch.randn(50, 3)
    known, whole = NormalEquations(4, 3), NormalEquations(4, 3)
    known.add(z, t)
    whole.add(z, other)
    again = known.without_targets()
    again.add_targets(z, other)
    for name in ("rows", "sum_z", "sum_t", "zz", "zt", "tt"):
        assert torch.equal(torch.as_tensor(getattr(again, name)), torch.as_tensor(getattr(whole, name)))


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 9])
def test_known_rows_are_held_out_as_before(chunks):
    """With one chunk nothing is held out, the second time neither: no rows would make every error NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(20, 4, generator=generator), torch.randn(20, 3, generator=generator)) for _ in range(chunks)]
    known = accumulate(nn.Linear(4, 3), rows, chunks)
    again = accumulate(nn.Linear(4, 3), rows, chunks, known)
    held = 0 if chunks == 1 else max(1, chunks // 4)
    assert known.heldout.rows == 20 * (held or 1)
    assert known.train.rows == 20 * (chunks - held)
    assert again.solve([1e-3, 1e-1], None).relative_error == known.solve([1e-3, 1e-1], None).relative_error < math.inf


class Ends(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Conv2d(1, 2, 3), kind
        self.act = {"relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU}.get(kind, nn.Identity)()

    def forward(self, x):
        y = self.layer(x)
        match self.kind:
            case "function":
                return F.relu(y)
            case "function6":
                return F.relu6(y)
            case "method":
                return y.relu()
            case "two readers":
                return F.relu(y) + y
            case _:
                return self.act(y)


@pytest.mark.parametrize(
    ("kind", "ceiling"),
    [
        ("relu", math.inf), ("function", math.inf), ("method", math.inf), ("relu6", 6.0), ("function6", 6.0),
        ("gelu", None), ("two readers", None), ("identity", None),
    ],
)  # fmt: skip
def test_only_a_lone_rectifier_counts(kind, ceiling):
    graph = fx.symbolic_trace(Ends(kind))
    node = next(node for node in graph.graph.nodes if str(node.target) == "layer")
    assert rectifier_ceiling(graph, node) == ceiling
