"""The commands of ./launch.sh: the flags of each, and the function it calls."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from cnn_jax.errors import ConfigError

# Each flag once: name -> (absl's DEFINE function, default, help). A default of REQUIRED has none; a
# command that gives SEVERAL as one needs the flag too, and takes it more than once.
REQUIRED, SEVERAL = object(), object()
FLAGS = {
    "experiment": (
        flags.DEFINE_string,
        REQUIRED,
        "a name under experiments/, as in fashion_mnist/lenet, or a path to a .py file",
    ),
    "set": (
        flags.DEFINE_multi_string,
        [],
        "changes a field of the configuration, as in --set batch_size=128 --set model.num_classes=20",
    ),
    "workdir": (flags.DEFINE_string, REQUIRED, "the folder of a run"),
    "data_dir": (
        flags.DEFINE_string,
        None,
        "where TFDS prepared its datasets; TFDS_DATA_DIR, else ~/tensorflow_datasets",
    ),
    "download": (flags.DEFINE_bool, False, "lets TFDS fetch and prepare what is not prepared"),
    "dry_run": (
        flags.DEFINE_bool,
        False,
        "does everything once, on two batches, and keeps nothing",
    ),
    "verify": (flags.DEFINE_bool, True, "compares restored checkpoints with their checksums"),
    "checkpoint": (
        flags.DEFINE_string,
        "latest",
        "latest, best (by validation accuracy) or a step",
    ),
    "split": (flags.DEFINE_string, "test", "train, validation, test, or any split of the dataset"),
    "dataset": (flags.DEFINE_string, None, "another dataset than the one of the training"),
    "images": (
        flags.DEFINE_multi_string,
        REQUIRED,
        "PNG or JPEG files, folders or glob patterns, separated by commas; may be repeated",
    ),
    "top_k": (
        flags.DEFINE_integer,
        None,
        "how many classes to name for each image; default 3, or all if there are fewer",
    ),
    "output": (flags.DEFINE_string, None, "where to write"),
    "input_size": (
        flags.DEFINE_string,
        None,
        "image size as SIZE, HEIGHTxWIDTH or HEIGHTxWIDTHxCHANNELS",
    ),
    "coordinator": (
        flags.DEFINE_string,
        None,
        "host:port of process 0 of a run of several processes",
    ),
    "processes": (flags.DEFINE_integer, 1, "how many processes take part in the run"),
    "process": (flags.DEFINE_integer, 0, "which of them this is, from 0"),
    "networks": (flags.DEFINE_list, [], "which to measure, separated by commas; all by default"),
    "batch_size": (flags.DEFINE_integer, 128, "examples a step"),
    "peers": (
        flags.DEFINE_bool,
        False,
        "measures PyTorch and Keras too, installed into .venv-peers",
    ),
    "rounds": (flags.DEFINE_integer, 5, "how often each contender is measured, in turn"),
    "seconds": (flags.DEFINE_float, 2.0, "how long each time"),
    "write": (flags.DEFINE_bool, False, "puts the tables into experiments/RESULTS.md"),
    "debug": (flags.DEFINE_bool, False, "shows the traceback of an error"),
}

ALLOWED = {
    flags.DEFINE_bool: "true or false",
    flags.DEFINE_integer: "a whole number",
    flags.DEFINE_float: "a number",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it is called, what it does, and its flags with their own defaults."""

    name: str
    run: Callable[[flags.FlagValues], int | None]
    flags: dict[str, object]

    @property
    def title(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]

    def parse(self, arguments: Sequence[str]) -> flags.FlagValues:
        """The values of this command's flags.

        Raises:
          ConfigError: an unknown flag, a value of the wrong type, a missing flag, or anything else
            on the command line.
        """
        values = self._definitions()
        try:
            rest = values([self.name, *arguments])[1:]
        except flags.UnrecognizedFlagError as error:
            near = difflib.get_close_matches(error.flagname, self.flags, n=3, cutoff=0.4)
            raise ConfigError(
                f"--{error.flagname}: {self.name} has no such flag; "
                f"{'nearest' if near else 'it has'}: "
                + ", ".join(f"--{flag}" for flag in near or self.flags)
            ) from None
        except flags.IllegalFlagValueError as error:  # "flag --top_k=x: ", then words of Python's
            given = str(error).removeprefix("flag ").partition(": ")[0]
            name = given.partition("=")[0].lstrip("-")
            allowed = ALLOWED[FLAGS[name][0]] if name in FLAGS else "valid"
            raise ConfigError(f"{given}: must be {allowed}") from None
        except (flags.Error, ValueError) as error:  # ValueError: --nodry_run=3
            raise ConfigError(str(error)) from None
        if rest:
            raise ConfigError(
                f"{rest[0]}: unexpected; flags are written --name=value, patterns in quotes"
            )
        for flag, default in self.flags.items():
            value = values[flag].value
            if default in (REQUIRED, SEVERAL) and value in (None, []):
                raise ConfigError(f"--{flag}: {self.name} needs it ({FLAGS[flag][2]})")
            multi = default is SEVERAL or FLAGS[flag][0] is flags.DEFINE_multi_string
            if "" in (value if multi else [value]):
                raise ConfigError(f"--{flag}=: is empty; leave it out, or give it a value")
        return values

    def usage(self) -> str:
        """The text of `./launch.sh COMMAND --help`."""
        lines = [f"./launch.sh {self.name}: {self.title}", ""]
        for flag, default in self.flags.items():
            shown = "" if default in (None, [], False, REQUIRED) else f" (default {default})"
            shown = "; may be repeated" if default is SEVERAL else shown
            lines.append(f"  --{flag:14}{FLAGS[flag][2]}{shown}")
        return "\n".join(lines)

    def _definitions(self) -> flags.FlagValues:
        values = flags.FlagValues()
        for flag, default in self.flags.items():
            define, _, text = FLAGS[flag]
            define = flags.DEFINE_multi_string if default is SEVERAL else define
            default = None if default in (REQUIRED, SEVERAL) else default
            define(flag, default, text, flag_values=values)
        return values


COMMANDS: dict[str, Command] = {}


def command(*names: str, **defaults: object) -> Callable:
    """Registers a function as the command of its name.

    Args:
      *names: its flags.
      **defaults: defaults that differ from those in FLAGS.
    """

    def register(run: Callable) -> Callable:
        own = {name: defaults.get(name, FLAGS[name][1]) for name in (*names, "debug")}
        COMMANDS[run.__name__] = Command(run.__name__, run, own)
        return run

    return register


def find(name: str) -> Command:
    """The command called `name`.

    Raises:
      ConfigError: there is none.
    """
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise ConfigError(
            f"{name}: no such command; {'nearest' if near else 'there are'}: "
            + ", ".join(near or COMMANDS)
        )
    return COMMANDS[name]


def overview() -> str:
    """The text of `./launch.sh --help`."""
    lines = ["usage: ./launch.sh COMMAND [--flags]", ""]
    lines += [f"  {name:12}{entry.title}" for name, entry in COMMANDS.items()]
    return "\n".join([*lines, "", "./launch.sh COMMAND --help shows a command's flags."])


@command()
def list(values: flags.FlagValues) -> None:
    """Shows all experiments."""
    from cnn_jax import experiment

    known = experiment.names()
    width = max(map(len, known)) + 2
    for name in known:
        print(f"{name:{width}}{experiment.title(name)}")


@command(
    "experiment",
    "set",
    "workdir",
    "data_dir",
    "download",
    "dry_run",
    "verify",
    "coordinator",
    "processes",
    "process",
    workdir=None,
)
def train(values: flags.FlagValues) -> None:
    """Trains an experiment, going on where an earlier call stopped."""
    from cnn_jax.signals import StopSignals

    with StopSignals():  # there is nothing to save: a signal ends the process at once
        from cnn_jax import experiment, loop, parallel

        config = experiment.load(values.experiment, values.set)
        if values.coordinator or values.processes != 1 or values.process:
            parallel.start_processes(
                values.coordinator, values.processes, values.process, config.heartbeat_seconds
            )
    if values.dry_run:
        loop.dry_run(config, values.data_dir, values.download)
        return
    name = Path(values.experiment).stem if values.experiment.endswith(".py") else values.experiment
    workdir = _path(values.workdir or f"runs/{name}")
    lines = loop.train(
        config, workdir, name, values.data_dir, values.download, verify=values.verify
    )
    if not parallel.is_main_process():
        return
    if lines and "test_accuracy" in (last := lines[-1]):
        print(
            f"test accuracy {last['test_accuracy']:.4f} after epoch {last['epoch']}, in {workdir}"
        )
    print(f"next: ./launch.sh evaluate --workdir={workdir}")
    if name == "quickstart":
        print("then the real data: ./launch.sh train --experiment=fashion_mnist/lenet --download")


@command(
    "workdir", "checkpoint", "split", "dataset", "data_dir", "experiment", "verify", experiment=None
)
def evaluate(values: flags.FlagValues) -> None:
    """Restores a checkpoint and evaluates it on every example of a split."""
    from cnn_jax import evaluate as evaluation
    from cnn_jax import tables

    run = _load_run(values)
    report = evaluation.evaluate(run, values.split, values.dataset, values.data_dir)
    tables.print_evaluation(report)
    print(f"written to {run.workdir / 'evaluation.json'}")


@command(
    "workdir", "images", "checkpoint", "top_k", "output", "experiment", "verify", experiment=None
)
def predict(values: flags.FlagValues) -> int:
    """Restores a checkpoint and names the classes of image files."""
    from cnn_jax import predict as prediction
    from cnn_jax import tables

    run = _load_run(values)
    output = _path(values.output) if values.output else run.workdir / "predictions"
    predictions, broken = prediction.predict(run, values.images, output, values.top_k)
    tables.print_predictions(predictions)
    print(f"written to {output / 'predictions.csv'}")
    return prediction.BROKEN_IMAGES_EXIT_CODE if broken else 0


@command("experiment", "set", "input_size", "data_dir")
def summary(values: flags.FlagValues) -> None:
    """Shows an architecture: layers, output shapes, parameters, FLOPs."""
    from cnn_jax import experiment, tables
    from cnn_jax import summary as summaries

    config = experiment.load(values.experiment, values.set)
    shape = summaries.input_shape(config, values.input_size, values.data_dir)
    tables.print_summary(summaries.summarise(config.model, shape))


@command("workdir")
def verify(values: flags.FlagValues) -> int:
    """Checks every checkpoint of a workdir against its checksums."""
    from cnn_jax import checkpoint

    return checkpoint.verify(_path(values.workdir))


@command("networks", "batch_size", "peers", "rounds", "seconds", "write")
def benchmark(values: flags.FlagValues) -> None:
    """Measures the training steps of the architectures, alone or beside PyTorch and Keras."""
    from cnn_jax.benchmark import run

    run.benchmark(
        values.networks,
        values.batch_size,
        values.peers,
        values.rounds,
        values.seconds,
        values.write,
    )


def _path(text: str) -> Path:
    # The shell leaves the ~ of --workdir=~/runs as it is.
    return Path(text).expanduser()


def _load_run(values: flags.FlagValues):
    """The run of --workdir; --experiment is needed only for a model of the user's own."""
    from cnn_jax import evaluate as evaluation
    from cnn_jax import experiment

    model = experiment.load(values.experiment).model if values.experiment else None
    return evaluation.load_run(_path(values.workdir), values.checkpoint, model, values.verify)


@command(
    "workdir",
    "checkpoint",
    "output",
    "data_dir",
    "experiment",
    "verify",
    workdir=SEVERAL,
    experiment=None,
)
def report(values: flags.FlagValues) -> None:
    """Draws what a run learned, or how several compare, as one HTML page."""
    from cnn_jax.report import page

    path = page.report(
        [_path(workdir) for workdir in values.workdir],
        values.checkpoint,
        values.experiment,
        values.data_dir,
        _path(values.output) if values.output else None,
        values.verify,
    )
    print(f"written to {path}")
