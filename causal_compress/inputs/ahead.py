"""Work that is done on a thread of its own while what was made before is being used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def made_ahead(items: Iterable[T], *, count: int = 2) -> Iterator[T]:
    """The same items in the same order, made by one other thread while earlier ones are in use.

    Worth it where their user waits for something that isn't this processor, such as a GPU.

    Args:
        items: Made only there; what goes wrong there is raised here, where the item would have come.
        count: How many are made before they are asked for, at most.
    """
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        waiting = deque(thread.submit(next, source, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, source, end))
            yield item  # type: ignore[misc]  # `end` is nobody else's
    finally:
        thread.shutdown(cancel_futures=True)
