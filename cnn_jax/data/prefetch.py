"""Prefetch: a second thread prepares the next item while the first thread computes."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def look_ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, each prepared by a second thread while the previous one is in use.

    An exception of `items` is raised in the place of its item. The thread ends with the iterator,
    also if the iterator is closed or dropped early.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item
