"""Every flag there is, and the reading of a command's flags from the command line."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence

from absl import flags

from cnn_jax import PROGRAM
from cnn_jax.common.errors import ConfigError

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
        "image files, folders or glob patterns, separated by commas; may be repeated",
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
    "only": (flags.DEFINE_list, [], "which experiments, separated by commas; all by default"),
    "seeds": (flags.DEFINE_integer, None, "how many runs of each, with the seeds 0, 1, ..."),
    "rebuild": (
        flags.DEFINE_bool,
        False,
        "trains nothing, and writes RESULTS.md from the records there are",
    ),
    "canvas": (flags.DEFINE_integer, 512, "height and width of the canvas, in pixels"),
    "topic": (
        flags.DEFINE_string,
        REQUIRED,
        "conv, pool, padding, dense, parameters or receptive_field",
    ),
    "size": (flags.DEFINE_integer, None, "height and width of the data"),
    "kernel": (flags.DEFINE_integer, None, "height and width of the kernel, or of the pooling"),
    "stride": (flags.DEFINE_integer, None, "pixels from one window to the next"),
    "padding": (flags.DEFINE_string, None, "same, valid, or how many zeros on each side"),
    "channels": (flags.DEFINE_integer, None, "channels of the data, or inputs of a dense layer"),
    "filters": (flags.DEFINE_integer, None, "filters, or outputs of a dense layer"),
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
    first: str | None = None  # the flag whose value may stand alone behind the command's name

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
        if self.first and arguments and not arguments[0].startswith("-"):
            arguments = [f"--{self.first}={arguments[0]}", *arguments[1:]]
        try:
            rest = values([self.name, *arguments])[1:]
        except flags.UnrecognizedFlagError as error:
            from cnn_jax.config import Config  # Flax and Optax, half a second

            if "set" in self.flags and error.flagname in Config.__dataclass_fields__:
                raise ConfigError(
                    f"--{error.flagname}: is a field of the configuration; write "
                    f"--set {error.flagname}=VALUE"
                ) from None
            near = difflib.get_close_matches(error.flagname, self.flags, n=3, cutoff=0.5)
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
        first = f" {self.first.upper()}" if self.first else ""
        lines = [f"{PROGRAM} {self.name}{first}: {self.title}", ""]
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
