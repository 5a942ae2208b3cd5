"""The commands that measure or compile training steps."""

from absl import flags

from cnn_jax.cli.flags import SEVERAL
from cnn_jax.cli.registry import command
from cnn_jax.common import environment
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import local_path


@command(
    "networks",
    "batch_size",
    "peers",
    "formulations",
    "rounds",
    "seconds",
    "write",
    "speedrun",
    "peer",
    "seeds",
    "device_check",
    "tiny",
    "output",
    "data_dir",
    seeds=5,
)
def benchmark(values: flags.FlagValues) -> int | None:
    """Measures the training steps of the architectures, alone or beside PyTorch and Keras."""
    from cnn_jax.studies.benchmark import formulations, run, speedrun
    from cnn_jax.studies.device_check import run as device_check

    if values.peer and not values.speedrun:
        raise ConfigError(f"--peer={values.peer}: needs --speedrun")
    if values.device_check:
        output = local_path(values.output or "runs/device_check")
        given = values.networks, values.write
        return device_check.check(output, values.tiny, values.data_dir, *given)
    if values.speedrun:
        peer: list[dict] = []
        if values.peer:  # first, as JAX takes most of a GPU's memory
            peer = speedrun.original(local_path(values.peer), values.seeds)
        environment.check_devices()
        speedrun.speedrun(values.seeds, values.data_dir, peer)
        return None
    budget = values.batch_size, values.rounds, values.seconds
    if values.formulations:
        picture = local_path(values.output) if values.output else None
        formulations.compare(values.networks, *budget, values.write, picture)
    else:
        run.benchmark(values.networks, values.peers, *budget, values.write)
    return None


@command(
    "experiment",
    "topology",
    "set",
    "input_size",
    "data_dir",
    "dump",
    "write",
    "scaling",
    experiment=SEVERAL,
    words="experiment",
)
def compile_(values: flags.FlagValues) -> None:
    """Compiles the steps of an experiment for a TPU, GPU or CPU, which need not be there."""
    from cnn_jax.studies.compile import run

    run.compile_all(
        values.experiment,
        values.set,
        values.topology,
        values.input_size,
        values.data_dir,
        local_path(values.dump) if values.dump else None,
        values.write,
        values.scaling,
    )
