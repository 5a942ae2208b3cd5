"""Runs tasks, each of which runs commands: on this machine, one or several at once, or on SLURM."""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from cnn_jax.common import cpu, gpu
from cnn_jax.common.errors import ConfigError, Preempted
from cnn_jax.studies import slurm
from cnn_jax.studies.subprocesses import ADVICE, Processes
from cnn_jax.studies.task import Failure, Task

log = logging.getLogger(__name__)
T = TypeVar("T")
Launcher = Callable[[Sequence[Task], Path], Iterator[tuple[Task, Failure | None]]]


def choose(launcher: str = "local", parallel: int | None = None, options: str = "") -> Launcher:
    """What runs tasks.

    Args:
      launcher: of --launcher.
      parallel: how many tasks run at once; by default one on this machine, and all on SLURM.
      options: of --slurm, as for `slurm.Options.parse`.

    Returns:
      A function that takes tasks and a folder for their files, and gives each task with its failure,
      if it failed, as soon as it ends. It raises Preempted if a signal asks to stop.

    Raises:
      ConfigError: a value is invalid, or a package or program is missing.
    """
    if launcher == "slurm":
        return functools.partial(slurm.run, options=slurm.Options.parse(options), most=parallel)
    if launcher != "local":
        raise ConfigError(f"--launcher={launcher}: must be local or slurm")
    if options:
        raise ConfigError(f"--slurm={options}: is for --launcher=slurm only")
    if parallel in (None, 1):
        return _one_by_one
    return functools.partial(_side_by_side, shares=_shares(parallel))


@dataclasses.dataclass(frozen=True)
class _Share:
    """A part of this machine.

    Attributes:
      cores: their numbers.
      environment: names its GPUs.
    """

    cores: tuple[int, ...]
    environment: dict[str, str]


def _shares(parallel: int) -> list[_Share]:
    """Equal parts: the bits of a run depend on its number of cores.

    Raises:
      ConfigError: there are fewer cores or GPUs than parts.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if parallel > cpu.cores():
        raise ConfigError(f"--parallel={parallel}: must be at most {cpu.cores()}, the usable cores")
    gpus = [] if os.environ.get("JAX_PLATFORMS") == "cpu" else gpu.visible()
    if 0 < len(gpus) < parallel:
        raise ConfigError(
            f"--parallel={parallel}: must be at most {len(gpus)}, the GPUs; or set JAX_PLATFORMS=cpu"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if len(names) == len(gpus) else [*map(str, range(len(gpus)))]
    found = []
    for i in range(parallel):
        own, shown = _part(cores, i, parallel), _part(names, i, parallel)
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(shown)} if gpus else {}
        found.append(_Share(tuple(own), environment))
    return found


def _part(everything: list[T], i: int, parts: int) -> list[T]:
    size = len(everything) // parts
    return everything[i * size : (i + 1) * size]


def _one_by_one(tasks: Sequence[Task], folder: Path) -> Iterator[tuple[Task, Failure | None]]:
    with Processes() as processes:
        for task in tasks:
            log.info("%s", task.label)
            yield task, task.fails(processes.run)


def _side_by_side(
    tasks: Sequence[Task], folder: Path, shares: Sequence[_Share]
) -> Iterator[tuple[Task, Failure | None]]:
    """As many tasks at once as there are shares, each in a thread that has its share of the cores."""
    free: queue.SimpleQueue[_Share] = queue.SimpleQueue()
    own = threading.local()
    for share in shares:
        free.put(share)

    def take_share() -> None:
        own.share = free.get()
        if own.share.cores:
            os.sched_setaffinity(0, own.share.cores)  # of this thread and the processes it starts

    def run(task: Task) -> Failure | None:
        prefix = f"[{task.place}] "
        log.info("%s%s", prefix, task.label)
        try:
            return task.fails(
                functools.partial(processes.run, prefix=prefix, environment=own.share.environment)
            )
        except Preempted as error:
            log.info("%s%s", prefix, error)
            raise Preempted(ADVICE, error.exit_code) from error

    with (
        concurrent.futures.ThreadPoolExecutor(len(shares), initializer=take_share) as pool,
        Processes() as processes,
    ):
        futures = {pool.submit(run, task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
