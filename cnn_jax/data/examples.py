"""The examples of a split: in memory or decoded on demand, with their labels in any order."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator

import numpy as np

from cnn_jax.data import folders, workers
from cnn_jax.data.prefetch import look_ahead
from cnn_jax.data.records import ImageRecords

_CHUNK = 500


class Examples(typing.Protocol):
    """A split: `examples[indices]` is {"image": uint8 [n, H, W, C], "label": int32 [n]}.

    `files` has the paths of a user's own images, relative to their folder; it is empty for others.
    `skipped` others of the split cannot be decoded.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def skipped(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...

    def take(self, indices: np.ndarray) -> "Examples": ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Examples that are all decoded in memory; `skipped` others of the split cannot be decoded."""

    image: np.ndarray
    label: np.ndarray
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()
    skipped: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image.shape[1:]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.image[indices], "label": self.label[indices]}

    def take(self, indices: np.ndarray) -> "InMemory":
        files = tuple(self.files[i] for i in indices) if self.files else ()
        image, label = self.image[indices], self.label[indices]
        return dataclasses.replace(self, image=image, label=label, files=files)


@dataclasses.dataclass(frozen=True)
class OnDemand:
    """Examples that are read and decoded when they are requested.

    Attributes:
      records: reads and decodes them.
      indices: of the examples in `records`, int64 [N].
      workers: how many processes do so for `in_order`; 0: threads of this process.
      skipped: the number of others that cannot be decoded.
    """

    records: ImageRecords
    indices: np.ndarray
    workers: int
    skipped: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.records.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.records.image_shape

    @property
    def files(self) -> tuple[str, ...]:
        if not isinstance(self.records, folders.FileRecords):
            return ()
        return tuple(self.records.files[i] for i in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        image, label = self.records.fetch(self.indices[indices].tolist())
        return {"image": image, "label": label}

    def take(self, indices: np.ndarray) -> "OnDemand":
        return dataclasses.replace(self, indices=self.indices[indices])


@dataclasses.dataclass(frozen=True)
class Altered:
    """Examples whose batches are altered when they are read; a subclass says how.

    Attributes:
      examples: the original ones.
    """

    examples: Examples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.examples.image_shape

    @property
    def files(self) -> tuple[str, ...]:
        return self.examples.files

    @property
    def skipped(self) -> int:
        return self.examples.skipped

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: np.ndarray) -> typing.Self:
        return dataclasses.replace(self, examples=self.examples.take(indices))


@dataclasses.dataclass(frozen=True)
class Relabelled(Altered):
    """Examples with labels in another order.

    Attributes:
      class_names: in the order of the new labels.
      new_label: int32 [classes of `examples`], by original label.
    """

    class_names: tuple[str, ...]
    new_label: np.ndarray

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.relabelled(self.examples[indices])

    def relabelled(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of `examples` with the new labels."""
        return batch | {"label": self.new_label[batch["label"]]}


def with_classes(examples: Examples, class_names: tuple[str, ...]) -> Examples:
    """`examples` with labels in the order of `class_names`, which must include all of theirs."""
    if examples.class_names == class_names[: len(examples.class_names)]:
        return examples
    new_label = np.array([class_names.index(name) for name in examples.class_names], np.int32)
    if isinstance(examples, InMemory):
        label = new_label[examples.label]
        return dataclasses.replace(examples, label=label, class_names=class_names)
    return Relabelled(examples, class_names, new_label)


def in_order(examples: Examples, batches: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """`examples[indices]` for the indices of each batch; what must be decoded is decoded ahead."""
    if isinstance(examples, InMemory):
        return map(examples.__getitem__, batches)
    if isinstance(examples, Relabelled):
        return map(examples.relabelled, in_order(examples.examples, batches))
    if isinstance(examples, OnDemand) and examples.workers:
        indices = map(examples.indices.__getitem__, batches)
        found = workers.in_order(examples.records, indices, examples.workers)
        return ({"image": image, "label": label} for image, label in found)
    return look_ahead(map(examples.__getitem__, batches))


def chunks(examples: Examples) -> Iterator[dict[str, np.ndarray]]:
    """All examples in order, a few at a time."""
    starts = range(0, len(examples), _CHUNK)
    return in_order(examples, (np.arange(i, min(i + _CHUNK, len(examples))) for i in starts))
