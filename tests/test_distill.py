"""Distillation on small networks: what the student learns from, what is left alone, what is refused."""

import copy
from pathlib import Path
from typing import Any

import distill_sample
import pytest
import torch
from distill_sample import BOUNDARY, CLASSES, SIZE, Net, Rows, data, network, run, same, section
from torch import Tensor, fx, nn

from causal_compress.errors import DataError, NumericalError, TraceError
from causal_compress.recover import training
from causal_compress.recover.losses import boundary_loss, kd_loss
from causal_compress.recover.networks import answer, observed

teacher, student = distill_sample.teacher, distill_sample.student  # fixtures


def divergence(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return kd_loss(student(x), teacher(x), 1.0).item()


def test_student_approaches_the_teacher(student: nn.Module, teacher: nn.Module) -> None:
    source = data(teacher)
    trained, result = run(student, teacher, section(epochs=8), data=source)
    assert result.epochs[-1].loss < 0.7 * result.epochs[0].loss
    assert divergence(trained, teacher, source.validation.x) < 0.5 * divergence(student, teacher, source.validation.x)
    assert [epoch.epoch for epoch in result.epochs] == list(range(1, 9))
    assert result.epochs[-1].learning_rate < 0.05 * section().learning_rate
    assert (result.validation.n, result.precision, result.averaged, result.processes) == (64, "fp32", True, 1)
    assert result.images_per_second > 0


def test_nothing_passed_in_is_changed(student: nn.Module, teacher: nn.Module) -> None:
    source = data(teacher)
    teacher.train()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), student.graph.python_code("self").src))
    random_state = torch.random.get_rng_state()
    trained, _ = run(student, teacher, section(epochs=1), data=source)
    assert same(before[0], student.state_dict())
    assert same(before[1], teacher.state_dict())
    assert student.graph.python_code("self").src == before[2]
    assert teacher.training
    assert not student.training
    assert not trained.training
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in [*student.parameters(), *teacher.parameters()])
    assert isinstance(trained(torch.randn(2, 2, SIZE, SIZE)), Tensor)


def test_no_epochs_give_an_equal_copy(student: nn.Module, teacher: nn.Module) -> None:
    trained, result = run(student, teacher, section(epochs=0))
    assert trained is not student
    assert same(trained.state_dict(), student.state_dict())
    assert (result.epochs, result.averaged, result.images_per_second) == ((), False, 0.0)
    assert result.validation.n == 64


def test_nan_stops_before_the_step(student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data(teacher)
    source.train.x[5] = float("nan")
    seen: list[dict[str, Tensor]] = []
    prepare = training.prepare

    def remember(course: Any, watched: nn.Module) -> Any:
        learner = prepare(course, watched)
        for optimizer in learner.optimizers:
            optimizer.optimizer.register_step_post_hook(
                lambda *_: seen.append(copy.deepcopy(learner.student.state_dict()))
            )
        return learner

    monkeypatch.setattr("causal_compress.recover.distill.prepare", remember)
    with pytest.raises(NumericalError, match=r"distill.*epoch 1, step \d+ of 4") as caught:
        run(student, teacher, section(epochs=1), data=source)
    assert "distill.learning_rate" in caught.value.remedy
    assert all(weights["conv.weight"].isfinite().all() for weights in seen)


def test_boundaries_are_part_of_the_loss(student: nn.Module, teacher: nn.Module) -> None:
    source = data(teacher)
    _, without = run(student, teacher, section(epochs=1), boundaries=())
    pulled, with_one = run(student, teacher, section(epochs=6, boundary_weight=20.0))
    free, _ = run(student, teacher, section(epochs=6), boundaries=())
    assert with_one.epochs[0].loss > without.epochs[0].loss + 1.0

    def distance(net: nn.Module) -> float:
        watched = [observed(each, ["relu_1"], role="student").eval() for each in (net, teacher)]
        return boundary_loss(*(answer(each, source.validation.x)[1] for each in watched)).item()

    assert distance(pulled) < distance(free)


@pytest.mark.parametrize(("share", "changed"), [(0.0, 0), (0.25, 8), (0.5, 16)])
def test_share_of_each_batch_is_intervened_and_has_no_label(
    student: nn.Module, teacher: nn.Module, share: float, changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = data(teacher)
    seen: list[Any] = []
    loss = training._loss

    def remember(course: Any, learner: Any, batch: Any, step: int) -> Tensor:
        seen.append(batch)
        return loss(course, learner, batch, step)

    monkeypatch.setattr(training, "_loss", remember)
    run(student, teacher, section(epochs=1, intervened_share=share), data=source)
    whole = {tuple(row.flatten().tolist()) for row in source.train.x}
    for batch in seen:
        untouched = torch.tensor([tuple(row.flatten().tolist()) in whole for row in batch.x])
        assert int((~untouched).sum()) == changed
        assert torch.equal(untouched, batch.counted)


def test_interventions_come_in_every_size_that_is_asked_for(
    student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []
    intervened = training.intervened

    def remember(x: Tensor, features: Any, *, fraction: float, **how: Any) -> Tensor:
        seen.append((len(x), fraction))
        return intervened(x, features, fraction=fraction, **how)

    monkeypatch.setattr(training, "intervened", remember)
    sizes = section(epochs=1, intervened_share=0.5, intervened_fractions=[0.1, 0.5, 1.0])
    run(student, teacher, sizes, data=data(teacher))
    assert seen == [(6, 0.1), (5, 0.5), (5, 1.0)] * 4


def test_every_epoch_and_seed_has_its_own_batches(
    student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = training._loss

    def remember(course: Any, learner: Any, batch: Any, step: int) -> Tensor:
        seen.append(batch.x)
        return loss(course, learner, batch, step)

    monkeypatch.setattr(training, "_loss", remember)
    for seed in (0, 0, 1):
        run(student, teacher, section(epochs=2), seed=seed)
    first, second, again, *_ = (torch.cat(seen[start : start + 4]) for start in range(0, len(seen), 4))
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat(seen[16:20]))


@pytest.mark.parametrize(("boundaries", "epochs_taught"), [(BOUNDARY, 3), ((), 2)])  # watched in the first third
def test_views_come_again_and_the_teacher_is_asked_once_for_each(
    student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, boundaries: Any, epochs_taught: int
) -> None:
    seen: list[Tensor] = []
    asked: list[int] = []
    loss, ask = training._loss, training.answer

    def remember(course: Any, learner: Any, batch: Any, step: int) -> Tensor:
        seen.append(batch.x)
        return loss(course, learner, batch, step)

    def count(network: nn.Module, x: Tensor) -> Any:
        asked.append(not network.training and len(x) == 32)
        return ask(network, x)

    monkeypatch.setattr(training, "_loss", remember)
    monkeypatch.setattr(training, "answer", count)
    fresh, _ = run(student, teacher, section(epochs=9, views=2), boundaries=boundaries)
    epochs = [torch.cat(seen[start : start + 4]) for start in range(0, len(seen), 4)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[5])
    assert not torch.equal(epochs[0], epochs[1])
    assert sum(asked) == 4 * epochs_taught
    if not boundaries:
        monkeypatch.setattr(training, "_taught", lambda course, batch, inside: (ask(course.teacher, batch.x)[0], ()))
        again, _ = run(student, teacher, section(epochs=9, views=2), boundaries=())
        assert same(fresh.state_dict(), again.state_dict())


@pytest.mark.parametrize("views", [1, 2])
def test_no_row_is_left_over_where_epochs_come_again(
    student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    seen: list[Tensor] = []
    loss = training._loss

    def remember(course: Any, learner: Any, batch: Any, step: int) -> Tensor:
        seen.append(batch.x)
        return loss(course, learner, batch, step)

    monkeypatch.setattr(training, "_loss", remember)
    rows = data(teacher)
    rows.train = Rows(rows.train.x[:60], rows.train.labels[:60])
    run(student, teacher, section(epochs=2, views=views, intervened_share=0.0), data=rows, boundaries=())
    assert [len(x) for x in seen] == [32, 32, 32, 32]
    assert len(torch.cat(seen[:2]).flatten(1).unique(dim=0)) == 60


def test_norms_for_training_leave_the_structure_and_are_resumed(teacher: nn.Module, tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, network(6, 1).head.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    torch.manual_seed(0)
    bare = fx.symbolic_trace(Bare().eval())
    before = copy.deepcopy(bare.state_dict())
    normed, _ = run(bare, teacher, section(norms=True), boundaries=())
    usual, _ = run(bare, teacher, section(norms=False), boundaries=())
    assert same(bare.state_dict(), before)
    assert normed.state_dict().keys() == before.keys()
    assert not same(normed.state_dict(), usual.state_dict())
    again, _ = run(bare, teacher, section(norms=True), boundaries=(), progress_dir=tmp_path)
    assert same(normed.state_dict(), again.state_dict())


def test_dropout_rests(student: nn.Module, teacher: nn.Module) -> None:
    dropping = nn.Sequential(copy.deepcopy(student), nn.Dropout(0.5)).eval()
    with_it = run(dropping, teacher, section(epochs=2), boundaries=())[0]
    without = run(student, teacher, section(epochs=2), boundaries=())[0]
    assert same(with_it[0].state_dict(), without.state_dict())


def test_dropout_inside_attention_rests_too() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).train()
    training._rest_dropout(attention)
    x = torch.randn(2, 3, 4)
    answers = [attention(x, x, x)[0] for _ in range(2)]
    assert torch.equal(*answers)
    answers[0].sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())


def test_long_gradients_are_shortened(student: nn.Module, teacher: nn.Module) -> None:
    def moved(clip: float | None) -> float:
        trained = run(student, teacher, section(epochs=1, optimizer="sgd", weight_decay=0.0, ema=0.0, clip_norm=clip))[
            0
        ]
        before = dict(student.named_parameters())
        return sum((p - before[name]).norm().item() for name, p in trained.named_parameters())

    assert moved(1e-6) < 1e-5 < 1e-2 < moved(1e6) == moved(None)


def test_a_student_that_answers_all_alike_is_refused(student: nn.Module, teacher: nn.Module) -> None:
    with torch.no_grad():
        student.head.weight.zero_()
        student.head.bias.zero_()
        student.head.bias[data(teacher).validation.labels.bincount(minlength=CLASSES).argmin()] = 1.0
    with pytest.raises(NumericalError, match="the same class") as caught:
        run(student, teacher, section(epochs=1, learning_rate=1e-9))
    assert "after epoch 1 it is right on" in caught.value.found
    assert "distill.learning_rate (now 1e-09)" in caught.value.remedy


def test_averaged_weights_differ_from_the_last_ones(student: nn.Module, teacher: nn.Module) -> None:
    averaged, told = run(student, teacher, section(ema=0.9))
    last, told_last = run(student, teacher, section(ema=0.0))
    assert (told.averaged, told_last.averaged) == (True, False)
    assert [epoch.loss for epoch in told.epochs] == [epoch.loss for epoch in told_last.epochs]
    assert not torch.allclose(averaged.conv.weight, last.conv.weight, atol=1e-5)
    assert not torch.allclose(averaged.bn.running_mean, last.bn.running_mean, atol=1e-5)
    assert averaged.bn.num_batches_tracked == last.bn.num_batches_tracked == 12


def test_norms_and_biases_do_not_decay(student: nn.Module, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training, "_loss", lambda _, learner, *__: 0.0 * sum(p.sum() for p in learner.student.parameters())
    )
    trained, _ = run(student, teacher, section(epochs=1, optimizer="sgd", weight_decay=0.5, ema=0.0))
    assert (trained.conv.weight.abs() < student.conv.weight.abs()).all()
    assert torch.equal(trained.bn.weight, student.bn.weight)
    assert torch.equal(trained.head.bias, student.head.bias)


def test_bf16_is_used_when_asked_for(student: nn.Module, teacher: nn.Module) -> None:
    trained, result = run(student, teacher, section(epochs=2, precision="bf16"))
    assert result.precision == "bf16"
    assert result.epochs[1].loss < result.epochs[0].loss
    assert trained.conv.weight.dtype == torch.float32


def test_untraced_networks_learn_without_boundaries(teacher: nn.Module) -> None:
    torch.manual_seed(3)
    plain = Net(6)
    trained, result = run(plain, Net(12).eval(), section(epochs=3), boundaries=(), data=data(teacher))
    assert isinstance(trained, Net)
    assert trained.training
    assert result.epochs[-1].loss < result.epochs[0].loss


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [((("nowhere", "relu_1"),), "student has no graph nodes nowhere"), ((("relu", "relu"),), "differ in shape")],
)
def test_wrong_boundaries_are_refused(
    student: nn.Module, teacher: nn.Module, boundaries: tuple[tuple[str, str], ...], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        run(student, teacher, section(), boundaries=boundaries)


def test_batches_of_one_are_refused(student: nn.Module, teacher: nn.Module) -> None:
    with pytest.raises(DataError, match="too small"):
        run(student, teacher, section(batch_size=1))
