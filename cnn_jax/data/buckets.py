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
import textwrap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cnn_jax.common.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

# The package that reads addresses of this kind, and the extra of this project that has it.
_EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_DESCRIPTION = (".json", ".txt")
# What tells the states of a file apart, by the names that file systems give it.
_STAMPS = ("md5Hash", "ETag", "etag", "generation", "LastModified", "created")
_AT_ONCE = 8
# Seconds without a byte from Google's servers after which a request is tried again, six times in all.
SILENCE = 20
_opened: dict[str, "Bucket"] = {}  # by local folder


def is_remote(data_dir: str) -> bool:
    return "://" in data_dir


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
        self._system = self._reading(self._open)
        place = f"{self.address}/{dataset}"
        found = self._reading(lambda: self._system.find(place, detail=True))
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
            self._reading(
                lambda: self._system.get_file(f"{self.address}/{name}", str(scratch)), name
            )
            size, wanted = scratch.stat().st_size, self.files[name][0]
            if size != wanted:
                raise DataError(f"{self.address}/{name}: {size:,} of {wanted:,} bytes came")
            os.replace(scratch, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            scratch.unlink(missing_ok=True)

    def _open(self) -> Any:
        import fsspec

        kind, options = self.address.partition("://")[0], {}
        if kind in ("gs", "gcs"):
            # Its search for the bucket's type takes a minute where only the bucket's files may be read.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback
            import aiohttp

            # By default it ends the copy of a shard that takes more than five minutes.
            patience = aiohttp.ClientTimeout(sock_connect=SILENCE, sock_read=SILENCE)
            options = {"requests_timeout": patience}
        return fsspec.filesystem(kind, **options)

    def _reading(self, read: Callable[[], T], name: str = "") -> T:
        """The result of `read`, which asks the bucket for the file `name`, or for all."""
        place = f"{self.address}/{name}" if name else f"data_dir={self.address}"
        kind = self.address.partition("://")[0]
        try:
            return read()
        except ImportError:
            package, extra = _EXTRAS.get(kind, (f"a package for {kind}://", ""))
            advice = f"./launch.sh setup --with={extra} or pip install {package}"
            raise DataError(
                f"{place}: reading it needs {package}, which is not installed"
                + (f"; add it with {advice}" if extra else "")
            ) from None
        except FileNotFoundError:
            raise DataError(f"{place}: there is no such bucket or file") from None
        except Exception as error:  # the packages raise errors of many types
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = textwrap.shorten(reason, 200, placeholder=" ...")
            raise DataError(f"{place}: cannot be read ({reason})") from error
