"""Weights that are computed, or used in several places, and norms without any: what surgery gets instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from tiny import Fickle, Plain, Residual, images, random_norms
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from causal_compress.recipe import PlanSection
from causal_compress.results import Keep, Merge
from causal_compress.shrink.channels import dependencies_of, remove_channels
from causal_compress.shrink.surgery import assemble, copied, replay
from causal_compress.understand.cost import count_params
from causal_compress.understand.network import is_excluded
from causal_compress.understand.trace import Network, site_activations, trace


def pruned(layer: nn.Module) -> nn.Module:
    """A layer with masks over masks, as iterative pruning leaves them."""
    prune.random_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)
    return layer


_COMPUTED: list[Callable[[nn.Module], nn.Module]] = [
    weight_norm,
    spectral_norm,
    pruned,
    pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")),
    nn.utils.spectral_norm,
]


@pytest.mark.parametrize("form", _COMPUTED)
def test_weights_that_are_computed_on_each_call_become_plain_ones(form: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(form(nn.Conv2d(3, 5, 3)), nn.Flatten(), form(nn.Linear(180, 4))).eval()
    x = torch.randn(3, 3, 8, 8)
    network = trace(model, x)
    torch.testing.assert_close(network.graph(x), model(x))
    assert [type(layer) for layer in network.graph.children()] == [nn.Conv2d, nn.Flatten, nn.Linear]
    assert isinstance(network.graph.get_parameter("0.weight"), nn.Parameter)
    assert sorted(network.graph.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert "0.weight" not in model.state_dict()  # left alone
    network.graph.load_state_dict(network.graph.state_dict())  # as surgery is repeated: no hook asks for more


class Sharing(nn.Module):
    """A stem, something that uses weights in several places, a classifier; subclasses write `inner`."""

    shared: tuple[str, ...] = ("conv",)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3, 2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def inner(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(torch.relu(self.stem(x))).mean((2, 3)))


class Recurrent(Sharing):
    """One convolution three times, a region each."""

    def inner(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.conv(x))
        return x


class TwiceInside(Sharing):
    """One convolution twice, inside one region."""

    def inner(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.conv(x)))


class ReadElsewhere(Sharing):
    """A convolution whose weight a function reads as well."""

    shared = ("conv", "conv.weight")

    def inner(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.relu(self.conv(x)), self.conv.weight, padding=1)


class Tied(Sharing):
    """Two convolutions with one weight."""

    shared = ("conv", "twin")

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 3, 3, padding=1)
        self.twin.weight = self.conv.weight

    def inner(self, x: Tensor) -> Tensor:
        return torch.relu(self.twin(torch.relu(self.conv(x))))


class Bare(Sharing):
    """A parameter that two regions read, and what is computed from it."""

    shared = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(3, 1, 1))

    def inner(self, x: Tensor) -> Tensor:
        gain = self.gain.exp()
        return torch.relu(self.conv(torch.relu(x) * gain)) * gain


class Normed(Sharing):
    """A batch norm, and an activation with a weight, that are called twice."""

    shared = ("norm", "act")

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.PReLU(init=0.1)

    def inner(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.act(self.norm(x)))))


class Whole(Sharing):
    """A layer that torch.fx can't follow, called twice."""

    shared = ("fickle",)

    def __init__(self) -> None:
        super().__init__()
        self.fickle = Fickle(3)

    def inner(self, x: Tensor) -> Tensor:
        return self.fickle(self.conv(self.fickle(x)))


KINDS = [Recurrent, TwiceInside, ReadElsewhere, Tied, Bare, Normed, Whole]


def shared(kind: type[Sharing]) -> tuple[nn.Module, Tensor, Network]:
    torch.manual_seed(0)
    model, x = random_norms(kind()), images(3, 1, 6)
    return model, x, trace(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_each_region_has_weights_that_nothing_else_uses(kind: type[Sharing]) -> None:
    model, x, network = shared(kind)
    with torch.no_grad():
        torch.testing.assert_close(network.graph(x), model(x))
        torch.testing.assert_close(site_activations(network, x)[-1], model(x))
    owned = [{id(p) for p in region.module.parameters()} for region in network.regions]
    assert not any(one & other for one, other in combinations(owned, 2))
    assert set().union(*owned) == {id(parameter) for parameter in network.graph.parameters()}
    names = [name for name, _ in network.graph.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set().union(*owned))
    calls = Counter(str(node.target) for node in network.graph.graph.nodes if node.op == "call_module")
    weighted = {path for path in calls if list(network.graph.get_submodule(path).parameters())}
    assert all(calls[path] == 1 for path in weighted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_counts_what_it_shares_once_and_it_is_told(kind: type[Sharing]) -> None:
    model, x, network = shared(kind)
    assert count_params(network.teacher) == count_params(model)
    assert set(network.teacher.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network.teacher(x), model(x))
    told = [skip.what for skip in network.chain().untraced if "places" in skip.reason]
    assert sorted(told) == sorted(kind.shared)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_changed_its_copies_apart_is_replayed(kind: type[Sharing]) -> None:
    model, x, network = shared(kind)
    merges = [Merge(first=at, last=at, representative=at, adapter=None) for at in range(len(network.regions))]
    student = copied(assemble(network, merges))
    with torch.no_grad():
        torch.testing.assert_close(student.graph(x), model(x))
        for parameter in student.graph.parameters():
            parameter.add_(torch.rand_like(parameter))
        y = x
        for part in student.parts:
            y = part(y)
        torch.testing.assert_close(student.graph(x), y)
        weights = {name: value.clone() for name, value in student.graph.state_dict().items()}
        again = replay(trace(kind(), torch.zeros(2, 1, 6, 6)), student.surgery, weights)
        torch.testing.assert_close(again.graph(x), y)


def test_a_pattern_that_names_a_shared_layer_speaks_for_all_its_uses() -> None:
    _, _, network = shared(Recurrent)
    assert [region.info.name for region in network.regions] == ["stem", "conv.use1", "conv.use2", "conv.use3", "fc"]
    assert all(is_excluded(f"conv.use{use}", PlanSection(exclude=("conv",))) for use in (1, 2, 3))


@pytest.mark.parametrize("model", [Plain(), Residual()])
def test_what_has_no_weights_may_be_called_in_many_places(model: nn.Module) -> None:
    network = trace(model, images(2, 1, 4))
    assert network.original is None
    assert network.untraced == ()
    assert "relu.use1" not in dict(network.graph.named_modules())


def test_a_norm_without_scale_and_shift_can_be_narrowed_and_is_not_counted_as_larger() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(16, 2)).eval()
    model[1].running_mean.normal_()
    x = images(3, 1, 4)
    network = trace(model, x)
    norm = network.graph.get_submodule("1")
    assert torch.equal(network.graph(x), model(x))
    assert count_params(network.teacher) == count_params(model)
    assert network.untraced == ()
    assert (norm.affine, len(norm.weight), len(norm.bias)) == (True, 4, 4)
    remove_channels(network.graph, dependencies_of(network.graph, x), Keep(producer="0", channels=(0, 2)))
    assert (len(norm.weight), len(norm.bias), len(norm.running_mean)) == (2, 2, 2)
    assert network.graph(x).shape == (3, 2)
