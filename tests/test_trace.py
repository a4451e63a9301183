"""The chain and its tails on networks whose answers are known by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Block, Depthwise, Opaque, Plain, Residual, images, random_norms
from torch import Tensor, nn

from causal_compress.errors import TraceError
from causal_compress.understand.graph import ends, extract, observer
from causal_compress.understand.tail import Tail, find_tail, undo
from causal_compress.understand.trace import Network, site_activations, trace


def assert_chain_is_the_model(model: nn.Module, x: Tensor, network: Network) -> None:
    with torch.no_grad():
        wanted = model(x.clone())
        assert torch.allclose(network.graph(x), wanted, atol=1e-5)
        assert torch.allclose(site_activations(network, x)[-1], wanted, atol=1e-5)


def test_a_plain_network_is_a_chain_of_its_layers() -> None:
    model, x = random_norms(Plain()), images(3, 1, 4)
    network = trace(model, x)
    chain = network.chain()
    assert [region.name for region in chain.regions] == ["conv1", "conv2", "fc"]
    assert tuple(region.macs for region in chain.regions) == Plain.macs
    assert tuple(region.params for region in chain.regions) == Plain.params
    assert tuple(region.output_shape for region in chain.regions) == Plain.shapes
    assert [region.input_shape for region in chain.regions] == [(1, 4, 4), *Plain.shapes[:-1]]
    assert [region.index for region in chain.regions] == [0, 1, 2]
    assert chain.untraced == ()
    assert_chain_is_the_model(model, x, network)


def test_residual_blocks_are_regions_and_sites_are_behind_their_activation() -> None:
    model, x = random_norms(Residual()), images(2, 1, 6)
    network = trace(model, x)
    assert [region.info.name for region in network.regions] == ["stem", "blocks.0", "blocks.1", "fc"]
    assert network.regions[1].info.macs == 2 * 4 * 6 * 9 * 36
    assert network.regions[1].info.params == 2 * 4 * 6 * 9 + 2 * (4 + 6)
    assert network.regions[3].info.modules == ("pool", "fc")
    assert all((site >= 0).all() for site in site_activations(network, x)[:-1])
    assert_chain_is_the_model(model, x, network)


def test_every_region_shares_the_graphs_parameters() -> None:
    network = trace(Residual(), images(2, 1, 6))
    owned = {id(parameter) for region in network.regions for parameter in region.module.parameters()}
    assert owned == {id(parameter) for parameter in network.graph.parameters()}


def test_tracing_leaves_the_model_alone() -> None:
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = trace(model, images(2, 1, 6))
    assert model.training
    assert model.blocks[0].relu.inplace
    assert not network.graph.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    network.graph.get_parameter("fc.bias").data.fill_(9.0)
    assert not torch.equal(model.fc.bias, torch.full((3,), 9.0))


def test_observed_activations_are_not_overwritten() -> None:
    model, x = random_norms(Residual(blocks=1)), images(2, 1, 6)
    network = trace(model, x)
    block = network.regions[1].module
    tail = find_tail(block)
    assert isinstance(tail, Tail)
    with torch.no_grad():
        given = network.regions[0].module(x)
        kept = given.clone()
        features, pre, out = observer(block, [tail.features, tail.pre, ends(block)[1]])(given)
        inner: Block = model.blocks[0]
        wanted = torch.relu(inner.bn1(inner.conv1(kept)))
        assert torch.allclose(features, wanted, atol=1e-5)
        assert torch.allclose(pre, inner.bn2(inner.conv2(wanted)) + kept, atol=1e-5)
        assert torch.allclose(out, torch.relu(pre))
    assert torch.equal(given, kept)


def test_what_fx_cannot_follow_is_left_whole_and_reported() -> None:
    model, x = Opaque().eval(), images(2, 1, 5)
    network = trace(model, x)
    assert [region.info.name for region in network.regions] == ["conv", "fickle", "fc"]
    (skip,) = network.chain().untraced
    assert skip.what == "fickle"
    assert "control flow" in skip.reason
    assert_chain_is_the_model(model, x, network)


def test_a_model_that_cannot_be_traced_at_all_is_one_region() -> None:
    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)

    model, x = Twisted(), torch.rand(3, 4)
    network = trace(model, x)
    assert len(network.regions) == 1
    assert [skip.what for skip in network.untraced] == ["the whole model"]
    assert_chain_is_the_model(model, x, network)


class Wanting(nn.Module):
    """Two layers, and a `forward` that takes more than its input; subclasses write it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def logits(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Masked(Wanting):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.logits(x if mask is None else x * mask)


class Cooled(Wanting):
    def forward(self, inputs: Tensor, temperature: float = 2.0) -> Tensor:
        return self.logits(inputs) / temperature


class Flagged(Wanting):
    def forward(self, x: Tensor, *, features: bool = False) -> Tensor:
        return self.a(x) if features else self.logits(x)


class Lavish(Wanting):
    def forward(self, *inputs: Tensor, **options: bool) -> Tensor:
        return -self.logits(inputs[0]) if options.get("negative") or len(inputs) > 1 else self.logits(*inputs)


@pytest.mark.parametrize("kind", [Masked, Cooled, Flagged, Lavish])
def test_what_forward_takes_besides_its_input_keeps_its_default(kind: type[Wanting]) -> None:
    model, x = kind().eval(), torch.rand(3, 4)
    network = trace(model, x)
    assert network.untraced == ()
    assert [region.info.name for region in network.regions] == ["a", "b"]
    assert [node.op for node in network.graph.graph.nodes].count("placeholder") == 1
    assert_chain_is_the_model(model, x, network)


class Stacked(Wanting):
    """Two branches on a first dimension of two, which is no batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.stack([torch.relu(self.a(x)), torch.tanh(self.a(x))]).mean(0))


@pytest.mark.parametrize("rows", [2, 3])
def test_as_many_branches_as_inputs_are_no_batch(rows: int) -> None:
    model, x = Stacked().eval(), torch.rand(rows, 4)
    network = trace(model, x)
    assert [region.info.output_shape for region in network.regions] == [(4,), (2,)]
    assert_chain_is_the_model(model, x, network)


def test_a_norm_without_statistics_of_its_own_is_told() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(16, 2)
    )
    (note,) = trace(model, images(3, 1, 4)).untraced
    assert note.what == "1"
    assert "normalises by the batch" in note.reason


def test_a_model_that_takes_no_single_input_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    with pytest.raises(TraceError, match="a single input") as refused:
        trace(model, torch.rand(3, 4))
    assert "track_running_stats" in refused.value.remedy


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(5, 2), "can't be run on the data"),
        (nn.LSTM(4, 2, batch_first=True), "not one logits tensor"),
        (nn.Unflatten(1, (2, 2)), "not one logits tensor"),
    ],
)
def test_a_model_without_logits_is_refused(model: nn.Module, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        trace(model, torch.rand(3, 4))


@given(
    st.lists(st.sampled_from(["conv", "wide", "norm", "relu", "add", "cat", "pool", "dense"]), max_size=8),
    st.integers(0, 99),
)
def test_random_networks_equal_their_chains(words: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model = random_norms(Woven(words), seed)
    x = images(3, 2, 8, seed)
    network = trace(model, x)
    infos = network.chain().regions
    assert_chain_is_the_model(model, x, network)
    assert sum(info.params for info in infos) == sum(parameter.numel() for parameter in model.parameters())
    assert all(before.output_shape == after.input_shape for before, after in itertools.pairwise(infos))
    assert len({info.name for info in infos}) == len(infos)
    for site, region in zip(site_activations(network, x), network.regions, strict=True):
        assert tuple(site.shape[1:]) == region.info.output_shape


class Woven(nn.Module):
    """A network from a list of words: layers in sequence, skips and concatenations around them."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.words, self.layers, width = words, nn.ModuleList(), 2
        for word in words:
            layer, width = _layer(word, width)
            self.layers.append(layer)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for word, layer in zip(self.words, self.layers, strict=True):
            match word:
                case "add":
                    x = x + layer(x)
                case "cat":
                    x = torch.cat([x, layer(x)], 1)
                case "dense":
                    x = torch.relu_(torch.cat([layer(x), x], 1)) + 1
                case _:
                    x = layer(x)
        return self.fc(x.mean((2, 3)))


def _layer(word: str, width: int) -> tuple[nn.Module, int]:
    match word:
        case "conv" | "add":
            return nn.Conv2d(width, width, 3, padding=1), width
        case "wide":
            return nn.Conv2d(width, 2 * width, 1, bias=False), 2 * width
        case "cat" | "dense":
            return nn.Conv2d(width, 2, 3, padding=1), width + 2
        case "norm":
            return nn.BatchNorm2d(width), width
        case "relu":
            return nn.ReLU(inplace=True), width
        case _:
            return nn.MaxPool2d(3, stride=1, padding=1), width


def tails(model: nn.Module, x: Tensor) -> list[Tail | str]:
    return [find_tail(region.module) for region in trace(model, x).regions]


def test_tails_of_a_residual_network() -> None:
    stem, block, _, head = tails(Residual(), images(2, 1, 6))
    assert isinstance(stem, Tail)
    assert (stem.affine, stem.norm, stem.skip, stem.pre.target) == ("stem", None, None, "stem")
    assert isinstance(block, Tail)
    assert (block.affine, block.norm) == ("blocks.0.conv2", "blocks.0.bn2")
    assert block.features.target == "blocks.0.relu"
    assert block.skip is not None
    assert block.skip.op == "placeholder"
    assert isinstance(head, Tail)
    assert (head.affine, head.features.name) == ("fc", "flatten")


def test_a_tail_that_is_not_affine_says_what_it_is() -> None:
    found = tails(Depthwise(), images(2, 2, 6))
    assert found[1] == "it ends with depth (grouped Conv2d), which is not affine"
    assert "fickle (Fickle)" in str(tails(Opaque(), images(2, 1, 6))[1])


class Scaled(nn.Module):
    """Tokens through a linear layer, a layer scale, a permutation, beside a skip; as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.linear = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor([[[2.0]], [[-0.5]]]))
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = x + self.scale * self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(torch.relu(x).mean((2, 3)))


class Permuted(Scaled):
    """The same with `torch.permute`, as torchvision's own Permute calls it."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        inside = torch.permute(self.linear(torch.permute(x, (0, 2, 3, 1))), dims=[0, 3, 1, 2])
        return self.fc(torch.relu(x + self.scale * inside).mean((2, 3)))


@pytest.mark.parametrize("kind", [Scaled, Permuted])
def test_a_target_is_carried_back_through_scale_and_permutation(kind: type[Scaled]) -> None:
    model, x = kind().eval(), images(2, 2, 4)
    network = trace(model, x)
    piece = network.regions[1].module
    tail = find_tail(piece)
    assert isinstance(tail, Tail)
    assert (tail.affine, len(tail.undo), tail.norm) == ("linear", 2, None)
    with torch.no_grad():
        features, skip, pre = observer(piece, [tail.features, tail.skip, tail.pre])(network.regions[0].module(x))
        assert torch.allclose(undo(piece, tail, pre - skip), model.linear(features), atol=1e-5)


def test_a_layer_used_twice_has_no_tail() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    model, x = Twice(), torch.rand(2, 4)
    network = trace(model, x)
    piece = extract(network.teacher, *ends(network.teacher))
    assert isinstance(find_tail(piece), str)


class Normed(nn.Module):
    """Blocks whose sum goes through a norm: it can't be folded into one summand, but it need not be undone either."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.inner = nn.Linear(6, 6)
        self.norm = norm
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(self.norm(x + self.inner(x))))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.BatchNorm1d(6)])
def test_a_norm_of_a_sum_belongs_to_what_follows_the_tail(norm: nn.Module) -> None:
    found = tails(random_norms(Normed(norm)), torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert isinstance(found[1], Tail)
    assert (found[1].affine, found[1].norm, found[1].pre.name) == ("inner", None, "add")
    assert found[1].skip is not None
