"""Minimal sets hold, and none of their features can be left out: asked of the bare model, one set at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from causal_compress.explain.engine import open_engine, open_scene
from causal_compress.explain.minimal import minimal_sets
from causal_compress.inputs.data import Features
from causal_compress.understand.trace import trace

COLUMNS = 8
CLASSES = ("no", "yes")


def features():
    zero = torch.zeros(COLUMNS)
    columns = tuple((number,) for number in range(COLUMNS))
    return Features("table", tuple("abcdefgh"), columns, zero, zero)


class Logic(nn.Module):
    """Yes where (a and b) or (c and d); inputs are 0 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        yes = torch.maximum(x[:, 0] + x[:, 1], x[:, 2] + x[:, 3]) - 1.5
        return torch.stack([-yes, yes], 1)


def found_for(model, x, order, kind):
    network = trace(model, x[:1].repeat(2, 1))
    engine = open_engine(network, precision="fp32", batch_size=16)
    scene = open_scene(x, features(), ["zero"], grid=1)
    return minimal_sets(engine, scene, order, kind=kind, baseline="zero", classes=CLASSES), engine


def test_sufficient_and_necessary_of_a_known_formula():
    x = torch.ones(1, COLUMNS)
    order = torch.tensor([[1.0, 0.5, 0.9, 0.8, 0.1, 0.2, 0.3, 0.4]])
    (sufficient,), engine = found_for(Logic(), x, order, "sufficient")
    assert sufficient.features in (("a", "b"), ("c", "d"))
    assert sufficient.verified
    assert sufficient.minimal
    assert sufficient.forwards <= engine.spent.forwards
    (necessary,), _ = found_for(Logic(), x, order, "necessary")
    assert len(necessary.features) == 2  # one of each pair
    assert len(set(necessary.features) & {"a", "b"}) == 1
    assert (necessary.decision, necessary.decision_after) == ("yes", "no")


def test_every_set_of_a_random_network_holds_and_is_minimal():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(COLUMNS, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    generator = torch.Generator().manual_seed(0)
    x, order = (torch.randn(60, COLUMNS, generator=generator) for _ in range(2))
    with torch.no_grad():
        decisions = model(x).argmax(1)

    def holds(row: int, kept: tuple[int, ...], kind: str) -> bool:
        flags = torch.zeros(COLUMNS)
        flags[list(kept)] = 1
        given = x[row] * (flags if kind == "sufficient" else 1 - flags)
        with torch.no_grad():
            same = bool(model(given[None]).argmax() == decisions[row])
        return same == (kind == "sufficient")

    sizes = []
    for kind in ("sufficient", "necessary"):
        for row, one in enumerate(found_for(model, x, order, kind)[0]):
            assert one.found or kind == "necessary"
            assert one.verified == one.found == one.minimal
            if one.found:
                sizes.append(len(one.features))
                assert holds(row, one.positions, kind)
                for position in one.positions:
                    rest = tuple(p for p in one.positions if p != position)
                    assert not holds(row, rest, kind), (row, kind)
    assert len(sizes) > 80
    assert max(sizes) > 1


def test_an_input_gets_the_same_sets_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(2)
    x, order = (torch.rand(12, COLUMNS, generator=generator).round(), torch.rand(12, COLUMNS, generator=generator))
    together, _ = found_for(Logic(), x, order, "necessary")
    for row in range(12):
        assert found_for(Logic(), x[row : row + 1], order[row : row + 1], "necessary")[0] == (together[row],)


def test_what_no_set_can_do_is_said():
    x = torch.zeros(1, COLUMNS)
    order = torch.rand(1, COLUMNS)
    (necessary,), _ = found_for(Logic(), x, order, "necessary")
    assert not necessary.found
    assert not necessary.verified
    assert "leave 'no'" in (necessary.reason or "")
    (sufficient,), _ = found_for(Logic(), x, order, "sufficient")
    assert sufficient.found
    assert sufficient.features == ()
    assert "baseline alone" in (sufficient.reason or "")


@pytest.mark.parametrize("kind", ["sufficient", "necessary"])
def test_a_wrong_order_costs_forwards_but_not_truth(kind):
    x = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 1]])
    right = torch.tensor([[8.0, 7, 0, 0, 0, 0, 0, 0]])
    good, bad = (found_for(Logic(), x, order, kind)[0][0] for order in (right, -right))
    assert bad.verified
    assert bad.minimal
    assert good.forwards <= bad.forwards
    if kind == "sufficient":
        assert good.features == bad.features == ("a", "b")
