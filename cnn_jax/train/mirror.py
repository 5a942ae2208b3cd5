"""Training in a workdir in a bucket: a run in a local folder, whose finished files are copied up.

The run works in a folder of the cache, as in any workdir. A thread makes the bucket like the folder
after each checkpoint that was proven, and after each line of metrics.jsonl. For each new checkpoint it
copies the files, then metrics.jsonl and the other small files, then the marker. At last it deletes the
checkpoints that the run no longer has. So wherever it is killed, the bucket has a complete checkpoint,
and the lines of all epochs before it.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.common.files import written
from cnn_jax.train import bucket_run, lease, parallel
from cnn_jax.train.bucket_run import MARKER, BucketRun, Copy, Marker
from cnn_jax.train.checkpoint import STEP, Checkpoints
from cnn_jax.train.signals import StopSignals
from cnn_jax.train.workdir import write_json

log = logging.getLogger(__name__)

PAUSES = (2.0, 8.0)  # seconds between the tries at the end of the training
LONGEST_PAUSE = 60.0  # between tries during the training
Changed = Callable[..., None]


def folder_of(address: str) -> Path:
    """The local folder of a run whose workdir is `address`.

    Raises:
      ConfigError: several processes take part.
    """
    if parallel.is_one_of_several():
        raise ConfigError(
            f"--workdir={address}: a run of several processes needs a folder that all of them have "
            "mounted"
        )
    return bucket_run.place(address, "workdirs")


@contextlib.contextmanager
def attached(
    address: str | None, folder: Path, check_lock: Callable[[], None], signals: StopSignals
) -> Iterator[tuple[Callable[[], None], Changed]]:
    """Copies a run up to `address` while it trains in `folder`, and down before; None: does nothing.

    Yields:
      `check_lock`, which now checks the lease too; and a function to call when something is finished:
      after a checkpoint was proven, with the steps of all checkpoints.

    Raises:
      CheckpointError: another process trains in it; the bucket cannot be read or written, or not all
        files could be copied in the end: the message names the local folder, which has them.
    """
    if address is None:
        yield check_lock, lambda steps=None: None
        return
    bucket = BucketRun(address)
    known = lease.holder_of(folder)
    taken = lease.Lease(bucket, f"{known['folder']} on {socket.gethostname()}")
    if taken.run is None and (found := bucket.records()):
        raise CheckpointError(
            f"workdir={address}: holds {found[0]}, but no run that began there; choose another one"
        )
    with lease.held(taken) as check_lease:
        if known["run"] != taken.run:
            _set_aside(folder)
            write_json(folder / lease.KNOWN, known | {"run": taken.run})
        mirror = Mirror(bucket, folder, taken)
        late = f"copying to {address} took longer than grace_seconds: the run is in {folder}, "
        late += "and the same command copies it up"
        mirror.pull()

        def check() -> None:
            check_lock()
            check_lease()

        try:
            yield check, mirror.changed
        except BaseException as error:
            signals.late_message = late
            try:
                mirror.close()
            except CheckpointError as failure:  # it does not hide the first error
                if failure is not error:
                    log.warning("warning: %s", failure)
            raise
        signals.late_message = late
        mirror.close()


def _set_aside(folder: Path) -> None:
    """Moves what is left of another run at the same address out of `folder`."""
    left = [path for path in folder.iterdir() if path.name not in ("lock", lease.KNOWN)]
    if left:
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for path in left:
            os.rename(path, aside / path.name)
        log.warning("warning: the local copy of an earlier run at this address is now %s", aside)


class Mirror:
    """Makes a run in a bucket like the run in a local folder."""

    def __init__(self, bucket: BucketRun, folder: Path, taken: lease.Lease):
        self._bucket, self._folder, self._lease = bucket, folder, taken
        self._committed: dict[int, str] = {}  # SHA-256 of the manifest, by step
        self._steps: list[int] = []  # proven
        self._sent: dict[str, tuple[int, int]] = {}  # time and size of small files
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")
        self._failures = 0

    def pull(self) -> None:
        """Takes over what the bucket has, if its newest checkpoint is newer than the folder's."""
        markers = self._bucket.markers()
        self._committed = {step: marker.manifest for step, marker in markers.items()}
        here = Checkpoints(self._folder).steps()
        if (
            max(markers, default=-1) > max(here, default=-1)
            or not (self._folder / "config.json").exists()
        ):
            self._bucket.fetch(self._bucket.records(), self._folder)
        Copy(self._bucket, self._folder).offer(markers)
        for left in self._folder.glob(".sending-*"):  # by a process that was killed
            shutil.rmtree(left)
        self._thread.start()

    def changed(self, steps: list[int] | None = None) -> None:
        """Starts to copy what is new; `steps` are those of the proven checkpoints."""
        if steps is not None:
            self._steps = steps
        self._wake.set()

    def close(self) -> None:
        """Copies what is left, and waits for it."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        for pause in (*PAUSES, None):
            try:
                self.copy()
                break
            except CheckpointError as error:
                self._lease.check()
                if pause is None:
                    raise CheckpointError(
                        f"{error}; gave up after {len(PAUSES) + 1} tries; the run is in "
                        f"{self._folder}, and the same command copies it up"
                    ) from error
                time.sleep(pause)

    def _work(self) -> None:
        while self._wake.wait() and not self._closing.is_set():
            self._wake.clear()
            try:
                self.copy()
                self._failures = 0
            except CheckpointError as error:
                if self._lease.lost:
                    return  # the run ends at its next `check`
                self._failures += 1
                if self._failures == 1:
                    log.warning("warning: %s; it is tried again", error)
                self._closing.wait(min(LONGEST_PAUSE, 2.0**self._failures))
                self._wake.set()

    # ------------------------------------------------------------------------------ copying

    def copy(self) -> None:
        """Makes the bucket like the folder, in the order that the head of this file tells."""
        wanted = list(self._steps)
        with written(self._folder, CheckpointError):
            for step in reversed(wanted):
                self._commit(step)
            self._send_small_files()
        if wanted and wanted[-1] in self._committed:
            found = [(name, name.split("/")[1]) for name in self._bucket.names("checkpoints")]
            doomed = [n for n, step in found if STEP.fullmatch(step) and int(step) not in wanted]
            self._remove(doomed)
            self._committed = {s: m for s, m in self._committed.items() if s in wanted}

    def _commit(self, step: int) -> None:
        place = f"checkpoints/{step}"
        folder, links = self._folder / place, self._folder / f".sending-{step}"
        try:
            manifest = hashlib.sha256((folder / "manifest" / "metadata").read_bytes()).hexdigest()
        except FileNotFoundError:
            return  # deleted, as newer ones are there; or its files are in the bucket only
        if self._committed.get(step) == manifest:
            return
        try:
            # Links, because the run may delete the checkpoint meanwhile.
            shutil.rmtree(links, ignore_errors=True)
            shutil.copytree(folder, links, copy_function=_link)
        except (FileNotFoundError, shutil.Error) as error:
            if folder.exists():
                raise CheckpointError(f"{folder}: cannot be copied: {error}") from error
            return
        try:
            files = {str(p.relative_to(links)): p for p in links.rglob("*") if p.is_file()}
            files.pop(MARKER, None)
            self._remove(self._bucket.names(place))
            self._bucket.send({f"{place}/{name}": path for name, path in files.items()})
            self._send_small_files()
            self._lease.check()
            self._bucket.write(f"{place}/{MARKER}", Marker(manifest, sorted(files)).text())
            self._committed[step] = manifest
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _remove(self, names: list[str]) -> None:
        """Deletes files of checkpoints, their markers first."""
        self._lease.check()
        self._bucket.remove(name for name in names if name.endswith(f"/{MARKER}"))
        self._bucket.remove(names)

    def _send_small_files(self) -> None:
        """Copies the files that have changed; a reader sees each as it was at one moment."""
        for name, path in bucket_run.small_files(self._folder).items():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                state = bucket_run.state(path)
                if self._sent.get(name) == state:
                    continue
                data = path.read_bytes()
                if name == "metrics.jsonl":
                    data = data[: data.rfind(b"\n") + 1]  # a line may be being written
                self._lease.check()
                self._bucket.write(name, data)
                self._sent[name] = state


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(source, target)
