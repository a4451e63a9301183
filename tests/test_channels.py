"""Channel groups of networks whose couplings are known by hand, and removals that change nothing else."""

from __future__ import annotations

import pytest
import torch
from tiny import Depthwise, Plain, Residual, Stages, images, random_norms
from torch import Tensor, nn

from causal_compress.results import Keep
from causal_compress.shrink.channels import ChannelGroup, dependencies_of, find_groups, remove_channels
from causal_compress.understand.trace import Network, trace


def groups_of(model: nn.Module, x: Tensor) -> dict[str, ChannelGroup]:
    network = trace(model, x)
    return {group.producer: group for group in find_groups(network.graph, x)[0]}


def readers_of(group: ChannelGroup) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {reader.layer: reader.positions for reader in group.readers}


def each(count: int, width: int = 1) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(index * width, (index + 1) * width)) for index in range(count))


def test_groups_of_a_residual_network() -> None:
    found = groups_of(Residual(), images(2, 1, 6))
    assert list(found) == ["stem", "blocks.0.conv1", "blocks.1.conv1"]
    inner = found["blocks.0.conv1"]
    assert (inner.channels, inner.writers, inner.passing) == (6, ("blocks.0.conv1",), ("blocks.0.bn1",))
    assert readers_of(inner) == {"blocks.0.conv2": each(6)}
    stream = found["stem"]
    assert stream.channels == 4
    assert stream.writers[0] == "stem"
    assert set(stream.writers) == {"stem", "blocks.0.conv2", "blocks.1.conv2"}
    assert set(stream.passing) == {"blocks.0.bn2", "blocks.1.bn2"}
    assert readers_of(stream) == {name: each(4) for name in ("blocks.0.conv1", "blocks.1.conv1", "fc")}


def test_a_flattened_channel_has_one_position_for_each_pixel() -> None:
    found = groups_of(Plain(), images(2, 1, 4))
    assert list(found) == ["conv1", "conv2"]
    assert readers_of(found["conv2"]) == {"fc": each(3, 4)}
    assert readers_of(found["conv1"]) == {"conv2": each(2)}


def test_a_depthwise_convolution_passes_channels_on() -> None:
    x = images(2, 2, 6)
    found, skips = find_groups(trace(Depthwise(), x).graph, x)
    assert [group.producer for group in found] == ["expand", "project"]
    assert set(found[0].passing) == {"bn", "depth"}
    assert readers_of(found[0]) == {"project": each(6)}
    assert [skip.what for skip in skips] == ["width of depth"]


class Attending(nn.Module):
    """Tokens through attention, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_attention_is_left_whole_with_reasons_of_one_line() -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found, skips = find_groups(trace(Attending(), x).graph, x)
    assert not found
    assert {skip.what: skip.reason for skip in skips} == {
        "width of attention": "the inside of a MultiheadAttention is not narrowed",
        "width of embed": "its channels reach attention (MultiheadAttention), which can't be narrowed",
    }


def test_the_classifier_is_never_a_group() -> None:
    assert "fc" not in groups_of(Stages(), images(2, 1, 8))
    mlp = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert list(groups_of(mlp, torch.rand(3, 5))) == ["0"]


def test_channels_that_reach_what_cannot_be_narrowed_are_refused_with_a_reason() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 1), nn.Linear(4, 2)
            self.shift = nn.Parameter(torch.zeros(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) + self.shift).mean((2, 3)))

    x = images(2, 1, 4)
    found, skips = find_groups(trace(Free(), x).graph, x)
    assert found == ()
    assert [skip.what for skip in skips] == ["width of conv"]


def test_looking_for_groups_leaves_the_network_alone(capfd: pytest.CaptureFixture[str]) -> None:
    network, x = trace(Stages(), images(2, 1, 8)), images(2, 1, 8)
    before = {name: value.clone() for name, value in network.graph.state_dict().items()}
    capfd.readouterr()
    find_groups(network.graph, x)
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(value, before[name]) for name, value in network.graph.state_dict().items())


def narrowed(network: Network, x: Tensor, producer: str, channels: tuple[int, ...]) -> None:
    remove_channels(network.graph, dependencies_of(network.graph, x), Keep(producer=producer, channels=channels))


@pytest.mark.parametrize(
    ("model", "x", "producer", "dead"),
    [
        (Residual(), images(2, 1, 6), "blocks.1.conv1", 2),
        (Plain(), images(2, 1, 4), "conv2", 1),
        (Depthwise(), images(2, 2, 6), "expand", 5),
    ],
)
def test_removing_a_channel_that_is_read_with_weight_zero_changes_nothing(
    model: nn.Module, x: Tensor, producer: str, dead: int
) -> None:
    model = random_norms(model)
    group = groups_of(model, x)[producer]
    with torch.no_grad():
        for reader in group.readers:
            model.get_submodule(reader.layer).weight[:, list(reader.positions[dead])] = 0.0
    network = trace(model, x)
    kept = tuple(channel for channel in range(group.channels) if channel != dead)
    narrowed(network, x, producer, kept)
    with torch.no_grad():
        assert torch.allclose(network.graph(x), model(x), atol=1e-5)
    assert len(network.graph.get_submodule(producer).weight) == group.channels - 1


def test_regions_shrink_with_the_graph_and_keeping_all_is_nothing() -> None:
    network, x = trace(random_norms(Residual()), images(2, 1, 6)), images(2, 1, 6)
    with torch.no_grad():
        before = network.graph(x)
        narrowed(network, x, "blocks.0.conv1", tuple(range(6)))
        assert torch.equal(network.graph(x), before)
    narrowed(network, x, "stem", (0, 3))
    shapes = []
    for region in network.regions:
        x = region.module(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(2, 6, 6), (2, 6, 6), (2, 6, 6), (3,)]
