"""Processes that read and decode images: `in_order` is their use, `serve` is what each of them runs.

A worker imports NumPy, Pillow and the readers of datasets, but not JAX: it starts in half a second and
takes 70 MB. All splits share the workers, which stay until the program ends. (Grain's workers import
JAX, take 190 MB each, and start again for every iterator, that is, for every epoch and evaluation.)
"""

import atexit
import collections
import contextlib
import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cnn_jax.common.errors import DataError
from cnn_jax.common.pairs import pair

# What a worker decodes at a time, and how many such parts of each worker may wait in memory. A part
# of 32 small images takes 1.4 times the work of an eighth of a part of 256.
PART_BYTES, PART_IMAGES = 8_000_000, 256
PARTS_AHEAD = 2
# The splits that a worker keeps open: training, validation and test.
_KEPT = 3

T = TypeVar("T")
Batch = tuple[np.ndarray, np.ndarray]  # image uint8 [n, H, W, C], label int32 [n]


def in_order(records: Any, batches: Iterable[np.ndarray], count: int) -> Iterator[Batch]:
    """What `records.fetch` returns for the indices of each batch, in order, by `count` workers.

    Args:
      records: a split, as `tfds_records.Records`; it is sent to a worker once.
      batches: indices [n] of each batch.
      count: of worker processes.

    Raises:
      DataError: as `records.fetch`, or a worker has died.
    """
    pool = _pool(count)
    most = min(PART_IMAGES, max(1, PART_BYTES // int(np.prod(records.image_shape))))
    batches, sent = itertools.tee(batches)
    rows = _Rows((indices,) for indices in sent)
    parts = iter(lambda: rows.take(most), None)
    found = _Rows(_ahead(lambda part: pool.submit(records, *part), parts, PARTS_AHEAD * count))
    for indices in batches:
        taken = found.take(len(indices))
        assert taken is not None, "there are as many rows as indices"
        yield pair(taken)


def _ahead(submit: Callable[[T], Future], items: Iterable[T], count: int) -> Iterator[Any]:
    """The result for each item, in order; `count` of them are submitted before they are asked for."""
    items = iter(items)
    waiting = collections.deque(map(submit, itertools.islice(items, count)))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(map(submit, itertools.islice(items, 1)))
    finally:
        for future in waiting:
            future.cancel()


class _Rows:
    """The rows of arrays that come in parts, to be taken in other parts."""

    def __init__(self, parts: Iterable[tuple[np.ndarray, ...]]):
        self._parts = iter(parts)
        self._rest: tuple[np.ndarray, ...] | None = None

    def take(self, count: int) -> tuple[np.ndarray, ...] | None:
        """The next `count` rows of each array, or those that are left; None if none are left."""
        taken, missing = [], count
        while missing > 0:
            part = self._rest or next(self._parts, None)
            if part is None:
                break
            taken.append([array[:missing] for array in part])
            self._rest = None
            if len(part[0]) > missing:
                self._rest = tuple(array[missing:] for array in part)
            missing -= len(part[0])
        if len(taken) < 2:
            return tuple(taken[0]) if taken else None
        return tuple(map(np.concatenate, zip(*taken, strict=True)))


class _Pool:
    """A thread for each worker process hands it a part and waits for the images."""

    def __init__(self, count: int):
        self._count = count
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoding")
        self._own = threading.local()
        self._processes: list[subprocess.Popen] = []

    def submit(self, records: Any, indices: np.ndarray) -> Future:
        return self._threads.submit(self._fetch, records, indices)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            _close(process)

    def _fetch(self, records: Any, indices: np.ndarray) -> Batch:
        if getattr(self._own, "process", None) is None:
            self._own.process, self._own.sent = _start(), []
            self._processes.append(self._own.process)
        process, sent = self._own.process, self._own.sent
        new = not any(records is one for one in sent)
        if new:
            self._own.sent = sent = [*sent, records][-_KEPT:]
        try:
            state = pickle.dumps(records) if new else None
            pickle.dump((list(map(id, sent)), id(records), state, indices), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._own.process = None
            raise self._died(process) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _died(self, process: subprocess.Popen) -> DataError:
        process.kill()
        code = _close(process)
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        return DataError(
            f"data.workers={self._count}: the worker process {process.pid} {how}; run the same command "
            "again to go on from the last checkpoint (if memory ran out, with fewer data.workers)"
        )


@functools.cache
def _pool(count: int) -> _Pool:
    pool = _Pool(count)
    atexit.register(pool.close)
    return pool


def _close(process: subprocess.Popen) -> int:
    """Ends a process, by closing its pipes; returns its exit code."""
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # a part of a request that nobody reads
            pipe.close()
    return process.wait()


def _start() -> subprocess.Popen:
    package = Path(__file__).resolve().parent.parent.parent
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cnn_jax.data.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # signals to the program's group are for the program alone
    )


def serve() -> None:
    """Answers the requests of the program that started this process, until that program ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    opened: dict[int, Any] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            kept, name, state, indices = pickle.load(requests)
            try:
                if state is not None:
                    opened = {key: opened[key] for key in kept if key in opened}
                    opened[name] = pickle.loads(state)
                answer = opened[name].fetch(indices.tolist())
            except Exception as error:  # it is raised in the program
                answer = error
            pickle.dump(answer, answers, protocol=5)
            answers.flush()


if __name__ == "__main__":
    serve()
