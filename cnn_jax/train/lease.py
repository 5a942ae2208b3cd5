"""The lock of a workdir in a bucket: a lease, which runs out if its owner does not renew it.

lock/ holds objects 00000001, 00000002 and so on, and the last one counts: who has the lease, and until
when. To take, renew or give back the lease is to write the next number, on the condition that it does
not exist. The bucket lets one writer succeed, so a renewal fails if another process took the lease.

gcsfs sends ifGenerationMatch=0, which Google documents as atomic. s3fs sends If-None-Match: *, which
Amazon documents as atomic since August 2024; other stores of the S3 kind may ignore it. The clocks of
the machines must agree to within LEASE - RENEWAL seconds.
"""

import contextlib
import datetime
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from cnn_jax.common.errors import CheckpointError
from cnn_jax.train.bucket_run import BucketRun
from cnn_jax.train.workdir import write_json

log = logging.getLogger(__name__)

LEASE, RENEWAL = 120.0, 30.0  # seconds
KNOWN = ".lease.json"  # in the local folder


class Lease:
    """The lease of a workdir for one process; `held` takes it.

    Attributes:
      run: identifies the run since it began in the bucket, None if none did.
      lost: the error of `check` if another process has taken the lease.
    """

    def __init__(self, bucket: BucketRun, holder: str):
        """Args:
        bucket: the workdir.
        holder: identifies the local folder, which one process at a time uses.
        """
        self._bucket, self._holder = bucket, holder
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self.lost: CheckpointError | None = None
        self._number, now = last(self._bucket)
        self.run = now.get("run")
        if now and now["holder"] != holder and now["until"] > time.time():
            raise self._refusal(now)

    def write(self, seconds: float) -> None:
        """Takes or renews the lease for `seconds`.

        Raises:
          CheckpointError: another process has it; or the bucket does not answer.
        """
        self.check()
        self.run = self.run or str(uuid.uuid4())
        until = time.time() + seconds
        record = {"run": self.run, "holder": self._holder, "owner": self._owner, "until": until}
        data = json.dumps(record | {"write": str(uuid.uuid4())}).encode()
        name = f"lock/{self._number + 1:08d}"
        # A write that came through though its answer was lost is repeated by the package, and refused.
        if not self._bucket.write(name, data, new=True) and self._bucket.read(name) != data:
            self._lose()
        # Not the last: this process stood still while others took the lease and gave it back.
        earlier = _names(self._bucket)
        if earlier.pop() != name:
            self._lose()
        self._number += 1
        self._bucket.remove(earlier)

    def check(self) -> None:
        """Raises CheckpointError if another process has taken the lease."""
        if self.lost:
            raise self.lost

    def _lose(self) -> None:
        owner = last(self._bucket)[1].get("owner", "nobody")
        self.lost = CheckpointError(
            f"workdir={self._bucket.address}: {owner} has taken the run over, as this process did not "
            "renew its lease in time"
        )
        raise self.lost

    def _refusal(self, now: dict) -> CheckpointError:
        until = datetime.datetime.fromtimestamp(now["until"], datetime.UTC)
        return CheckpointError(
            f"workdir={self._bucket.address}: in use by {now['owner']}, whose lease ends at "
            f"{until:%Y-%m-%d %H:%M:%S} UTC unless it is renewed; wait for it, or choose another "
            "workdir"
        )


def _names(bucket: BucketRun) -> list[str]:
    return [name for name in bucket.names("lock") if re.fullmatch(r"lock/\d{8}", name)]


def last(bucket: BucketRun) -> tuple[int, dict]:
    """The number and the content of the last object; 0 and {} if there is none."""
    while names := _names(bucket):
        if data := bucket.read(names[-1]):  # else its owner wrote the next one meanwhile
            return int(names[-1].rpartition("/")[2]), json.loads(data)
    return 0, {}


def is_held(bucket: BucketRun) -> bool:
    """Whether a process trains in the workdir, or died less than a lease ago."""
    return last(bucket)[1].get("until", 0.0) > time.time()


def holder_of(folder: Path) -> dict:
    """What identifies a local folder, on this machine, and the run that it holds."""
    path = folder / KNOWN
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        known = {"folder": str(uuid.uuid4()), "run": None}
        write_json(path, known)
    return known


@contextlib.contextmanager
def held(lease: Lease) -> Iterator[Callable[[], None]]:
    """Takes the lease, renews it in a thread, and gives it back.

    Yields:
      A function that raises CheckpointError if another process has taken the lease.
    """
    lease.write(LEASE)
    ended, failing = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL):
            try:
                lease.write(LEASE)
                failing.clear()
            except CheckpointError:  # if it is lost, `check` says so; otherwise it is tried again
                failing.set()

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield lease.check
    finally:
        ended.set()
        thread.join(timeout=RENEWAL)
        if not failing.is_set() and not thread.is_alive():  # otherwise it runs out
            with contextlib.suppress(CheckpointError):
                lease.write(0.0)
