"""What is made on another thread: the same items in the same order, errors where they belong, nothing left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from data_sample import images, load, npz
from distill_sample import section

from causal_compress.errors import DataError
from causal_compress.inputs.ahead import made_ahead
from causal_compress.recipe import AugmentSection
from causal_compress.recover import training


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_same_items_in_the_same_order(length: int, count: int) -> None:
    assert list(made_ahead((str(number) for number in range(length)), count=count)) == [str(n) for n in range(length)]
    assert not threads()


def test_no_more_are_made_than_asked_for_and_none_twice() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = made_ahead(source(), count=3)
    assert next(items) == 0
    assert next(items) == 1
    time.sleep(0.05)
    assert made == [0, 1, 2, 3, 4]  # two were taken
    items.close()  # type: ignore[attr-defined]
    assert not threads()


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("the image 3 can't be decoded", remedy="replace it")

    seen = []
    with pytest.raises(DataError, match="image 3"):  # noqa: PT012  (what came before it counts)
        for item in made_ahead(source()):
            seen.append(item)
    assert seen == [1, 2]
    assert not threads()


def test_what_nobody_waits_for_any_more_is_not_made() -> None:
    made: list[int] = []

    def slowly() -> Iterator[int]:
        for number in range(20):
            time.sleep(0.1)
            made.append(number)
            yield number

    items = made_ahead(slowly(), count=8)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 3
    assert not threads()


def test_items_are_made_while_others_are_in_use() -> None:
    def slowly() -> Iterator[int]:
        for number in range(8):
            time.sleep(0.05)
            yield number

    def seconds(items: Iterator[int]) -> float:
        start = time.perf_counter()
        for _ in items:
            time.sleep(0.05)
        return time.perf_counter() - start

    assert seconds(made_ahead(slowly())) < 0.75 * seconds(slowly())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_batches_for_another_device_are_made_ahead_and_are_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    x, y = images()
    data = load(npz(tmp_path, x=x, y=y), augment=AugmentSection(crop_padding=1, horizontal_flip=True, rotation=10))
    course = SimpleNamespace(
        data=data,
        section=section(epochs=1, batch_size=4, intervened_share=0.0),
        seed=3,
        accelerator=SimpleNamespace(is_main_process=False, process_index=0, num_processes=1),
        device=torch.device("cpu"),
        steps_per_epoch=3,
    )
    used, own = [], []

    def noted(items: Any) -> Iterator[Any]:
        used.append(True)
        return made_ahead(items)

    def kept(_: Any, batch: Any) -> Any:
        own.append(batch.x)
        return batch

    monkeypatch.setattr(training, "made_ahead", noted)
    plain = [batch.x for batch in training._batches(cast("Any", course), 0)]
    assert not used
    course.device = torch.device(device)
    monkeypatch.setattr(training, "_own_rows", kept)
    assert len(list(training._batches(cast("Any", course), 0))) == 3
    assert used == [True] * (device != "cpu")
    assert all(torch.equal(one, other) for one, other in zip(plain, own, strict=True))
