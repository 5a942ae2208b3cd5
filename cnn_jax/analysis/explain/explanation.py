"""What an explanation consists of, for the terminal and for a picture."""

import dataclasses

import numpy as np

from cnn_jax.models.receptive_field import Field


@dataclasses.dataclass(frozen=True)
class Grid:
    """Numbers in rows and columns.

    Attributes:
      title: what they are.
      values: [h, w].
      sign: drawn before the grid, such as "=".
      marked: how many rows and columns, from the first, belong to the first output.
      padding: zeros before and after the data, on each side.
    """

    title: str
    values: np.ndarray
    sign: str = ""
    marked: tuple[int, int] = (0, 0)
    padding: tuple[int, int] = (0, 0)

    def is_padding(self, row: int, column: int) -> bool:
        before, after = self.padding
        height, width = self.values.shape
        return not (before <= row < height - after and before <= column < width - after)

    def is_marked(self, row: int, column: int) -> bool:
        return row < self.marked[0] and column < self.marked[1]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The content of an explanation.

    Attributes:
      title: in one line.
      rows: grids that stand beside each other.
      lines: the arithmetic.
      table: cells of text; its first row is the header.
      windows: for the picture, a name and what an output sees, of each layer.
      image: height and width of the image that they see.
    """

    title: str
    rows: tuple[tuple[Grid, ...], ...] = ()
    lines: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    windows: tuple[tuple[str, Field], ...] = ()
    image: tuple[int, int] = (0, 0)


def pair(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]}x{sizes[1]}"


def number(value: float) -> str:
    """A whole number as text; a negative one in brackets, to stand in a product."""
    return f"({value:g})" if value < 0 else f"{value:g}"


def whole_numbers(size: int, kernel: int, channels: int, filters: int) -> tuple[np.ndarray, ...]:
    """Data [size, size, channels], kernel and bias, whose sums float32 holds exactly."""
    random = np.random.default_rng(0)
    data = random.integers(0, 10, (size, size, channels))
    weights = random.integers(-2, 3, (kernel, kernel, channels, filters))
    bias = random.integers(1, 4, filters)
    return data.astype(np.float32), weights.astype(np.float32), bias.astype(np.float32)
