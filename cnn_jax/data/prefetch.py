"""One item ahead: input is prepared by a second thread while the first one computes."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def look_ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, each made by a thread of its own while the one before it is in use.

    An exception of `items` is raised where its item would have come. The thread ends with the
    iterator, also when that is closed or dropped half-way.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item
