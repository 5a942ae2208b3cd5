"""The table of all flags, and the parsing of a command's flags."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from cnn_jax import PROGRAM
from cnn_jax.common.errors import ConfigError

REQUIRED, SEVERAL = object(), object()
FlagValues = flags.FlagValues  # inside Command, `flags` is a field


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag that commands can have.

    Attributes:
      define: absl's function for its type.
      default: REQUIRED if the flag must be given. A command's own default can be SEVERAL: the flag
        must be given, and can be repeated. A list lets it be repeated or left out.
      help: one line.
      least: the smallest number that is allowed.
    """

    define: Callable
    default: object
    help: str
    least: int | None = None

    def allowed(self, text: str) -> str:
        """In words, the values that are allowed, for an error that refuses `text`."""
        if self.define is flags.DEFINE_bool:
            return "true or false"
        if self.least is not None and text.lstrip("-").isdecimal():
            return f"at least {self.least}"
        return "a whole number" if self.define is flags.DEFINE_integer else "a number"

    @property
    def is_list(self) -> bool:
        return self.define is flags.DEFINE_multi_string


FLAGS = {
    "experiment": Flag(
        flags.DEFINE_string,
        REQUIRED,
        "a name under experiments/, as in fashion_mnist/lenet, or a path to a .py file",
    ),
    "set": Flag(
        flags.DEFINE_multi_string,
        [],
        "changes a field of the configuration, as in --set batch_size=128 --set model.num_classes=20",
    ),
    "workdir": Flag(
        flags.DEFINE_string,
        REQUIRED,
        "the folder of a run; also gs://BUCKET/RUN or s3://BUCKET/RUN",
    ),
    "init_from": Flag(
        flags.DEFINE_string,
        None,
        "WORKDIR[:STEP] of a trained run: its parameters are the first ones of this run",
    ),
    "data_dir": Flag(
        flags.DEFINE_string,
        None,
        "where TFDS prepared its datasets; TFDS_DATA_DIR, else ~/tensorflow_datasets",
    ),
    "download": Flag(flags.DEFINE_bool, False, "lets TFDS fetch and prepare what is not prepared"),
    "dry_run": Flag(
        flags.DEFINE_bool, False, "does everything once, on two batches, and keeps nothing"
    ),
    "verify": Flag(flags.DEFINE_bool, True, "compares restored checkpoints with their checksums"),
    "checkpoint": Flag(
        flags.DEFINE_string,
        "latest",
        "latest, best (by validation accuracy) or a step; for evaluate also all",
    ),
    "split": Flag(
        flags.DEFINE_string, "test", "train, validation, test, or any split of the dataset"
    ),
    "dataset": Flag(
        flags.DEFINE_string,
        None,
        "one of TFDS's, or a folder or table of your own images; evaluate takes that of the training",
    ),
    "images": Flag(
        flags.DEFINE_multi_string,
        REQUIRED,
        "image files, folders or glob patterns, separated by commas; may be repeated",
    ),
    "top_k": Flag(
        flags.DEFINE_integer,
        None,
        "how many classes to name for each image; default 3, or all if there are fewer",
    ),
    "attribution": Flag(
        flags.DEFINE_bool, False, "draws what the class of each image depends on, of the first 16"
    ),
    "output": Flag(flags.DEFINE_string, None, "where to write"),
    "profile": Flag(
        flags.DEFINE_string,
        None,
        "START:STOP, training steps counted from 0: writes a trace of them, prints the longest parts",
    ),
    "tracker": Flag(
        flags.DEFINE_list,
        ["tensorboard"],
        "where the run reports: tensorboard, csv, wandb, mlflow or a .py file, separated by commas",
    ),
    "format": Flag(flags.DEFINE_string, "stablehlo", "stablehlo or onnx"),
    "watch": Flag(
        flags.DEFINE_bool, False, "evaluates each new checkpoint until the training ends"
    ),
    "temperature": Flag(
        flags.DEFINE_bool,
        False,
        "fits a temperature on the validation split, and keeps it in temperature.json",
    ),
    "corruptions": Flag(
        flags.DEFINE_bool, False, "evaluates on images with noise, blur, fog, JPEG and others too"
    ),
    "shifts": Flag(flags.DEFINE_bool, False, "evaluates on images shifted and rotated too"),
    "predictions": Flag(
        flags.DEFINE_string, None, "a CSV file for the prediction of every example"
    ),
    "input_size": Flag(
        flags.DEFINE_string, None, "image size as SIZE, HEIGHTxWIDTH or HEIGHTxWIDTHxCHANNELS"
    ),
    "coordinator": Flag(
        flags.DEFINE_string, None, "host:port of process 0 of a run of several processes"
    ),
    "processes": Flag(
        flags.DEFINE_integer, None, "how many processes take part in the run", least=1
    ),
    "process": Flag(flags.DEFINE_integer, None, "which of them this is, from 0"),
    "distributed": Flag(
        flags.DEFINE_bool,
        None,
        "asks SLURM, Open MPI, Kubernetes or the TPU pod which processes take part",
    ),
    "topology": Flag(
        flags.DEFINE_string,
        REQUIRED,
        "the devices to compile for: cpu, a slice as v5e:2x2, or GPUs as h100, h100:8 or h100:2x8",
    ),
    "scaling": Flag(
        flags.DEFINE_bool, False, "prints how the cost of a training step grows with the devices"
    ),
    "dump": Flag(flags.DEFINE_string, None, "a file to which the compiled text is written"),
    "networks": Flag(
        flags.DEFINE_list, [], "which to measure, separated by commas; all by default"
    ),
    "batch_size": Flag(flags.DEFINE_integer, 128, "examples a step", least=1),
    "steps": Flag(
        flags.DEFINE_integer, None, "training steps; by default an epoch, but 100 to 1000", least=20
    ),
    "peers": Flag(
        flags.DEFINE_bool, False, "measures PyTorch and Keras too, installed into .venv-peers"
    ),
    "formulations": Flag(
        flags.DEFINE_bool,
        False,
        "measures each convolution of the networks in every formulation; --output draws a PNG",
    ),
    "rounds": Flag(
        flags.DEFINE_integer, 5, "how often each contender is measured, in turn", least=1
    ),
    "seconds": Flag(flags.DEFINE_float, 2.0, "how long each time"),
    "speedrun": Flag(
        flags.DEFINE_bool, False, "trains cifar10/speedrun --seeds times with fresh seeds instead"
    ),
    "peer": Flag(
        flags.DEFINE_string,
        None,
        "with --speedrun, the original's file in PyTorch, airbench94_muon.py, to run beside it",
    ),
    "device_check": Flag(
        flags.DEFINE_bool,
        False,
        "checks and measures an accelerator instead, in eight minutes, and writes into --output",
    ),
    "tiny": Flag(flags.DEFINE_bool, False, "with --device_check, does as little as possible"),
    "write": Flag(flags.DEFINE_bool, False, "puts the tables into experiments/RESULTS.md"),
    "only": Flag(flags.DEFINE_list, [], "which experiments, separated by commas; all by default"),
    "seeds": Flag(
        flags.DEFINE_integer, None, "how many runs of each, with the seeds 0, 1, ...", least=1
    ),
    "launcher": Flag(flags.DEFINE_string, "local", "where the runs run: local or slurm"),
    "parallel": Flag(
        flags.DEFINE_integer,
        None,
        "how many runs at once; by default one on this machine, with slurm all",
        least=1,
    ),
    "slurm": Flag(
        flags.DEFINE_string,
        None,
        "options of each job, as in --slurm='partition=gpu time=120 gpus=1 cpus=8'; time in minutes",
    ),
    "rebuild": Flag(
        flags.DEFINE_bool, False, "trains nothing, and writes RESULTS.md from the records there are"
    ),
    "canvas": Flag(flags.DEFINE_integer, 512, "height and width of the canvas, in pixels", least=1),
    "topic": Flag(
        flags.DEFINE_string, REQUIRED, "conv, pool, padding, dense, parameters or receptive_field"
    ),
    "size": Flag(flags.DEFINE_integer, None, "height and width of the data"),
    "kernel": Flag(flags.DEFINE_integer, None, "height and width of the kernel, or of the pooling"),
    "stride": Flag(flags.DEFINE_integer, None, "pixels from one window to the next"),
    "padding": Flag(flags.DEFINE_string, None, "same, valid, or how many zeros on each side"),
    "channels": Flag(
        flags.DEFINE_integer, None, "channels of the data, or inputs of a dense layer"
    ),
    "filters": Flag(flags.DEFINE_integer, None, "filters, or outputs of a dense layer"),
    "debug": Flag(flags.DEFINE_bool, False, "shows the traceback of an error"),
    "shell": Flag(flags.DEFINE_string, REQUIRED, "bash or zsh"),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its name, its function, and its flags with their defaults for this command.

    Attributes:
      positional: the flags whose values may follow the command without --name=, in this order. The
        last one takes all remaining values if it can be repeated.
    """

    name: str
    run: Callable[[FlagValues], int | None]
    flags: dict[str, object]
    positional: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]

    def parse(self, arguments: Sequence[str]) -> FlagValues:
        """The values of this command's flags.

        Raises:
          ConfigError: an unknown flag, a value of the wrong type, a missing flag, or anything else
            on the command line.
        """
        values = self._definitions()
        try:
            alone = values([self.name, *arguments])[1:]
        except flags.UnrecognizedFlagError as error:
            raise self._unknown(error.flagname) from None
        except flags.IllegalFlagValueError as error:  # "flag --top_k=x: " and Python's reason
            given = str(error).removeprefix("flag ").partition(": ")[0]
            name, _, text = given.lstrip("-").partition("=")
            if "already defined" in str(error):
                raise ConfigError(f"{given}: is given twice; leave one of the two out") from None
            allowed = FLAGS[name].allowed(text) if name in FLAGS else "valid"
            raise ConfigError(f"{given}: must be {allowed}") from None
        except (flags.Error, ValueError) as error:  # ValueError: --nodry_run=3
            raise ConfigError(str(error)) from None
        self._assign(values, alone)
        for flag, default in self.flags.items():
            value: Any = values[flag].value
            if default in (REQUIRED, SEVERAL) and value in (None, []):
                raise ConfigError(f"--{flag}: {self.name} needs it ({FLAGS[flag].help})")
            if "" in (value if self._takes_several(flag) else [value]):
                raise ConfigError(f"--{flag}=: is empty; leave it out, or give it a value")
        return values

    def _assign(self, values: FlagValues, alone: Sequence[str]) -> None:
        """Assigns the values without --name= to the positional flags."""
        left = list(alone)
        for flag in self.positional:
            if not left:
                return
            if self._takes_several(flag):
                values[flag].value = [*(values[flag].value or []), *left]
                return
            if not values[flag].present:
                values[flag].value = left.pop(0)
        if left:
            takes = " ".join(flag.upper() for flag in self.positional) or "no word"
            given = [flag for flag in self.positional if values[flag].present]
            raise ConfigError(
                f"{left[0]}: {self.name} cannot use this word; it takes {takes} and flags, which are "
                "written --name=value"
                + "".join(f"; --{flag}={values[flag].value} is given already" for flag in given)
            )

    def _takes_several(self, flag: str) -> bool:
        default = self.flags[flag]
        several = default is SEVERAL or isinstance(default, list)
        return FLAGS[flag].is_list or (several and FLAGS[flag].define is flags.DEFINE_string)

    def _unknown(self, flag: str) -> ConfigError:
        from cnn_jax.config import Config  # imports Flax and Optax: half a second

        if "set" in self.flags and flag in Config.__dataclass_fields__:
            return ConfigError(
                f"--{flag}: is a field of the configuration; write --set {flag}=VALUE"
            )
        written = {name: f"--{name}" for name in self.flags}
        if "set" in self.flags:
            written = {f: f"--set {f}=VALUE" for f in Config.__dataclass_fields__} | written
        near = difflib.get_close_matches(flag, written, n=3, cutoff=0.6)
        return ConfigError(
            f"--{flag}: {self.name} has no such flag; {'nearest' if near else 'it has'}: "
            + ", ".join(written[name] for name in near or self.flags)
        )

    def usage(self) -> str:
        """The text of `./launch.sh COMMAND --help`."""
        words = [
            flag.upper() + (" ..." if self._takes_several(flag) else "") for flag in self.positional
        ]
        lines = [" ".join([PROGRAM, self.name, *words]) + f": {self.title}", ""]
        for flag, default in self.flags.items():
            text = ",".join(default) if isinstance(default, list) else default
            shown = "" if default in (None, [], False, REQUIRED, SEVERAL) else f" (default {text})"
            if self._takes_several(flag) and not FLAGS[flag].is_list:
                shown += "; may be repeated"
            lines.append(f"  --{flag:14}{FLAGS[flag].help}{shown}")
        return "\n".join(lines)

    def _definitions(self) -> FlagValues:
        values = flags.FlagValues()
        values.set_gnu_getopt()  # words and flags in any order
        for name, default in self.flags.items():
            flag = FLAGS[name]
            define: Any = flags.DEFINE_multi_string if self._takes_several(name) else flag.define
            options: dict[str, Any] = {} if flag.least is None else {"lower_bound": flag.least}
            if define is not flags.DEFINE_multi_string:
                options["allow_overwrite"] = False  # refuses a repeated flag
            default = None if default in (REQUIRED, SEVERAL) else default
            define(name, default, flag.help, flag_values=values, **options)
        return values
