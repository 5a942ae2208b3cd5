"""Tuples of two, such as (height, width), from what is not known to have that length."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def pair(values: Iterable[T]) -> tuple[T, T]:
    """The two values.

    Raises:
      ValueError: there are not two.
    """
    first, second = values
    return first, second
