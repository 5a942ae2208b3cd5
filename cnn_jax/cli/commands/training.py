"""The commands that train."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cnn_jax import PROGRAM
from cnn_jax.cli.registry import command
from cnn_jax.common import environment
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import local_path
from cnn_jax.common.remote import is_remote

if TYPE_CHECKING:  # it imports JAX, which not all commands need
    from cnn_jax.config import Config


@command()
def list_(values: flags.FlagValues) -> None:
    """Shows all experiments."""
    from cnn_jax.config import experiment

    known = experiment.names()
    width = max(map(len, known)) + 2
    for name in known:
        print(f"{name:{width}}{experiment.title(name)}")


@command(
    "experiment",
    "set",
    "workdir",
    "init_from",
    "data_dir",
    "download",
    "dry_run",
    "seeds",
    "verify",
    "profile",
    "tracker",
    "distributed",
    "coordinator",
    "processes",
    "process",
    workdir=None,
    words="experiment",
)
def train(values: flags.FlagValues) -> None:
    """Trains an experiment, going on where an earlier call stopped."""
    from cnn_jax.train.signals import StopSignals

    with StopSignals():  # nothing to save yet: a signal ends the process at once
        from cnn_jax.config import experiment
        from cnn_jax.train import cluster, loop, lost, parallel, processes

        config = experiment.load(values.experiment, values.set)
        _check_trackers(values)
        if place := cluster.find(
            values.distributed, values.coordinator, values.processes, values.process
        ):
            processes.start_processes(
                place.coordinator, place.processes, place.process, config.heartbeat_seconds
            )
        environment.check_devices()
    if values.dry_run:
        from cnn_jax.train import dry_run

        dry_run.dry_run(config, values.data_dir, values.download, values.init_from)
        return
    name = experiment.short_name(values.experiment)
    given = values.workdir or f"runs/{name}"
    if values.seeds:
        _train_seeds(config, local_path(given), name, values)
        return
    workdir = given if is_remote(given) else local_path(given)
    with lost.named():
        lines = loop.train(
            config,
            workdir,
            name,
            values.data_dir,
            values.download,
            values.verify,
            init_from=values.init_from,
            profile=values.profile,
            trackers=values.tracker,
        )
    if parallel.is_main_process():
        _say_what_is_next(name, workdir, lines)


def _check_trackers(values: flags.FlagValues) -> None:
    from cnn_jax.train import trackers

    if not values.tracker:
        raise ConfigError("--tracker=: is empty; leave it out, or give it a value")
    trackers.find(values.tracker)


def _say_what_is_next(name: str, workdir: Path | str, lines: list[dict]) -> None:
    if lines and "test_accuracy" in (last := lines[-1]):
        print(
            f"test accuracy {last['test_accuracy']:.4f} after epoch {last['epoch']}, in {workdir}"
        )
    print(f"next: {PROGRAM} evaluate {shlex.quote(str(workdir))}")
    if name == "quickstart":
        run = shlex.quote(str(workdir))
        print(f"its report, {workdir}/report/index.html: {PROGRAM} report {run}")
        print(f"to play with it, {workdir}/playground.html: {PROGRAM} playground {run}")
        print(f"then the real data: {PROGRAM} train fashion_mnist/lenet --download")


def _train_seeds(config: "Config", workdir: Path, name: str, values: flags.FlagValues) -> None:
    from cnn_jax.studies import markdown
    from cnn_jax.train import seeds

    for change in values.set:
        if change.partition("=")[0].strip() == "seed":
            raise ConfigError(
                f"--set {change}: must not be given with --seeds={values.seeds}, which sets the "
                "seeds 0, 1, ...; leave one of the two out"
            )
    given = values.data_dir, values.download, values.verify, values.init_from, values.tracker
    ended = seeds.train_seeds(config, values.seeds, workdir, name, *given)
    accuracy = markdown.spread([lines[-1]["test_accuracy"] for lines in ended])
    print(f"test accuracy {accuracy} (n = {len(ended)}), in {workdir}/seed_0 and so on")
    print(f"next: {PROGRAM} evaluate {shlex.quote(str(workdir / 'seed_0'))}")


@command(
    "experiment",
    "set",
    "steps",
    "init_from",
    "output",
    "data_dir",
    "download",
    words="experiment",
)
def lr_finder(values: flags.FlagValues) -> None:
    """Raises the learning rate step by step, draws the loss, and suggests a rate."""
    from cnn_jax.config import experiment
    from cnn_jax.studies import lr_finder as finder

    config = experiment.load(values.experiment, values.set)
    environment.check_devices()
    name = experiment.short_name(values.experiment)
    output = local_path(values.output or f"runs/lr_finder/{name}.png")
    found = finder.find(
        config, values.steps, values.data_dir, values.download, values.init_from, output
    )
    print(
        f"the loss falls fastest near {found.steepest:.2g}, and is lowest near {found.lowest:.2g}"
    )
    print(f"written to {output}")
    print(f"to use their geometric mean: --set learning_rate={found.rate:.2g}")


@command(
    "experiment",
    "set",
    "seeds",
    "workdir",
    "data_dir",
    "download",
    "tracker",
    "launcher",
    "parallel",
    "slurm",
    seeds=3,
    workdir=None,
    words="experiment",
)
def sweep(values: flags.FlagValues) -> int:
    """Trains every combination of --set field=value,value over several seeds, and compares them."""
    from cnn_jax.config import experiment
    from cnn_jax.studies import launcher
    from cnn_jax.studies import sweep as sweeps

    _check_trackers(values)
    launch = launcher.choose(values.launcher, values.parallel, values.slurm or "")
    workdir = local_path(values.workdir or f"runs/sweep/{experiment.short_name(values.experiment)}")
    given = values.data_dir, values.download, launch, values.tracker
    return sweeps.sweep(values.experiment, values.set, values.seeds, workdir, *given)


@command(
    "only",
    "seeds",
    "workdir",
    "data_dir",
    "download",
    "launcher",
    "parallel",
    "slurm",
    "output",
    "rebuild",
    workdir="runs/reproduce",
)
def reproduce(values: flags.FlagValues) -> int:
    """Trains what experiments/RESULTS.md tells of, keeps a record of each run, rebuilds the tables."""
    from cnn_jax.config import experiment
    from cnn_jax.studies import launcher
    from cnn_jax.studies.reproduce import plan, run, table

    if values["only"].present and not values.only:
        raise ConfigError("--only=: must name at least one experiment; leave it out for all")
    rows = plan.choose(plan.ROWS, values.only, values.seeds)
    launch = launcher.choose(values.launcher, values.parallel, values.slurm or "")
    output = local_path(values.output) if values.output else experiment.RESULTS
    if values.rebuild:
        for name in ("only", "seeds", "download", "launcher", "parallel", "slurm"):
            if values[name].present:
                raise ConfigError(
                    f"--{name}: must not be given with --rebuild, which trains nothing; leave it out"
                )
        table.rebuild(output)
        print(f"written to {output / 'RESULTS.md'}")
        return 0
    workdir = local_path(values.workdir)
    given = values.data_dir, plan.ROWS, values.download, launch
    code = run.reproduce(rows, workdir, output, *given)
    print(f"written to {output / 'RESULTS.md'}")
    return code
