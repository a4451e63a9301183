"""Surgery on whole networks: structure, replay, and whether the closed forms are worth their trouble."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import Depthwise, Plain, Residual, Stages, images, random_norms
from torch import Tensor, nn

from causal_compress.errors import TraceError
from causal_compress.recipe import PruneSection, RewriteSection
from causal_compress.results import Candidate, Decision, Evidence, Keep, Merge, Plan, Surgery
from causal_compress.shrink.front import Front, open_front, output_kl
from causal_compress.shrink.prune import prune
from causal_compress.shrink.rewrite import rewrite
from causal_compress.shrink.surgery import Student, assemble, merges_of, narrow, replay, save_weights
from causal_compress.understand.cost import count_params
from causal_compress.understand.trace import Network, trace

NOTHING = Evidence(cka=None, same_node_share=None, ace=None, relative_error=None)


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=5)  # type: ignore[no-any-return]


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=5, width_mult=0.25)  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """A residual block with a depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        layers = nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc((x + self.block(x)).mean((2, 3)))


def loud() -> nn.Module:
    """Weights so large that the outputs are not nearly the same for all inputs."""
    model = Stages()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "plain": (Plain, (1, 4)),
    "residual": (Residual, (1, 6)),
    "stages": (loud, (1, 8)),
    "depthwise": (Depthwise, (2, 6)),
    "inverted": (Inverted, (2, 6)),
    "resnet18": (resnet18, (3, 32)),
    "mobilenet_v2": (mobilenet, (3, 32)),
}


def traced(name: str, seed: int = 0) -> Network:
    build, (channels, size) = NETWORKS[name]
    torch.manual_seed(seed)
    return trace(random_norms(build(), seed), images(2, channels, size))


def inputs_of(name: str, count: int, seed: int) -> Tensor:
    channels, size = NETWORKS[name][1]
    return images(count, channels, size, seed)


def answers(graph: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return graph(x)  # type: ignore[no-any-return]


def singles(network: Network) -> list[Merge]:
    count = len(network.regions)
    return [Merge(first=i, last=i, representative=i, adapter=None) for i in range(count)]


def merging(network: Network, first: int, last: int) -> list[Merge]:
    """All regions stay but some, for which the first one stands."""
    merge = Merge(first=first, last=last, representative=first, adapter=None)
    return [*singles(network)[:first], merge, *singles(network)[last + 1 :]]


def planned(
    merges: list[Merge], widths: dict[int, dict[str, int]] | None = None, shares: dict[int, float] | None = None
) -> Plan:
    """A plan as if it had been measured; widths and shares of inputs kept by the first region of a decision."""
    decisions = []
    for merge in merges:
        candidate = Candidate(
            first=merge.first,
            last=merge.last,
            representative=merge.representative,
            adapter=merge.adapter,
            inputs_kept=(shares or {}).get(merge.first, 1.0),
            widths=(widths or {}).get(merge.first, {}),
            macs_fixed=1.0,
            macs_out=0.0,
            params_fixed=1.0,
            params_out=0.0,
            harm_kl=0.0,
            harm_stderr=0.0,
            relative_error=0.0,
        )
        decisions.append(
            Decision(
                node=f"{merge.first}..{merge.last}",
                kind="keep",
                candidate=candidate,
                outputs_kept=1.0,
                evidence=NOTHING,
                predicted_harm_kl=0.0,
                macs_before=1,
                macs_after=1,
                params_before=1,
                params_after=1,
                refused=(),
            )
        )
    return Plan(decisions=tuple(decisions), macs=1.0, params=1.0, predicted_harm_kl=0.0, front=(), skipped=())


def front_at_input(network: Network, name: str) -> Front:
    fit, heldout = inputs_of(name, 256, 1).split(32), inputs_of(name, 64, 2).split(32)
    return open_front(network, fit, heldout, 4.0)


def harm(network: Network, graph: nn.Module, name: str) -> float:
    """Output KL on inputs that no refit has seen [nats]."""
    x = inputs_of(name, 128, 3)
    return output_kl([answers(graph, x)], [torch.log_softmax(answers(network.graph, x) / 4.0, 1)], 4.0)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_merges_the_student_is_the_teacher(name: str) -> None:
    network = traced(name)
    student = assemble(network, singles(network))
    x = inputs_of(name, 3, 5)
    assert torch.equal(answers(student.graph, x), answers(network.graph, x))
    assert unchanged(student.graph, weights_of(network.graph))
    assert student.ends == tuple(range(len(network.regions)))


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 1000), st.data())
def test_a_chain_with_gaps_or_overlaps_is_refused_and_any_other_keeps_the_shape(
    blocks: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    network = trace(random_norms(Residual(blocks=blocks), seed), images(2, 1, 6))
    first = data.draw(st.integers(1, blocks))
    last = data.draw(st.integers(first, blocks))
    merges = merging(network, first, last)
    student = assemble(network, merges)
    assert answers(student.graph, images(3, 1, 6)).shape == (3, 3)
    assert count_params(student.graph) <= count_params(network.graph)
    with pytest.raises(TraceError, match="does not fit this network"):
        assemble(network, [*merges[:first], *merges[first + 1 :]])


def test_a_refitted_representative_is_better_than_a_block_that_is_merely_left_out() -> None:
    for name, network in (("residual", traced("residual")), ("resnet18", traced("resnet18"))):
        plan = planned(merging(network, 1, 2))
        student, changes, skips = rewrite(network, plan, front_at_input(network, name), RewriteSection(inputs=256))
        left_out = assemble(network, merges_of(plan))  # the second block is the identity, all else as it was
        assert harm(network, student.graph, name) < 0.7 * harm(network, left_out.graph, name)
        assert not skips
        assert [change.node for change in changes] == ["1..2"]
        assert changes[0].relative_error is not None
        assert changes[0].relative_error < 1


@pytest.mark.parametrize(
    ("name", "producer", "kept", "inside"), [("residual", "blocks.0.conv1", 3, True), ("stages", "down", 2, False)]
)
def test_a_narrowed_layer_with_refitted_readers_is_better_than_one_without(
    name: str, producer: str, kept: int, inside: bool
) -> None:
    network = traced(name)
    holder = next(r.info.index for r in network.regions if producer in r.info.modules)
    widths, shares = ({holder: {producer: kept}}, {}) if inside else ({}, {holder + 1: 0.5})
    student, changes, _ = narrowed(network, planned(singles(network), widths, shares), name)
    (keep,) = student.surgery.keeps
    assert (keep.producer, len(keep.channels)) == (producer, kept)
    assert any(producer in change.what for change in changes)
    bare = assemble(network, singles(network))
    narrow(bare.graph, network.example_input, student.surgery.keeps)
    assert count_params(bare.graph) <= count_params(student.graph) < count_params(network.graph)
    assert harm(network, student.graph, name) < 0.7 * harm(network, bare.graph, name)


def narrowed(network: Network, plan: Plan, name: str) -> tuple[Student, tuple, tuple]:  # type: ignore[type-arg]
    student = assemble(network, merges_of(plan))
    return prune(student, plan, front_at_input(network, name), PruneSection(inputs=256))


def both(network: Network) -> tuple[Plan, Student]:
    """A residual network whose blocks 1 and 2 merge and whose block 3 is narrowed."""
    plan = planned(merging(network, 1, 2), {3: {"blocks.2.conv1": 3}})
    student, _, _ = rewrite(network, plan, front_at_input(network, "residual"), RewriteSection(inputs=256))
    front = front_at_input(network, "residual")
    return plan, prune(student, plan, front, PruneSection(inputs=256))[0]


def deep(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return trace(random_norms(Residual(blocks=3), seed), images(2, 1, 6))


def test_replay_on_the_bare_architecture_gives_the_same_network() -> None:
    _, student = both(deep())
    again = replay(deep(seed=9), student.surgery, weights_of(student.graph))
    x = inputs_of("residual", 7, 5)
    assert torch.equal(answers(again.graph, x), answers(student.graph, x))
    assert again.surgery == student.surgery
    assert again.ends == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "producer"), [("resnet18", "layer2.0.conv1"), ("mobilenet_v2", "features.4.conv.0.0")]
)
def test_replay_cuts_real_architectures_at_the_same_channels(name: str, producer: str) -> None:
    network = traced(name)
    student = assemble(network, singles(network))
    surgery = Surgery(merges=student.surgery.merges, keeps=(Keep(producer=producer, channels=(0, 2, 5, 7)),))
    narrow(student.graph, network.example_input, surgery.keeps)
    again = replay(traced(name, seed=3), surgery, weights_of(student.graph))
    x = inputs_of(name, 2, 5)
    assert torch.equal(answers(again.graph, x), answers(student.graph, x))
    assert count_params(student.graph) < count_params(network.graph)


def test_weights_of_another_surgery_are_refused() -> None:
    network = deep()
    _, student = both(network)
    with pytest.raises(TraceError, match="weights do not fit"):
        replay(network, Surgery(merges=tuple(singles(network))), weights_of(student.graph))


def test_nothing_that_is_passed_in_changes() -> None:
    network = deep()
    teacher, modes = weights_of(network.graph), [module.training for module in network.graph.modules()]
    front = front_at_input(network, "residual")
    chunks = [chunk.clone() for chunk in (*front.student, *front.heldout)]
    given_chunks = [*front.student, *front.heldout]
    plan = planned(merging(network, 1, 2), {3: {"blocks.2.conv1": 3}})
    copy_of_plan = copy.deepcopy(plan)
    student, _, _ = rewrite(network, plan, front, RewriteSection(inputs=256))
    before = weights_of(student.graph)
    prune(student, plan, front_at_input(network, "residual"), PruneSection(inputs=256))
    assert unchanged(student.graph, before)
    assert unchanged(network.graph, teacher)
    assert [module.training for module in network.graph.modules()] == modes
    assert all(torch.equal(now, then) for now, then in zip(given_chunks, chunks, strict=True))
    assert plan == copy_of_plan


def test_a_depthwise_convolution_can_be_narrowed_to_one_channel() -> None:
    """With one channel left it looks like any convolution, but nothing in the teacher is there to refit it to."""
    network = traced("inverted")
    holder = next(r.info.index for r in network.regions if "block.0" in r.info.modules)
    student, changes, _ = narrowed(network, planned(singles(network), {holder: {"block.0": 1}}), "inverted")
    assert student.graph.get_submodule("block.2").weight.shape == (1, 1, 3, 3)
    assert changes[0].what == "1 of 6 channels of block.0 kept"
    assert changes[0].relative_error is not None
    assert changes[0].relative_error < 1


def test_weights_can_be_read_by_whom_any_other_file_can_be(tmp_path: Path) -> None:
    model = Plain()
    mask = os.umask(0o022)
    try:
        save_weights(model, tmp_path / "w.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    stored = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


def test_the_demonstrations_teacher_can_be_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from causal_compress import demo

    monkeypatch.setattr(demo, "train", lambda data, **_: demo.digits_net(width=4, blocks=1))
    monkeypatch.setattr(demo, "compress", lambda recipe, out, **_: None)
    mask = os.umask(0o022)
    try:
        demo.demo(tmp_path)
    finally:
        os.umask(mask)
    assert (tmp_path / "teacher.safetensors").stat().st_mode & 0o777 == 0o644
