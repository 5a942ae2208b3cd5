"""What the images of TFDS's records and a user's own files have in common: how a split is decoded."""

import abc
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cnn_jax.common.errors import DataError
from cnn_jax.data.prefetch import Workers

CHUNK = 500
BROKEN = -1  # the label of an image that cannot be decoded

# Image uint8 [n, H, W, C], label int32 [n], and the errors of the images whose label is BROKEN.
Decoded = tuple[np.ndarray, np.ndarray, list[DataError]]


class ImageRecords(abc.ABC):
    """The examples of one split, in its order.

    Attributes:
      name: of the dataset and the split.
      class_names: in the order of the labels.
      image_shape: (H, W, C) of the decoded images.
      random_access: whether `fetch` works.
      workers: the threads that decode.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    random_access: bool
    workers: Workers

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def chunks(self) -> Iterator[Decoded]:
        """All examples in order, CHUNK at a time."""

    @abc.abstractmethod
    def decoded(self, indices: Sequence[int]) -> Decoded:
        """The examples at `indices`."""

    @abc.abstractmethod
    def check_unchanged(self, indices: Sequence[int]) -> None:
        """Compares the files of the examples with what they were when the split was opened.

        Raises:
          DataError: one has changed, or is gone; names it and the example.
        """

    def fetch(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The examples at `indices`: image and label; several threads may call it at once.

        Raises:
          DataError: an image cannot be decoded, or its file has changed; names its place.
        """
        self.check_unchanged(indices)
        image, label, errors = self.decoded(indices)
        if errors:
            raise errors[0]
        return image, label

    def problem(self, index: int) -> str:
        """Why the image at `index` cannot be decoded, with its place; empty if it can."""
        errors = self.decoded([index])[2]
        return str(errors[0]) if errors else ""

    def decode_each(self, count: int, read: Callable[[int], tuple[np.ndarray, int]]) -> Decoded:
        """Decodes `count` images; `read(i)` gives pixels and label of one or raises DataError."""
        image = np.zeros((count, *self.image_shape), np.uint8)
        label = np.full(count, BROKEN, np.int32)
        errors: dict[int, DataError] = {}

        def decode_one(i: int) -> None:
            try:
                image[i], label[i] = read(i)
            except DataError as error:
                errors[i] = error

        self.workers.each(decode_one, count)
        return image, label, [errors[i] for i in sorted(errors)]


def changed(place: str, now: tuple[int, int] | None, before: tuple[int, int] | None) -> DataError:
    """The error for a file whose size in bytes and time of change were others; None: no file."""
    what = (
        "is gone"
        if now is None
        else "was written again"
        if before is None or now[0] == before[0]
        else f"has changed, from {before[0]:,} to {now[0]:,} bytes"
    )
    return DataError(
        f"{place}: its file {what} since the run began; put it back, or train in another --workdir"
    )
