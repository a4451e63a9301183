"""What can stand for a span of regions, on chains whose shapes are known by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import Depthwise, Plain, Residual, Stages, images, random_norms
from torch import nn

from causal_compress.recipe import PlanSection
from causal_compress.results import Merge
from causal_compress.shrink import repair
from causal_compress.shrink.parts import build_part, fitting_adapter
from causal_compress.shrink.refit import NormalEquations
from causal_compress.shrink.rows import FewRows
from causal_compress.shrink.widths import find_widths
from causal_compress.understand.graph import fetch
from causal_compress.understand.tail import Tail, find_tail
from causal_compress.understand.trace import Network, site_activations, trace


def residual(blocks: int = 3) -> Network:
    return trace(random_norms(Residual(blocks)), images(2, 1, 6))


def stages() -> Network:
    torch.manual_seed(0)
    return trace(Stages(), images(2, 1, 8))


def part_of(
    network: Network, *, first: int, last: int, representative: int, adapter: str | None = None
) -> nn.Module | str:
    return build_part(network, Merge(first=first, last=last, representative=representative, adapter=adapter))


def test_a_region_that_stays_is_a_copy_of_itself() -> None:
    network = residual()
    x = site_activations(network, images(2, 1, 6))
    part = part_of(network, first=1, last=1, representative=1)
    assert not isinstance(part, str)
    with torch.no_grad():
        assert torch.equal(part(x[0]), x[1])
        fetch(part, "blocks.0.conv1").weight.zero_()
    assert fetch(network.regions[1].module, "blocks.0.conv1").weight.abs().sum() > 0


@pytest.mark.parametrize("representative", [1, 2, 3])
def test_one_of_several_equal_blocks_computes_what_it_always_did(representative: int) -> None:
    network = residual()
    x = site_activations(network, images(2, 1, 6))[0]
    part = part_of(network, first=1, last=3, representative=representative)
    assert not isinstance(part, str)
    with torch.no_grad():
        assert torch.allclose(part(x), network.regions[representative].module(x), atol=1e-6)
    inside = [str(node.target) for node in part.graph.nodes if node.op == "call_module"]
    assert all(name.startswith(f"blocks.{representative - 1}.") for name in inside if "relu" not in name)


def test_the_node_keeps_its_own_final_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    network = trace(model, torch.randn(3, 4))
    part = part_of(network, first=0, last=1, representative=0)
    assert not isinstance(part, str)
    x = torch.randn(5, 4)
    assert torch.allclose(part(x), torch.tanh(model[0](x)))


def test_a_single_layer_takes_another_number_of_outputs_and_inputs() -> None:
    network = stages()
    found = fitting_adapter(network, 0, 1, 1)
    assert not isinstance(found, str)
    adapter, part = found
    assert adapter == "reshape"
    layer = fetch(part, "down")
    assert (layer.in_channels, layer.out_channels, layer.stride) == (1, 4, (2, 2))
    assert part(images(3, 1, 8)).shape == (3, 4, 4, 4)


def test_no_adapter_where_shapes_fit_already() -> None:
    found = fitting_adapter(stages(), 1, 2, 1)
    assert not isinstance(found, str)
    assert found[0] is None


def test_a_block_behind_a_change_of_shape_gets_a_projection() -> None:
    class Downsampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 2, 3, padding=1)
            self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
            self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.down(torch.relu(self.stem(x))))
            x = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
            return self.fc(x.mean((2, 3)))

    network = trace(Downsampled(), images(2, 1, 8))
    assert [region.info.index for region in network.regions] == [0, 1, 2, 3]
    found = fitting_adapter(network, 1, 2, 2)
    assert not isinstance(found, str)
    adapter, part = found
    assert adapter == "project"
    layer = fetch(part, "adapter_1_2")
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride) == (2, 4, (1, 1), (2, 2))
    assert part(torch.randn(2, 2, 8, 8)).shape == (2, 4, 4, 4)
    tail = find_tail(part)
    assert isinstance(tail, Tail)
    assert tail.affine == "conv2"


def test_what_does_not_fit_says_why() -> None:
    network = stages()
    wrong = part_of(network, first=0, last=1, representative=0)
    assert isinstance(wrong, str)
    assert "shapes don't fit" in wrong
    depthwise = trace(random_norms(Depthwise()), images(2, 2, 6))
    refused = part_of(depthwise, first=0, last=1, representative=0)
    assert isinstance(refused, str)
    assert refused.startswith("depth can't be refitted")


def test_an_operation_that_cannot_do_with_another_shape_is_a_misfit() -> None:
    """Not every operation says so by a RuntimeError: a mean over axes that are not there is an IndexError."""

    class FromVector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(10, 144), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.second(torch.relu(self.first(x)).view(-1, 4, 6, 6)))
            return self.fc(torch.relu(self.third(x.amax((2, 3)))))

    network = trace(FromVector(), torch.randn(2, 10))
    last = len(network.regions) - 1
    spans = [
        (first, end, by) for first in range(last) for end in range(first + 1, last) for by in range(first, end + 1)
    ]
    refused = [found for span in spans if isinstance(found := fitting_adapter(network, *span), str)]
    assert any("shapes don't fit" in why for why in refused)


def test_building_parts_leaves_the_teacher_alone() -> None:
    network = stages()
    before = {name: value.clone() for name, value in network.graph.state_dict().items()}
    x = images(2, 1, 8)
    with torch.no_grad():
        wanted = network.graph(x)
        for first in range(4):
            for last in range(first, 4):
                for representative in range(first, last + 1):
                    fitting_adapter(network, first, last, representative)
        assert torch.equal(network.graph(x), wanted)
    after = network.graph.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("blocks", [2, 3])
def test_every_part_that_is_offered_fits_the_shapes(blocks: int) -> None:
    for network in (residual(blocks), stages()):
        for first in range(len(network.regions)):
            for last in range(first, len(network.regions)):
                for representative in range(first, last + 1):
                    found = fitting_adapter(network, first, last, representative)
                    if isinstance(found, str):
                        assert found
                        continue
                    x = torch.randn(3, *network.regions[first].info.input_shape)
                    assert found[1](x).shape == (3, *network.regions[last].info.output_shape)


def test_a_layer_too_large_to_refit_keeps_the_channels_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    network = trace(Plain().eval(), images(2, 1, 4))
    assert set(find_widths(network, PlanSection()).cuts) == {0, 1}
    monkeypatch.setattr(repair, "MOST_WEIGHTS", 53)
    widths = find_widths(network, PlanSection())
    assert set(widths.cuts) == {1}
    assert [(skip.what, skip.reason) for skip in widths.skipped] == [
        ("width of conv1", "it is read by conv2, whose 54 weights are too many to refit (limit 53)")
    ]


@pytest.mark.parametrize(("features", "kind"), [(4, NormalEquations), (40, FewRows)])
def test_rows_are_kept_themselves_where_they_are_fewer_than_features(features: int, kind: type) -> None:
    layer = nn.Linear(features, 2)
    chunks = [torch.randn(4, features, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        sums = repair.accumulate(layer, ((x, layer(x)) for x in chunks), len(chunks))
    assert isinstance(sums.train, kind)
    assert isinstance(sums.heldout, kind)
    assert (sums.train.rows, sums.heldout.rows, sums.both().rows) == (12, 4, 16)
    assert sums.solve([1e-4], layer.weight.detach().T.double()).relative_error < 1e-3
