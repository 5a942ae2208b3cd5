"""A data_dir in a bucket, such as gs://bucket/tfds or s3://bucket/tfds.

The readers of records read local files, so a dataset's files are copied into the cache: its description
when it is opened, and the shards of a split when that is loaded. Nothing is written to the bucket. The
copy has a folder of its own for each state of the dataset's files: one that changes is copied again.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnn_jax.common import remote
from cnn_jax.common.errors import DataError

log = logging.getLogger(__name__)

_DESCRIPTION = (".json", ".txt")
# What tells the states of a file apart, by the names that file systems give it.
_STAMPS = ("md5Hash", "ETag", "etag", "generation", "LastModified", "created")
_AT_ONCE = 8
_opened: dict[str, "Bucket"] = {}  # by local folder


@functools.cache
def opened(data_dir: str, dataset: str, cache_dir: Path) -> "Bucket":
    """The files of `dataset` below `data_dir`, as they are when a process asks for the first time.

    Raises:
      DataError: the package that reads such addresses is not installed, the bucket or the dataset does
        not exist, or cannot be read.
    """
    bucket = Bucket(data_dir, dataset, cache_dir)
    bucket.fetch(name for name in bucket.files if name.endswith(_DESCRIPTION))
    _opened[str(bucket.folder)] = bucket
    return bucket


def state(folder: str) -> list:
    """The files of the bucket that has this local folder, as `decoded_cache.fingerprint`; else []."""
    return sorted(_opened[folder].files.items()) if folder in _opened else []


def fetch(paths: Iterable[str]) -> None:
    """Copies the files that are to be at `paths`, if they are those of a dataset in a bucket."""
    paths = list(map(os.path.realpath, paths))
    for folder, bucket in _opened.items():
        root = os.path.realpath(folder)
        bucket.fetch(os.path.relpath(path, root) for path in paths)


class Bucket:
    """A dataset in a bucket, and its copy.

    Attributes:
      address: of the data_dir, for errors.
      folder: the local data_dir.
      files: size in bytes and state of each file, by its path in the data_dir.
    """

    def __init__(self, data_dir: str, dataset: str, cache_dir: Path):
        self.address = data_dir.rstrip("/")
        with remote.answered(f"data_dir={self.address}", DataError):
            self._system = remote.opened(self.address)
            found = self._system.find(f"{self.address}/{dataset}", detail=True)
        if not found:
            raise DataError(
                f"data_dir={self.address}: holds no dataset {dataset}, or is no folder of a bucket; it "
                "is only read: prepare the dataset in a folder of this machine, and copy that there"
            )
        start = len(self._system._strip_protocol(self.address)) + 1
        self.files = {
            path[start:]: (about["size"], str(next(filter(None, map(about.get, _STAMPS)), "")))
            for path, about in found.items()
        }
        state = json.dumps([self.address, sorted(self.files.items())])
        self.folder = cache_dir / "buckets" / hashlib.sha256(state.encode()).hexdigest()[:16]

    def fetch(self, names: Iterable[str]) -> None:
        """Copies files that have no copy yet; leaves out those that are not in the bucket.

        Raises:
          DataError: one cannot be read, or not be written; names it.
        """
        missing = [
            name for name in names if name in self.files and not (self.folder / name).exists()
        ]
        if size := sum(self.files[name][0] for name in missing):
            log.info("copying %d files, %.1f MB, from %s", len(missing), size / 1e6, self.address)
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(self._fetch, missing))

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with remote.answered(f"{self.address}/{name}", DataError):
                self._system.get_file(f"{self.address}/{name}", str(scratch))
            size, wanted = scratch.stat().st_size, self.files[name][0]
            if size != wanted:
                raise DataError(f"{self.address}/{name}: {size:,} of {wanted:,} bytes came")
            os.replace(scratch, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            scratch.unlink(missing_ok=True)
