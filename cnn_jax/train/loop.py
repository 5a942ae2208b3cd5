"""Trains a configuration in a workdir.

Loads the data, restores the newest valid checkpoint or initialises, and runs the epochs; `run` has
the order of what happens in them.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.common.remote import is_remote
from cnn_jax.config import Config
from cnn_jax.config.paths import resolve
from cnn_jax.config.validate import validate
from cnn_jax.data import loader, statistics
from cnn_jax.data.splits import Splits, check_splits, load_splits
from cnn_jax.train import agreement, mirror, parallel, pretrained
from cnn_jax.train.calls import is_resident
from cnn_jax.train.profile import Profile
from cnn_jax.train.run import Run
from cnn_jax.train.saving import Saver
from cnn_jax.train.signals import StopSignals
from cnn_jax.train.trackers import DEFAULT, Trackers, find
from cnn_jax.train.workdir import (
    check_same_run,
    locked,
    metrics,
    prepare,
    read_config,
    write_config,
)


def train(
    config: Config,
    workdir: Path | str,
    experiment: str = "",
    data_dir: str | None = None,
    download: bool = False,
    verify: bool = True,
    splits: Splits | None = None,
    init_from: str | None = None,
    mesh: Any = None,
    signals: StopSignals | None = None,
    profile: str | None = None,
    trackers: Sequence[str] = DEFAULT,
) -> list[dict]:
    """Trains to the last epoch; resumes where an earlier call on `workdir` stopped.

    Args:
      config: the run.
      workdir: its folder, created if missing; or its address in a bucket.
      experiment: the name to record.
      data_dir: the folder of the dataset.
      download: downloads the dataset if it is not prepared.
      verify: compares a restored checkpoint with its checksums.
      splits: the examples, if they are loaded already.
      init_from: WORKDIR[:STEP] of the run from which a new run takes its first parameters.
      mesh: the devices; by default the first `config.devices`.
      signals: that ask it to stop, if the caller, in the main thread, receives them.
      profile: START:STOP, the steps of which to write a trace.
      trackers: where it reports to, as `trackers.find` takes them.

    Returns:
      The lines of metrics.jsonl.

    Raises:
      ConfigError, DataError, CheckpointError: the configuration, data or a checkpoint is unusable.
      NotFiniteError: the loss, the parameters or an evaluation became infinite or NaN.
      Preempted: a signal asked the run to end; its state is saved, the same call resumes it.
    """
    # `experiment.load` has checked a command's configuration; nobody has checked one made in Python.
    config = resolve(validate(config))
    mesh = mesh or parallel.make_mesh(config.devices)
    parallel.check_divides(mesh, config.batch_size)
    agreement.check_program(config)
    address = str(workdir).rstrip("/") if is_remote(workdir) else None
    workdir = mirror.folder_of(address) if address else Path(workdir).absolute()
    traced = Profile(profile, workdir) if profile else None
    makers = find(trackers)
    tracking = Trackers(makers if parallel.is_main_process() else {}, workdir)
    if parallel.is_main_process():
        prepare(workdir)
    receiving = contextlib.nullcontext(signals) if signals else StopSignals()
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(receiving)
        check_lock = stack.enter_context(locked(workdir))
        check_lock, changed = stack.enter_context(
            mirror.attached(address, workdir, check_lock, signals)
        )
        check_same_run(workdir, config, metadata={})  # before the data is loaded, which takes time
        source = pretrained.find(init_from, workdir, verify)
        splits = splits or load_splits(config, data_dir, download)
        config, metadata = _described(config, splits, source, mesh)
        check_same_run(workdir, config, metadata)
        order = loader.make_order(config, splits.train)
        saver = Saver(config, workdir, len(splits.train), order, signals, check_lock, changed)
        with Run(config, mesh, splits, signals, saver, tracking, traced) as run:
            saver.start(run.restore(verify, source))
            if parallel.is_main_process():
                write_config(workdir, config, experiment, metadata)
                changed(saver.checkpoints.steps())
                tracking.start(read_config(workdir), metrics(workdir))
            run.epochs()
    return metrics(workdir)


def _described(
    config: Config, splits: Splits, source: pretrained.Source | None, mesh: Any
) -> tuple[Config, dict[str, Any]]:
    """The configuration in numbers, and what config.json keeps of the data and of `source`.

    Raises:
      ConfigError, DataError: the run is not possible with these splits on these devices.
    """
    agreement.check_data(splits, source)
    config = statistics.in_numbers(config, splits.train)
    metadata = check_splits(config, splits)
    is_resident(config, splits.train, mesh)  # refuses what cannot be; no workdir exists yet
    if source:
        metadata["init_from"] = dataclasses.asdict(source)
    return config, metadata
