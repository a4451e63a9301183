"""Representatives that borrow inner channels of the regions they stand for, on chains whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_composition import Summed
from test_surgery import planned, singles
from tiny import Depthwise, Residual, images, random_norms
from torch import Tensor, nn

from causal_compress.recipe import PlanSection, PruneSection, RewriteSection
from causal_compress.results import Candidates, Merge
from causal_compress.shrink.borrow import fit_hidden, lenders_of, lent_values
from causal_compress.shrink.choice import PENALTIES, Choice
from causal_compress.shrink.front import Front, open_front
from causal_compress.shrink.measure import Sweep, measure
from causal_compress.shrink.parts import build_part
from causal_compress.shrink.plan import allowed, price
from causal_compress.shrink.probe import Probe
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.surgery import Student, replay
from causal_compress.shrink.widths import find_widths
from causal_compress.understand.graph import fetch
from causal_compress.understand.trace import Network, site_activations, trace

BORROWS = Merge(first=1, last=2, representative=1, adapter="borrow")


class Apart(nn.Module):
    """Two residual blocks, of which the second reads nothing that the first one changes: features side by side.

    Inputs are positive, the first block adds something positive to channel 0, and the second reads channels 1 and 2.
    """

    def __init__(self, second_inner: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, second_inner, 3, padding=1)
        self.add_one, self.add_two = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(second_inner, 3, 3, padding=1)
        self.fc = nn.Linear(3, 3)
        with torch.no_grad():
            self.stem.bias.fill_(1.0)
            self.add_one.weight.abs_()
            self.add_one.weight[1:] = 0
            self.add_one.bias.zero_()
            self.two.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.add_one(torch.relu(self.one(x))))
        x = torch.relu(x + self.add_two(torch.relu(self.two(x))))
        return self.fc(x.mean((2, 3)))


class Down(nn.Module):
    """A block that halves the image and doubles the channels, and one that reads what it puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.halve, self.add_halve = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.short = nn.Conv2d(4, 8, 1, stride=2)
        self.same, self.add_same = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.short(x) + self.add_halve(torch.relu(self.halve(x))))
        x = torch.relu(x + self.add_same(torch.relu(self.same(x))))
        return self.fc(x.mean((2, 3)))


class Halving(Down):
    """A block of full size before the one that halves the image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.add_one = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.add_one(torch.relu(self.one(x))))
        x = torch.relu(self.short(x) + self.add_halve(torch.relu(self.halve(x))))
        return self.fc(x.mean((2, 3)))


def traced(model: nn.Module, channels: int = 1) -> Network:
    return trace(random_norms(model), images(2, channels, 6).abs())


def apart(second_inner: int = 4) -> Network:
    torch.manual_seed(0)
    return traced(Apart(second_inner), 3)


def probe(channels: int = 3) -> Probe:
    fit = list(images(128, channels, 6, 1).abs().split(32))
    return Probe(fit, list(images(64, channels, 6, 2).abs().split(32)), fit)


def measured(network: Network, channels: int, **section: object) -> Candidates:
    """Candidates of a network all of whose sites count as equal."""
    sites = len(network.regions)
    plan = PlanSection.model_validate({"low_rank": False, "widths": [0.5, 0.25], "min_channels": 1, **section})
    return measure(network, probe(channels), SimpleNamespace(cka=[[1.0] * sites] * sites), plan)  # type: ignore[arg-type]


def front(network: Network, channels: int = 3) -> Front:
    known = probe(channels)
    return open_front(network, known.fit, known.heldout, 4.0)


def choice(network: Network, adapter: str | None, channels: int = 3, representative: int = 1) -> Choice:
    section = PlanSection(min_channels=1, widths=[0.5])
    sweep = Sweep(network, probe(channels), find_widths(network, section), section)
    sweep.advance()
    merge = Merge(first=1, last=2, representative=representative, adapter=adapter)  # type: ignore[arg-type]
    part = build_part(network, merge)
    assert not isinstance(part, str)
    return Choice(sweep, 1, 2, representative, merge.adapter, part)


def biased(model: Residual) -> Residual:
    """Each first convolution with a bias of its own before its batch norm."""
    for block in model.blocks:
        block.conv1 = nn.Conv2d(block.conv1.in_channels, block.conv1.out_channels, 3, padding=1, bias=True)
    return model


@pytest.mark.parametrize("model", [Residual(3), biased(Residual(3))], ids=["no bias", "bias"])
def test_borrowed_channels_change_nothing_before_they_are_fitted(model: Residual) -> None:
    network = traced(model)
    x = site_activations(network, images(2, 1, 6))[0]
    for representative in (1, 2, 3):
        part = build_part(network, Merge(first=1, last=3, representative=representative, adapter="borrow"))
        assert not isinstance(part, str)
        with torch.no_grad():
            assert torch.allclose(part(x), network.regions[representative].module(x), atol=1e-5)
        assert len(fetch(part, f"blocks.{representative - 1}.conv1").weight) == 3 * 6


def test_features_that_lie_side_by_side_are_followed_exactly() -> None:
    network = apart()
    alone, lent = choice(network, None), choice(network, "borrow")
    assert alone.error > 0.01
    assert lent.error < 1e-4  # what the smallest ridge penalty leaves
    assert lent.measured({}, 1.0).harm_kl < alone.measured({}, 1.0).harm_kl


def test_what_is_lent_is_what_the_teacher_has_inside() -> None:
    network = apart(second_inner=5)
    x = images(4, 3, 6, 7).abs()
    entering, between = site_activations(network, x)[:2]
    with torch.no_grad():
        one, two = (fetch(network.regions[index].module, name) for index, name in ((1, "one"), (2, "two")))
        wanted = torch.cat([one(entering), two(between)], 1)
    assert torch.allclose(lent_values(network, BORROWS)(entering)[0], wanted, atol=1e-6)


def test_hidden_layers_are_refitted_to_what_enters_the_node() -> None:
    network = apart()
    part = build_part(network, BORROWS)
    assert not isinstance(part, str)
    halved = [x / 2 for x in site_activations(network, torch.cat(probe().fit))[0].split(32)]
    wanted = [lent_values(network, BORROWS)(2 * x)[0] for x in halved]
    fit_hidden(part, halved, wanted, PENALTIES)
    with torch.no_grad():
        found = torch.relu(fetch(part, "one")(halved[0]))
    assert torch.allclose(found, torch.relu(wanted[0]), atol=1e-2)


def test_of_borrowed_channels_those_stay_that_are_needed() -> None:
    """The second block's layer reads nothing: all that is worth keeping are the first one's channels."""
    network = apart()
    with torch.no_grad():
        for region in network.regions:
            for path, layer in region.module.named_modules():
                if path == "add_two":
                    layer.weight.zero_()  # type: ignore[operator, union-attr]
    found = choice(network, "borrow")
    shape = found.shaped({"one": 4}, 1.0)
    assert shape.kept["one"].tolist() == [0, 1, 2, 3]


def test_a_block_that_halves_the_image_borrows_from_the_next() -> None:
    torch.manual_seed(0)
    network = traced(Down())
    lenders = lenders_of(network, BORROWS)
    assert not isinstance(lenders, str)
    assert [hidden.site.layer for _, hidden in lenders] == ["halve", "same"]
    plain = choice(network, None, 1).measured({}, 1.0)
    lent = next(row for row in measured(network, 1).rows if row.keeps_width and row.adapter == "borrow")
    assert lent.widths == {"halve": 8}
    assert (lent.macs_fixed, lent.params_fixed) == (plain.macs_fixed, plain.params_fixed)
    assert lent.relative_error < plain.relative_error


def test_a_block_that_halves_the_image_borrows_every_second_position_of_the_one_before() -> None:
    torch.manual_seed(0)
    network = trace(random_norms(Halving()), images(2, 1, 6))
    merge = Merge(first=1, last=2, representative=2, adapter="borrow")
    part = build_part(network, merge)
    assert not isinstance(part, str)
    assert len(fetch(part, "halve").weight) == 5 + 8
    entering, between = site_activations(network, images(4, 1, 6, 3))[:2]
    with torch.no_grad():
        one, halve = (fetch(network.regions[index].module, name) for index, name in ((1, "one"), (2, "halve")))
        wanted = torch.cat([one(entering)[:, :, ::2, ::2], halve(between)], 1)
    assert torch.allclose(lent_values(network, merge)(entering)[0], wanted, atol=1e-6)
    lent, plain = (choice(network, adapter, 1, representative=2) for adapter in ("borrow", None))
    assert lent.error < plain.error


class Lines(nn.Module):
    """Blocks of linear layers on (samples, rows, columns, channels), the second with twice the inner channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.one, self.add_one = nn.Linear(4, 3), nn.Linear(3, 4)
        self.two, self.add_two = nn.Linear(4, 6), nn.Linear(6, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.add_one(torch.relu(self.one(x))))
        x = torch.relu(x + self.add_two(torch.relu(self.two(x))))
        return self.fc(x.mean((1, 2)))


def test_linear_layers_on_maps_lend_all_their_channels() -> None:
    torch.manual_seed(0)
    network = trace(Lines().eval(), images(2, 1, 6))
    x = site_activations(network, images(4, 1, 6, 3))[0]
    assert lent_values(network, BORROWS)(x)[0].shape == (4, 1, 6, 3 + 6)
    alone, lent = choice(network, None, 1), choice(network, "borrow", 1)
    assert lent.error < 0.5 * alone.error


@pytest.mark.parametrize(
    ("model", "channels", "span", "reason"),
    [
        (Depthwise, 2, (0, 1), "not affine"),
        (Summed, 1, (2, 3), "no other region"),
        (Summed, 1, (0, 1), "through activations alone"),
    ],
)
def test_what_can_not_borrow_says_why(
    model: type[nn.Module], channels: int, span: tuple[int, int], reason: str
) -> None:
    merge = Merge(first=span[0], last=span[1], representative=span[0], adapter="borrow")
    found = build_part(trace(model().eval(), images(2, channels, 6)), merge)
    assert isinstance(found, str)
    assert reason in found


def carried_out(network: Network, widths: dict[str, int]) -> Student:
    plan = planned([*singles(network)[:1], BORROWS, *singles(network)[3:]], {1: widths})
    student, changes, _ = rewrite(network, plan, front(network), RewriteSection())
    assert "with the inner channels of all stands for 2 regions" in changes[0].what
    return prune(student, plan, front(network), PruneSection())[0]


@pytest.mark.parametrize("widths", [{}, {"one": 6}, {"one": 2}])
def test_surgery_borrows_and_can_be_replayed_without_data(widths: dict[str, int]) -> None:
    network = apart(second_inner=5)
    student = carried_out(network, widths)
    assert len(fetch(student.graph, "one").weight) == widths.get("one", 4 + 5)
    again = replay(network, student.surgery, student.graph.state_dict())
    x = images(4, 3, 6, 9).abs()
    with torch.no_grad():
        assert torch.equal(again.graph(x), student.graph(x))
        if not widths:
            assert torch.allclose(student.graph(x), network.graph(x), atol=1e-3)


def test_as_many_channels_as_before_are_no_narrowing() -> None:
    known = measured(apart(), 3)
    section = PlanSection(width=False)
    rows = allowed(known, price(known), section)[0].rows
    lent = [row.widths for row in rows if row.adapter == "borrow" and (row.first, row.last) == (1, 2)]
    assert lent == [{"one": 4}]
    without = allowed(known, price(known), section.model_copy(update={"borrow": False}))[0].rows
    assert {row.adapter for row in without} == {None}


def test_no_more_channels_are_borrowed_than_would_be_worth_it() -> None:
    rows = measured(apart(), 3, widths=[0.9, 0.75, 0.5, 0.25]).rows
    mine = [row.widths["one"] for row in rows if row.adapter == "borrow" and (row.first, row.last) == (1, 2)]
    assert mine == [6, 4, 2]


def test_where_channels_come_in_multiples_the_next_one_is_borrowed_too() -> None:
    rows = measured(apart(), 3, widths=[0.75, 0.5], align=4).rows  # six are worth it, and six don't go
    lent = [row for row in rows if row.adapter == "borrow" and (row.first, row.last) == (1, 2)]
    assert [row.widths for row in lent] == [{}, {"one": 4}]
    assert lent[0].macs_fixed > 1.9 * lent[1].macs_fixed
    assert lent[0].harm_kl < lent[1].harm_kl
    assert [row.keeps_width for row in lent] == [True, True]


def test_where_borrowing_is_switched_off_merges_are_narrowed_alone() -> None:
    rows = measured(apart(), 3, borrow=False).rows
    assert {row.adapter for row in rows if row.first != row.last} <= {None, "reshape", "project"}
    assert any(row.widths for row in rows if row.first != row.last and row.adapter is None)
