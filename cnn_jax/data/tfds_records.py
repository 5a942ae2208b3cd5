"""The records of a prepared TFDS dataset: read, parsed, decoded, checked.

A record is a serialised tf.train.Example with an encoded image and a label. array_record files are
read in any order and without TensorFlow; TFRECORD files need TensorFlow and are read sequentially.
"""

import bisect
import contextlib
import io
import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cnn_jax.common import decode
from cnn_jax.common.errors import DataError
from cnn_jax.data import buckets, tfds_builder
from cnn_jax.data.prefetch import Workers, look_ahead
from cnn_jax.data.records import CHUNK, Decoded, ImageRecords, changed

if TYPE_CHECKING:  # it imports JAX, which processes that only decode images do not need
    from cnn_jax.config import DataConfig


def _shards(builder: Any, name: str, split: str, field: str) -> Any:
    """The files and the parts of them that `split` of the dataset `name` consists of."""
    with tfds_builder.quiet():
        try:
            return builder.info.splits[split].file_instructions
        except Exception as error:  # TFDS raises KeyError, ValueError, AssertionError, ...
            known, reason = ", ".join(builder.info.splits), str(error).partition("\n")[0]
            reason = "" if reason.startswith("Unknown split") else f" ({reason})"
            raise DataError(
                f"{field}={split}: must be a split of {name} ({known}) or a slice of one, "
                f"such as train[:10%]{reason}"
            ) from None


class Records(ImageRecords):
    """The examples of one split, in the order of its files."""

    def __init__(self, builder: Any, data: "DataConfig", split: str, field: str = "split"):
        """Opens `split` of a prepared `builder`; errors name it as `field`.

        Raises:
          DataError: there is no such split, it is empty, its files are absent or in another format.
        """
        self.name = f"{data.name}/{split}"
        self.folder = tfds_builder.shown(builder.data_dir)
        self.layout = tfds_builder.layout(builder, data)
        self.class_names, self.image_shape = self.layout.class_names, self.layout.image_shape
        file_format = builder.info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            raise DataError(
                f"{self.folder}: its files have the format {file_format}, must have array_record or "
                "tfrecord; prepare the dataset again in one of these"
            )
        self.random_access = file_format == "array_record"
        if not self.random_access and not tfds_builder.tensorflow_is_installed():
            raise DataError(
                f"{self.folder}: its files have the format tfrecord; reading them "
                f"{tfds_builder.NO_TENSORFLOW}"
            )
        self.shards = _shards(builder, data.name, split, field)
        self.ends = list(itertools.accumulate(shard.take for shard in self.shards))
        if not len(self):
            raise DataError(f"{field}={split}: this part of {data.name} has no examples")
        buckets.fetch(shard.filename for shard in self.shards)
        for shard in self.shards:
            if not tfds.core.Path(shard.filename).exists():
                raise DataError(
                    f"{tfds_builder.shown(shard.filename)}: no such file; {self._remedy()}"
                )
        self.stamps = [_stamp(shard.filename) for shard in self.shards]
        self.source: Any = self._open_array_records() if self.random_access else None
        height, width = self.layout.stored_size
        self.workers = Workers(height * width if height and width else None)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def chunks(self) -> Iterator[Decoded]:
        """As `ImageRecords.chunks`.

        Raises:
          DataError: a TFRECORD file is damaged between its records; names the place.
        """
        read = self._read_array_records() if self.random_access else self._read_tfrecords()
        start = 0
        for encoded in look_ahead(read):
            yield self._decode(encoded, range(start, start + len(encoded)))
            start += len(encoded)

    def decoded(self, indices: Sequence[int]) -> Decoded:
        return self._decode(self._read(indices), indices)

    def check_unchanged(self, indices: Sequence[int]) -> None:
        first = {bisect.bisect_right(self.ends, index): index for index in reversed(indices)}
        for k, index in first.items():
            now = _stamp(self.shards[k].filename)
            if now != self.stamps[k]:
                raise changed(self._place(index), now, self.stamps[k])

    # ----------------------------------------------------------------------------- reading

    def _open_array_records(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from array_record.python.array_record_module import ArrayRecordReader

        for shard in self.shards:
            try:
                reader = ArrayRecordReader(
                    shard.filename, options="readahead_buffer_size:0", file_reader_buffer_size=32768
                )
                count = reader.num_records()
                reader.close()
            except Exception as error:  # the reader raises RuntimeError for any problem
                raise self._damaged(tfds_builder.shown(shard.filename), error) from error
            self._check_count(shard, count)
        return ArrayRecordDataSource(self.shards)

    def _check_count(self, shard: Any, count: int) -> None:
        if count != shard.examples_in_shard:
            raise DataError(
                f"{tfds_builder.shown(shard.filename)}: {count} records, "
                f"{shard.examples_in_shard} by its dataset_info.json; {self._remedy()}"
            )

    def _read_array_records(self) -> Iterator[list[bytes | DataError]]:
        for start in range(0, len(self), CHUNK):
            yield self._read(range(start, min(start + CHUNK, len(self))))

    def _read(self, indices: Sequence[int]) -> list[bytes | DataError]:
        if not len(indices):
            return []
        try:
            return self.source.__getitems__(indices)
        except Exception as error:
            if len(indices) == 1:
                return [self._damaged(self._place(indices[0]), error)]
            return [record for index in indices for record in self._read([index])]

    def _read_tfrecords(self) -> Iterator[list[bytes | DataError]]:
        with tfds_builder.quiet(), silent_stderr():
            import tensorflow as tf

            with contextlib.suppress(RuntimeError):  # already initialised
                tf.config.set_visible_devices([], "GPU")  # else it takes all GPU memory
        for shard in self.shards:
            end, count, chunk = shard.skip + shard.take, 0, []
            records = tf.data.TFRecordDataset(shard.filename).as_numpy_iterator()
            while True:
                try:
                    record = next(records, None)
                except Exception as error:  # tf.errors.DataLossError, NotFoundError, ...
                    raise self._damaged(f"{shard.filename}: record {count}", error) from error
                if record is None or (count == end < shard.examples_in_shard):
                    break
                if shard.skip <= count < end:
                    chunk.append(record)
                count += 1
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
            if count < end or end == shard.examples_in_shard:
                self._check_count(shard, count)
            if chunk:
                yield chunk

    # ---------------------------------------------------------------------------- decoding

    def _decode(self, records: list[bytes | DataError], indices: Sequence[int]) -> Decoded:
        def read(i: int) -> tuple[np.ndarray, int]:
            record = records[i]
            if isinstance(record, DataError):
                raise record
            try:
                encoded, label = self._parse(record)
                return self._decode_image(encoded), label
            except decode.Unsuitable as error:
                raise DataError(f"{self._place(indices[i])}: {error}") from None
            except Exception as error:  # protobuf and Pillow raise many types
                raise self._damaged(self._place(indices[i]), error) from error

        return self.decode_each(len(records), read)

    def _parse(self, record: bytes) -> tuple[bytes, int]:
        """The encoded image and the label of a record."""
        features = tf_example_pb2.Example.FromString(record).features.feature
        encoded = features[self.layout.image_key].bytes_list.value
        labels = features[self.layout.label_key].int64_list.value
        if len(encoded) != 1 or len(labels) != 1:
            raise ValueError("not one image and one label")
        classes = len(self.class_names)
        if not 0 <= labels[0] < classes:
            raise decode.Unsuitable(f"label {labels[0]}: must be from 0 to {classes - 1}")
        return encoded[0], labels[0]

    def _decode_image(self, encoded: bytes) -> np.ndarray:
        """uint8 [H, W, C]."""
        height, width, channels = self.image_shape
        picture = decode.decode(io.BytesIO(encoded), channels)
        size, declared = (picture.height, picture.width), self.layout.stored_size
        if size != declared and any(
            n not in (None, own) for n, own in zip(declared, size, strict=True)
        ):
            shown, wanted = ("x".join(map(str, pair)) for pair in (size, declared))
            raise decode.Unsuitable(
                f"an image of {shown}: must be {wanted} by the dataset's features (height and width "
                "are those of the upright image)"
            )
        return decode.pixels(picture, height, width)

    # ------------------------------------------------------------------------------ errors

    def _place(self, index: int) -> str:
        """The file of the example at `index`, and its place in that file."""
        k = bisect.bisect_right(self.ends, index)
        shard = self.shards[k]
        name = tfds_builder.shown(shard.filename)
        return f"{name}: record {index - self.ends[k] + shard.take + shard.skip}"

    def _damaged(self, place: str, error: Exception) -> DataError:
        text = re.sub(r"\{\{.*?\}\}", "", str(error))  # the place in TensorFlow's graph
        reason = textwrap.shorten(text or type(error).__name__, 160, placeholder=" ...")
        return DataError(f"{place}: damaged ({reason}); {self._remedy()}")

    def _remedy(self) -> str:
        return f"remove {self.folder} and prepare the dataset again"


def _stamp(filename: str) -> tuple[int, int] | None:
    """Size in bytes and time of change of a file; None if there is none, or if it is remote."""
    try:
        status = os.stat(filename)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discards output to file descriptor 2: TensorFlow writes to it even if TF_CPP_* forbids that."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
