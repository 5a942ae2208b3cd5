"""Several seeds of one run at once, in one process: a thread for each, and a device in turn.

A small network's step is too short for all cores, and the host's work between two steps leaves them
idle. Each seed's run is the same program as alone on one device, so its bits are equal too. A step
under jax.vmap over the seeds would turn convolutions into grouped ones, which XLA:CPU computes
slowly.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from cnn_jax.common.errors import CnnJaxError, ConfigError
from cnn_jax.config import Config
from cnn_jax.config.paths import resolve
from cnn_jax.config.validate import validate
from cnn_jax.data.splits import load_splits
from cnn_jax.train import loop, parallel, progress
from cnn_jax.train.signals import StopSignals


def train_seeds(
    config: Config,
    seeds: int,
    workdir: Path,
    experiment: str = "",
    data_dir: str | None = None,
    download: bool = False,
    verify: bool = True,
    init_from: str | None = None,
) -> list[list[dict]]:
    """Trains `config` with the seeds 0 to `seeds` - 1 at once; resumes each where it stopped.

    Seed S has the workdir WORKDIR/seed_S, as a run of `loop.train` on one device has it, bit for
    bit. A run that fails does not stop the others.

    Returns:
      The lines of metrics.jsonl of each seed.

    Raises:
      ConfigError: `config.devices` is more than 1, or several processes take part.
      CnnJaxError: as `loop.train`, of the first seed that failed, after all have ended.
    """
    if (config.devices or 1) > 1 or jax.process_count() > 1:
        raise ConfigError(
            f"--seeds={seeds}: each seed trains on one device of one process; leave out devices and "
            "--processes"
        )
    config = resolve(validate(config))
    splits = load_splits(config, data_dir, download)  # do not depend on the seed
    devices = jax.local_devices()

    def one(seed: int, signals: StopSignals) -> list[dict] | CnnJaxError:
        device = devices[seed % len(devices)]
        progress.PREFIX.set(f"seed {seed}: ")
        own = dataclasses.replace(config, seed=seed)
        with jax.default_device(device):
            try:
                return loop.train(
                    own,
                    workdir / f"seed_{seed}",
                    experiment,
                    verify=verify,
                    splits=splits,
                    init_from=init_from,
                    mesh=parallel.make_mesh(1, [device]),
                    signals=signals,
                )
            except CnnJaxError as error:
                return error

    with StopSignals() as signals, ThreadPoolExecutor(seeds) as pool:
        ended = list(pool.map(lambda seed: one(seed, signals), range(seeds)))
    lines = []
    for result in ended:
        if isinstance(result, CnnJaxError):
            raise result
        lines.append(result)
    return lines
