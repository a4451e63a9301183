"""Channel groups of networks whose couplings are known by hand, and removals that change nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
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


class Around(nn.Module):
    """Two convolutions and a classifier, with something between the convolutions (an operation or a module)."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(channels, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)
        self.between = between
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(torch.relu(self.first(x)))
        return self.fc(torch.relu(self.second(x)).mean((2, 3)))


def shuffled(x: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


def space_to_depth(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


@pytest.mark.parametrize(
    ("between", "channels"),
    [
        pytest.param(lambda x: torch.cat([x, -x], 1), 16, id="concatenated with itself"),
        pytest.param(shuffled, 8, id="shuffled by reshaping"),
        pytest.param(nn.ChannelShuffle(2), 8, id="shuffled"),
        pytest.param(nn.PixelShuffle(2), 2, id="pixel shuffle"),
        pytest.param(nn.PixelUnshuffle(2), 32, id="pixel unshuffle"),
        pytest.param(space_to_depth, 32, id="space to depth"),
        pytest.param(lambda x: x.flip(1), 8, id="flipped"),
        pytest.param(lambda x: x.roll(1, 1), 8, id="rolled"),
        pytest.param(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 8, id="swapped halves"),
        pytest.param(lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)), 8, id="gated by their mean"),
    ],
)
def test_channels_that_change_order_or_mix_before_their_reader_stay(
    between: Callable[[Tensor], Tensor], channels: int, capfd: pytest.CaptureFixture[str]
) -> None:
    x = images(2, 1, 8)
    network = trace(Around(between, channels), x)
    capfd.readouterr()
    found, skips = find_groups(network.graph, x)
    assert [group.producer for group in found] == ["second"]
    assert [skip.what for skip in skips] == ["width of first"]
    assert skips[0].reason.startswith("its channels are reordered or mixed before second")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(nn.LayerNorm((8, 8, 8)), id="layer norm"),
        pytest.param(nn.LayerNorm((8, 8, 8), elementwise_affine=False), id="layer norm without weights"),
        pytest.param(nn.GroupNorm(4, 8), id="group norm"),
        pytest.param(nn.GroupNorm(1, 8, affine=False), id="group norm without weights"),
        pytest.param(nn.LocalResponseNorm(3, alpha=1.0), id="local response norm"),
        pytest.param(lambda x: F.group_norm(x, 4), id="group norm as a function"),
        pytest.param(lambda x: F.layer_norm(x, x.shape[1:]), id="layer norm as a function"),
        pytest.param(lambda x: F.normalize(x, dim=1), id="unit length"),
    ],
)
def test_channels_over_which_a_norm_is_taken_stay(between: Callable[[Tensor], Tensor]) -> None:
    x = images(2, 1, 8)
    found, skips = find_groups(trace(Around(between), x).graph, x)
    assert [group.producer for group in found] == ["second"]
    assert [skip.what for skip in skips] == ["width of first"]
    assert skips[0].reason.endswith("its norm is taken over these channels")


class Gate(nn.Module):
    """Squeeze and excitation: every channel is scaled by what all channels say."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(nn.InstanceNorm2d(8, affine=True), id="instance norm"),
        pytest.param(nn.BatchNorm2d(8), id="batch norm"),
        pytest.param(nn.PReLU(8), id="a slope for each channel"),
        pytest.param(nn.MaxPool2d(2), id="pooling"),
        pytest.param(Gate(), id="a gate read from all of them"),
        pytest.param(lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), id="moved there and back"),
    ],
)
def test_what_treats_each_channel_alone_lets_them_go(between: Callable[[Tensor], Tensor]) -> None:
    found = groups_of(random_norms(Around(between)), images(2, 1, 8))
    assert {"first", "second"} <= set(found)
    assert readers_of(found["first"])["second"] == each(8)


def test_a_map_of_one_channel_is_no_group() -> None:
    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))

    x = images(2, 1, 8)
    found, skips = find_groups(trace(Around(Attended()), x).graph, x)
    assert [group.producer for group in found] == ["second"]
    assert {skip.what: skip.reason for skip in skips} == {
        "width of first": "its channels are reordered or mixed before between.conv",
        "width of between.conv": "it has one channel",
    }


class Beside(nn.Module):
    """A residual branch whose last layer reads what two layers put out side by side, with or without a third added."""

    def __init__(self, left: int, right: int, added: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, left, 1), nn.Conv2d(8, right, 3, padding=1)
        self.whole = nn.Conv2d(8, left + right, 1) if added else None
        self.out = nn.Conv2d(left + right, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = 0.0 if self.whole is None else self.whole(x)
        return x + self.out(torch.relu(whole + torch.cat([self.left(x), self.right(x)], 1)))


@pytest.mark.parametrize(("left", "right"), [(6, 6), (4, 8)])
def test_a_group_is_all_that_its_layers_read_and_write(left: int, right: int) -> None:
    """Of layers that read or write other channels too, too few would be kept, and their cost be counted wrong."""
    x = images(2, 1, 8)
    beside = "between.out reads other channels beside them"
    added = f"its {left + right} channels are added to {left} of between.left"
    for model, reasons in (
        (Beside(left, right, added=False), {"between.left": beside, "between.right": beside}),
        (Beside(left, right, added=True), {"between.whole": added}),
    ):
        found, skips = find_groups(trace(Around(model), x).graph, x)
        assert [group.producer for group in found] == ["first", "second"]
        assert {skip.what: skip.reason for skip in skips} == {f"width of {at}": why for at, why in reasons.items()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_flattened_map_is_followed_only_channel_by_channel(channels_last: bool) -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 9, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            return self.fc((x.permute(0, 2, 3, 1) if channels_last else x).flatten(1))

    found = groups_of(Flattened(), images(2, 1, 3))
    assert {name: readers_of(group) for name, group in found.items()} == (
        {} if channels_last else {"conv": {"fc": each(4, 9)}}
    )


def test_a_transformer_block_loses_its_hidden_width_though_its_stream_is_normed() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
            self.up, self.down, self.fc = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + self.down(F.gelu(self.up(self.norm(x))))
            return self.fc(x.mean(1))

    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found, skips = find_groups(trace(Mixing(), x).graph, x)
    assert [(group.producer, readers_of(group)) for group in found] == [("up", {"down": each(12)})]
    reason = "its channels reach norm (LayerNorm): its norm is taken over these channels"
    assert {skip.what: skip.reason for skip in skips} == {"width of embed": reason, "width of down": reason}


def test_one_wrong_group_among_many_is_the_only_one_refused() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(1 if index == 0 else 6, 6, 1) for index in range(6))
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            for index, conv in enumerate(self.convs):
                x = torch.tanh(conv(x.flip(1) if index == 3 else x))
            return self.fc(x.mean((2, 3)))

    x = images(2, 1, 4)
    found, skips = find_groups(trace(Tower(), x).graph, x)
    assert [group.producer for group in found] == [f"convs.{index}" for index in (0, 1, 3, 4, 5)]
    assert {skip.what: skip.reason for skip in skips} == {
        "width of convs.2": "its channels are reordered or mixed before convs.3"
    }


def test_a_network_that_torch_pruning_cannot_follow_has_no_groups_but_a_reason_for_each_layer() -> None:
    x = images(2, 3, 32)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    found, skips = find_groups(trace(model, x).graph, x)
    assert found == ()
    assert len(skips) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert all(skip.reason.startswith("torch-pruning can't follow the network (ZeroDivisionError") for skip in skips)


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
