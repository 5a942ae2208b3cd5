"""A run's workdir in a bucket, such as gs://bucket/run, and local copies of it.

In a bucket a rename is a copy of each file. So a checkpoint counts when its marker is there, which is
written last: checkpoints/STEP/committed.json with the names of its files. All else is as in a workdir
on a disk; lock/ holds the lease of the run that trains (see lease.py).

Commands that read a run get a copy in the cache: its JSON files and the markers. The files of a
checkpoint are copied when `checkpoint.Checkpoints` reads it.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnn_jax.common import cache, remote
from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.common.files import user_path, written

log = logging.getLogger(__name__)

MARKER = "committed.json"
_MARKERS = re.compile(rf"checkpoints/(0|[1-9][0-9]*)/{MARKER}", re.ASCII)
_ADDRESS = re.compile("(gs|gcs|s3|memory)://[^/]")  # memory: fsspec's own, for tests
_AT_ONCE = 8
_copies: dict[Path, "Copy"] = {}  # by local folder
_addresses: dict[Path, str] = {}  # the same


class BucketRun:
    """The objects of a run in a bucket; names are relative to its address.

    Every method raises CheckpointError, of one line, if the bucket does not do what it is asked; a new
    one ConfigError if `address` is not that of a bucket.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        if not _ADDRESS.match(self.address):
            raise ConfigError(
                f"workdir={address}: must be a folder, gs://BUCKET/RUN or s3://BUCKET/RUN"
            )
        with remote.answered(f"workdir={self.address}", CheckpointError):
            self._system = remote.opened(self.address)

    def _answered(
        self, name: str, verb: str = "read", missing_ok: bool = False
    ) -> contextlib.AbstractContextManager:
        return remote.answered(f"{self.address}/{name}", CheckpointError, verb, missing_ok)

    def names(self, below: str = "") -> list[str]:
        """The objects in the folder `below`, sorted."""
        place = f"{self.address}/{below}".rstrip("/")
        start = len(self._system._strip_protocol(self.address)) + 1
        with remote.answered(f"workdir={self.address}", CheckpointError):
            self._system.invalidate_cache()
            return sorted(path[start:] for path in self._system.find(place))

    def read(self, name: str) -> bytes:
        """The content of an object, b"" if it is not there."""
        data = b""
        with self._answered(name, missing_ok=True):
            data = self._system.cat_file(f"{self.address}/{name}")
        return bytes(data)

    def write(self, name: str, data: bytes, new: bool = False) -> bool:
        """Writes a whole object; False if `new` and it is there already: then it is not replaced."""
        with self._answered(name, "written"):
            try:
                mode = "create" if new else "overwrite"
                self._system.pipe_file(f"{self.address}/{name}", data, mode=mode)
            except FileExistsError:
                return False
        return True

    def send(self, files: dict[str, Path]) -> None:
        """Copies local files to the objects of these names."""

        def put(name: str, path: Path) -> None:
            with self._answered(name, "written"):
                self._system.put_file(str(path), f"{self.address}/{name}")

        _each(put, files, files.values())

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copies objects into `folder`, each in one rename; leaves out those that are not there."""

        def get(name: str) -> None:
            path = folder / name
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            with written(path, CheckpointError):
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._answered(name, missing_ok=True):
                    self._system.get_file(f"{self.address}/{name}", str(scratch))
                    os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)

        _each(get, names)

    def remove(self, names: Iterable[str]) -> None:
        """Deletes objects; it is no error if one is not there."""

        def delete(name: str) -> None:
            with self._answered(name, "deleted", missing_ok=True):
                self._system.rm_file(f"{self.address}/{name}")

        _each(delete, names)

    def markers(self) -> dict[int, "Marker"]:
        """The markers of the complete checkpoints, by step; warns of damaged ones."""
        found = {}
        for match in filter(None, map(_MARKERS.fullmatch, self.names("checkpoints"))):
            try:
                if text := self.read(match[0]):  # not deleted meanwhile
                    found[int(match[1])] = Marker.of(text)
            except (ValueError, TypeError):
                log.warning("warning: skipped %s/%s: damaged", self.address, match[0])
        return found

    def records(self) -> list[str]:
        """The files that a run goes on with and that commands read: config.json and its like."""
        return [n for n in self.names() if "/" not in n and n.endswith((".json", ".jsonl"))]


def _each(do: Callable, *arguments: Iterable) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(do, *arguments))


@dataclasses.dataclass(frozen=True)
class Marker:
    """What makes a checkpoint in a bucket complete.

    Attributes:
      manifest: SHA-256 of the file manifest/metadata, which tells checkpoints of a step apart.
      files: their names in the checkpoint's folder.
    """

    manifest: str
    files: list[str]

    @classmethod
    def of(cls, text: bytes) -> "Marker":
        """Reads a marker; refuses names that lead out of the folder: others may write the bucket."""
        marker = cls(**json.loads(text))
        if any(os.path.normpath(f"/{name}") != f"/{name}" for name in marker.files):
            raise ValueError("a name leads elsewhere")
        return marker

    def text(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=2).encode()


class Copy:
    """A local folder whose checkpoints come from a bucket when they are read."""

    def __init__(self, bucket: BucketRun, folder: Path):
        self.bucket, self.folder = bucket, folder
        _copies[folder.resolve()] = self

    def offer(self, markers: dict[int, Marker]) -> None:
        """Makes a folder for each checkpoint that has a marker; `fetch` brings its files.

        Removes copies of checkpoints that the bucket no longer has.
        """
        checkpoints = self.folder / "checkpoints"
        with written(checkpoints, CheckpointError):
            checkpoints.mkdir(parents=True, exist_ok=True)
            for path in checkpoints.glob(f"[0-9]*/{MARKER}"):
                marker = markers.get(int(path.parent.name))
                if not marker or marker.text() != path.read_bytes():
                    doomed = checkpoints / f".deleting-{path.parent.name}"
                    os.rename(path.parent, doomed)  # half-deleted, it would look like a checkpoint
                    shutil.rmtree(doomed)
            for step, marker in markers.items():
                if not (checkpoints / str(step)).exists():
                    scratch = Path(tempfile.mkdtemp(prefix=".deleting-", dir=checkpoints))
                    (scratch / MARKER).write_bytes(marker.text())
                    os.rename(scratch, checkpoints / str(step))

    def fetch(self, step: int, items: str = "") -> None:
        """Brings the files of a checkpoint that are in the folder `items` and are not here yet.

        Raises:
          CheckpointError: it was deleted since.
        """
        place = f"checkpoints/{step}"
        try:
            marker = Marker.of((self.folder / place / MARKER).read_bytes())
        except FileNotFoundError:
            return  # written on this machine
        names = [f"{place}/{name}" for name in marker.files if name.startswith(items)]
        missing = [name for name in names if not (self.folder / name).exists()]
        self.bucket.fetch(missing, self.folder)
        there = all((self.folder / name).exists() for name in missing)
        if not there and not self.bucket.read(f"{place}/{MARKER}"):
            raise CheckpointError(
                f"{self.bucket.address}/{place}: was deleted while it was read; run the command again"
            )

    def refresh(self) -> None:
        """Takes over what was committed, deleted and written in the bucket since."""
        self.offer(self.bucket.markers())
        self.bucket.fetch(self.bucket.records(), self.folder)


def small_files(folder: Path) -> dict[str, Path]:
    """The files of a workdir apart from checkpoints, by name; none that is hidden, nor the lock."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    hidden = re.compile(r"checkpoints/|lock$|(.*/)?\.")
    return {n: path for n, path in found.items() if not hidden.match(n) and path.is_file()}


def state(path: Path) -> tuple[int, int]:
    """What tells the states of a file apart."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def place(address: str, kind: str) -> Path:
    """The folder in the cache for the workdir `address`; `kind` is of what."""
    address = address.rstrip("/")
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = cache.cache_dir() / kind / name / address.rpartition("/")[2]
    _addresses[folder.resolve()] = address
    return folder


def copy_of(folder: Path) -> Copy | None:
    """The copy that is at `folder`, None if it is a workdir on a disk."""
    return _copies.get(folder.resolve())


def shown(folder: Path) -> str:
    """The address of the workdir that has `folder` in the cache, or `folder`."""
    return _addresses.get(folder.resolve(), str(folder))


def local_copy(workdir: str, fresh: bool = False) -> Path:
    """The folder of `workdir`: for an address a copy in the cache, with what the bucket has now.

    Args:
      workdir: a path or an address.
      fresh: keeps nothing of an earlier copy.

    Raises:
      CheckpointError: the bucket cannot be read, or has no run there.
      ConfigError: as `files.user_path`.
    """
    if not remote.is_remote(workdir):
        return user_path(workdir)
    folder = place(workdir, "copies")
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    copy = Copy(BucketRun(workdir), folder)
    copy.refresh()
    if not (folder / "config.json").exists():
        raise CheckpointError(f"workdir={workdir}: holds no config.json; name the folder of a run")
    return folder


@contextlib.contextmanager
def copied(workdirs: Iterable[str], fresh: bool = False) -> Iterator[list[Path]]:
    """The folders of runs, as `local_copy`; what is written there is copied up at the end."""
    folders = [local_copy(workdir, fresh) for workdir in dict.fromkeys(workdirs)]
    copies = [copy for folder in folders if (copy := copy_of(folder))]
    before = [{n: state(p) for n, p in small_files(copy.folder).items()} for copy in copies]
    yield folders
    for copy, known in zip(copies, before, strict=True):
        found = small_files(copy.folder)
        new = {name: path for name, path in found.items() if known.get(name) != state(path)}
        if not new:
            continue
        tops = sorted({re.sub("/.*", "/", name) for name in new})
        try:
            copy.bucket.send(new)
            log.info("copied to %s: %s", copy.bucket.address, ", ".join(tops))
        except CheckpointError as error:
            log.warning("warning: %s; it is in %s", error, copy.folder)
