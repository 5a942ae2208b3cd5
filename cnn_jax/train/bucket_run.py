"""A run's workdir in a bucket, such as gs://bucket/run, and local copies of it.

In a bucket a rename is a copy of each file. So a checkpoint counts when its marker is there, which is
written last: checkpoints/STEP/committed.json with the names and sizes of its files. All else is as in
a workdir on a disk; lock/ holds the lease of the run that trains (see lease.py).

Commands that read a run get a copy in the cache: its JSON files and the markers. The files of a
checkpoint are copied when `checkpoint.Checkpoints` reads it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnn_jax.common import cache, remote
from cnn_jax.common.errors import CheckpointError
from cnn_jax.common.files import user_path, written

log = logging.getLogger(__name__)

MARKER = "committed.json"
_MARKERS = re.compile(rf"checkpoints/(0|[1-9][0-9]*)/{MARKER}", re.ASCII)
_AT_ONCE = 8
_copies: dict[Path, "Copy"] = {}  # by local folder
_addresses: dict[Path, str] = {}  # the same


class BucketRun:
    """The objects of a run in a bucket; names are relative to its address.

    Every method raises CheckpointError, of one line, if the bucket does not do what it is asked.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
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
        with self._answered(name, missing_ok=True):
            return self._system.cat_file(f"{self.address}/{name}")
        return b""

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

    def markers(self) -> dict[int, bytes]:
        """The markers of the complete checkpoints, by step."""
        found = filter(None, map(_MARKERS.fullmatch, self.names("checkpoints")))
        read = {int(match[1]): self.read(match[0]) for match in found}
        return {step: marker for step, marker in read.items() if marker}  # not deleted meanwhile

    def records(self) -> list[str]:
        """The files that a run goes on with and that commands read: config.json and its like."""
        return [n for n in self.names() if "/" not in n and n.endswith((".json", ".jsonl"))]


def _each(do: Callable, *arguments: Iterable) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(do, *arguments))


class Copy:
    """A local folder whose checkpoints come from a bucket when they are read."""

    def __init__(self, bucket: BucketRun, folder: Path):
        self.bucket, self.folder = bucket, folder
        _copies[folder.resolve()] = self

    def offer(self, markers: dict[int, bytes]) -> None:
        """Makes a folder for each checkpoint that has a marker; `fetch` brings its files."""
        for step, marker in markers.items():
            folder = self.folder / "checkpoints" / str(step)
            path = folder / MARKER
            if path.exists() and path.read_bytes() != marker:
                shutil.rmtree(folder)  # another checkpoint of this step
            if not folder.exists():
                with written(path, CheckpointError):
                    folder.mkdir(parents=True)
                    path.write_bytes(marker)

    def fetch(self, step: int, items: str = "") -> None:
        """Brings the files of a checkpoint that are in the folder `items` and are not here yet."""
        place = f"checkpoints/{step}"
        try:
            marker = json.loads((self.folder / place / MARKER).read_bytes())
        except FileNotFoundError:
            return  # written on this machine
        names = [f"{place}/{name}" for name in marker["files"] if name.startswith(items)]
        self.bucket.fetch(
            [name for name in names if not (self.folder / name).exists()], self.folder
        )

    def refresh(self) -> None:
        """Takes over what was committed, deleted and written in the bucket since."""
        markers = self.bucket.markers()
        for folder in (self.folder / "checkpoints").glob("*"):
            if folder.name.isdecimal() and int(folder.name) not in markers:
                shutil.rmtree(folder)
        self.offer(markers)
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
        written = {name: path for name, path in found.items() if known.get(name) != state(path)}
        if not written:
            continue
        tops = sorted({re.sub("/.*", "/", name) for name in written})
        try:
            copy.bucket.send(written)
            log.info("copied to %s: %s", copy.bucket.address, ", ".join(tops))
        except CheckpointError as error:
            log.warning("warning: %s; it is in %s", error, copy.folder)
