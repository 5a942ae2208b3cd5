"""Threads: one prepares the next item while another computes; several decode images together."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from cnn_jax.common import cpu

T = TypeVar("T")

# For smaller images, several threads are slower than one.
PIXELS_WORTH_A_THREAD = 96 * 96


def look_ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, each prepared by a second thread while the previous one is in use.

    An exception of `items` is raised in the place of its item. The thread ends with the iterator,
    also if the iterator is closed or dropped early.
    """
    iterator = iter(items)
    end: Any = object()  # no item is this one
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


class Workers:
    """The threads that decode the images of a split."""

    def __init__(self, pixels: float | None):
        """Takes as many threads as images of this many `pixels` are worth; None: they differ."""
        small = pixels is not None and pixels < PIXELS_WORTH_A_THREAD
        self._threads = 1 if small else cpu.cores()
        self._pool = ThreadPoolExecutor(self._threads)

    def __reduce__(self) -> tuple:
        """In another process there is one thread: each core has a process of its own."""
        return Workers, (0,)

    def each(self, work: Callable[[int], None], count: int) -> None:
        """Calls work(0) to work(count - 1); an exception of one of them is raised here."""

        def some(places: Iterable[int]) -> None:
            for i in places:
                work(i)

        if self._threads == 1:
            some(range(count))
        else:
            list(self._pool.map(some, np.array_split(np.arange(count), self._threads)))
