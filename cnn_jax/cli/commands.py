"""The commands of ./launch.sh: the flags of each, and the function it calls."""

import dataclasses
import difflib
import functools
import shlex
from collections.abc import Callable
from pathlib import Path

from absl import flags

from cnn_jax import PROGRAM
from cnn_jax.cli.flags import FLAGS, REQUIRED, SEVERAL, Command
from cnn_jax.common import environment, files
from cnn_jax.common.errors import ConfigError

COMMANDS: dict[str, Command] = {}


def command(*names: str, words: str = "", **defaults: object) -> Callable:
    """Registers a function as a command with the function's name.

    Args:
      *names: its flags.
      words: the flags whose values may follow the command without --name=, in this order.
      **defaults: defaults that differ from those in FLAGS.
    """

    def register(run: Callable) -> Callable:
        own = {name: defaults.get(name, FLAGS[name].default) for name in (*names, "debug")}
        name = run.__name__.rstrip("_")  # list_: the name list would hide Python's list
        COMMANDS[name] = Command(name, run, own, tuple(words.split()))
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
    lines = [f"usage: {PROGRAM} COMMAND [--flags]", ""]
    lines += [f"  {name:12}{entry.title}" for name, entry in COMMANDS.items()]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help shows a command's flags."])


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
        if place := cluster.find(
            values.distributed, values.coordinator, values.processes, values.process
        ):
            processes.start_processes(*dataclasses.astuple(place), config.heartbeat_seconds)
        environment.check_devices()
    if values.dry_run:
        from cnn_jax.train import dry_run

        dry_run.dry_run(config, values.data_dir, values.download, values.init_from)
        return
    name = experiment.short_name(values.experiment)
    workdir = _path(values.workdir or f"runs/{name}")
    if values.seeds:
        _train_seeds(config, workdir, name, values)
        return
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
        )
    if not parallel.is_main_process():
        return
    if lines and "test_accuracy" in (last := lines[-1]):
        print(
            f"test accuracy {last['test_accuracy']:.4f} after epoch {last['epoch']}, in {workdir}"
        )
    print(f"next: {PROGRAM} evaluate {shlex.quote(str(workdir))}")
    if name == "quickstart":
        print(f"to look inside, in a browser: {PROGRAM} playground {shlex.quote(str(workdir))}")
        print(f"then the real data: {PROGRAM} train fashion_mnist/lenet --download")


def _train_seeds(config, workdir: Path, name: str, values: flags.FlagValues) -> None:
    from cnn_jax.studies import markdown
    from cnn_jax.train import seeds

    for change in values.set:
        if change.partition("=")[0].strip() == "seed":
            raise ConfigError(
                f"--set {change}: must not be given with --seeds={values.seeds}, which sets the "
                "seeds 0, 1, ...; leave one of the two out"
            )
    given = values.data_dir, values.download, values.verify, values.init_from
    ended = seeds.train_seeds(config, values.seeds, workdir, name, *given)
    accuracy = markdown.spread([lines[-1]["test_accuracy"] for lines in ended])
    print(f"test accuracy {accuracy} (n = {len(ended)}), in {workdir}/seed_0 and so on")
    print(f"next: {PROGRAM} evaluate {shlex.quote(str(workdir / 'seed_0'))}")


@command(
    "workdir",
    "checkpoint",
    "split",
    "dataset",
    "watch",
    "temperature",
    "corruptions",
    "shifts",
    "predictions",
    "data_dir",
    "output",
    "experiment",
    "verify",
    workdir=SEVERAL,
    split=["test"],
    dataset=[],
    experiment=None,
    words="workdir",
)
def evaluate(values: flags.FlagValues) -> None:
    """Restores checkpoints and evaluates them on every example of their splits."""
    from cnn_jax.analysis import evaluate as evaluation
    from cnn_jax.analysis.study import changes, rows
    from cnn_jax.cli import tables
    from cnn_jax.train.signals import StopSignals

    workdirs = [_path(workdir) for workdir in dict.fromkeys(values.workdir)]
    output = _path(values.output) if values.output else None
    if output:
        files.check_folder(output)
    changed = changes.of_kind(values.corruptions, values.shifts)
    where = [(dataset, split) for dataset in values.dataset or [None] for split in values.split]
    study = rows.Study(
        _loader(values),
        where,
        values.data_dir,
        changed,
        values.temperature,
        rows.PredictionsFile(_path(values.predictions)) if values.predictions else None,
    )
    if values.watch and values["checkpoint"].present:
        raise ConfigError(
            "--checkpoint: must not be given with --watch, which takes all; leave it out"
        )
    many = values.watch or values.checkpoint == "all"
    if not many and len(workdirs) * len(where) + len(changed) == 1:
        (row,) = rows.each(study, workdirs, values.checkpoint)
        tables.print_evaluation(row["report"])
        if path := evaluation.write(row["report"], workdirs[0], output):
            print(f"written to {path}")
        return
    output = output or rows.default_output(workdirs)
    files.check_folder(output)
    path = output / "evaluations.json"
    with StopSignals(f"stopped by a signal; {path} has what was evaluated before"):
        found = (
            rows.watch(study, workdirs)
            if values.watch
            else rows.each(study, workdirs, values.checkpoint)
        )
        for row in found:
            tables.print_row(row)
            study.write(output)
    tables.print_rows(study.rows, study.tests())
    for written in (path, *rows.draw(study.rows, output)):
        print(f"written to {written}")


@command(
    "workdir",
    "images",
    "checkpoint",
    "top_k",
    "output",
    "experiment",
    "verify",
    experiment=None,
    words="workdir images",
)
def predict(values: flags.FlagValues) -> int:
    """Restores a checkpoint and names the classes of image files."""
    from cnn_jax.analysis import predict as prediction
    from cnn_jax.cli import tables

    run = _load_run(values)
    output = _path(values.output) if values.output else run.workdir / "predictions"
    predictions, broken = prediction.predict(run, values.images, output, values.top_k)
    tables.print_predictions(predictions)
    print(f"written to {output / 'predictions.csv'}")
    return prediction.BROKEN_IMAGES_EXIT_CODE if broken else 0


@command(
    "dataset",
    "set",
    "data_dir",
    "download",
    "output",
    dataset=REQUIRED,
    words="dataset",
)
def data(values: flags.FlagValues) -> None:
    """Shows a dataset before training: counts, sizes, scaling, broken files, twins, pictures."""
    from cnn_jax.analysis import dataset
    from cnn_jax.cli import tables
    from cnn_jax.config import experiment

    environment.check_devices()
    config = experiment.of_dataset(values.dataset, values.set)
    output = _path(values.output) if values.output else dataset.default_output(config.data.name)
    files.check_folder(output)
    found, config, train = dataset.describe(config, values.data_dir, values.download)
    tables.print_dataset(found)
    print(f"written to {dataset.save_contact_sheet(config, train, output)}")


@command(
    "experiment",
    "workdir",
    "set",
    "input_size",
    "data_dir",
    experiment=None,
    workdir=None,
    words="experiment",
)
def summary(values: flags.FlagValues) -> None:
    """Shows an architecture: layers, output shapes, parameters, FLOPs, receptive fields."""
    from cnn_jax.analysis.restore import load_run
    from cnn_jax.cli import tables
    from cnn_jax.config import Config, experiment
    from cnn_jax.data.sources import input_shape
    from cnn_jax.models.summary import summarise

    environment.check_devices()
    if values.experiment and not values.workdir and _is_run(values.experiment):
        values.workdir, values.experiment = values.experiment, None
    if not (values.experiment or values.workdir):
        raise ConfigError("--experiment: summary needs it, or --workdir, the folder of a run")
    config = experiment.load(values.experiment, values.set) if values.experiment else None
    shape = None
    if values.workdir:
        if values.set:
            raise ConfigError(
                f"--set {values.set[0]}: must not be given with --workdir, as a trained run "
                "cannot be changed; leave it out"
            )
        run = load_run(_path(values.workdir), model=config and config.model)
        config, shape = Config(run.model, run.data), run.image_shape
    if shape is None or values.input_size:
        shape = input_shape(config.data, values.input_size, values.data_dir)
    tables.print_summary(summarise(config.model, shape))


@command("workdir", words="workdir")
def verify(values: flags.FlagValues) -> int:
    """Checks every checkpoint of a workdir against its checksums."""
    from cnn_jax.train import checkpoint

    return checkpoint.verify(_path(values.workdir))


@command(
    "networks",
    "batch_size",
    "peers",
    "rounds",
    "seconds",
    "write",
    "speedrun",
    "seeds",
    "device_check",
    "tiny",
    "output",
    "data_dir",
    seeds=5,
)
def benchmark(values: flags.FlagValues) -> int | None:
    """Measures the training steps of the architectures, alone or beside PyTorch and Keras."""
    from cnn_jax.studies.benchmark import device_check, run, speedrun

    if values.device_check:
        output = _path(values.output or "runs/device_check")
        return device_check.check(output, values.tiny, values.data_dir)
    if values.speedrun:
        environment.check_devices()
        speedrun.speedrun(values.seeds, values.data_dir)
        return None
    run.benchmark(
        values.networks,
        values.batch_size,
        values.peers,
        values.rounds,
        values.seconds,
        values.write,
    )
    return None


@command(
    "experiment",
    "topology",
    "set",
    "input_size",
    "data_dir",
    "dump",
    "write",
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
        _path(values.dump) if values.dump else None,
        values.write,
    )


def _path(text: str) -> Path:
    if "://" in text:
        raise ConfigError(
            f"{text}: must be a folder of this machine or a mounted one; URLs are not read"
        )
    return files.user_path(text)


def _is_run(text: str) -> bool:
    """Whether `text` is a workdir, or a folder that is not an experiment."""
    from cnn_jax.config import experiment

    folder = files.user_path(text)
    is_folder = "://" not in text and folder.is_dir()
    return is_folder and ((folder / "config.json").exists() or text not in experiment.names())


def _load_run(values: flags.FlagValues, workdir: str | None = None):
    """The run of --workdir, or of `workdir`."""
    return _loader(values)(_path(workdir or values.workdir), values.checkpoint)


def _loader(values: flags.FlagValues) -> Callable:
    """A function of a workdir and a checkpoint; --experiment is needed for a user-defined model."""
    from cnn_jax.analysis.restore import load_run
    from cnn_jax.config import experiment

    environment.check_devices()
    model = experiment.load(values.experiment).model if values.experiment else None
    return lambda workdir, which: load_run(workdir, which, model, values.verify)


_page_of_runs = functools.partial(
    command,
    "workdir",
    "checkpoint",
    "output",
    "data_dir",
    "experiment",
    "verify",
    workdir=SEVERAL,
    experiment=None,
    words="workdir",
)


@_page_of_runs()
def report(values: flags.FlagValues) -> None:
    """Draws what a run learned, or how several compare, as one HTML page."""
    from cnn_jax.analysis.report import page

    environment.check_devices()
    path = page.report(
        [_path(workdir) for workdir in values.workdir],
        values.checkpoint,
        values.experiment,
        values.data_dir,
        _path(values.output) if values.output else None,
        values.verify,
    )
    print(f"written to {path}")


@_page_of_runs()
def playground(values: flags.FlagValues) -> None:
    """Writes one HTML page to play with a trained network in a browser, or with two."""
    from cnn_jax.analysis.playground import page

    runs = [_load_run(values, workdir) for workdir in values.workdir]
    output = _path(values.output) if values.output else None
    print(f"written to {page.playground(runs, values.data_dir, output)}; open it in a browser")


@command(
    "workdir",
    "output",
    "checkpoint",
    "experiment",
    "verify",
    output=REQUIRED,
    experiment=None,
    words="workdir",
)
def convert(values: flags.FlagValues) -> None:
    """Turns flatten + dense into convolutions: the same network for images of any larger size."""
    from cnn_jax.analysis import convert as conversion
    from cnn_jax.cli import tables

    run = _load_run(values)
    tables.print_conversion(conversion.convert(run, _path(values.output)))


@command(
    "workdir",
    "canvas",
    "rounds",
    "checkpoint",
    "output",
    "data_dir",
    "experiment",
    "verify",
    rounds=3,
    experiment=None,
    words="workdir",
)
def class_map(values: flags.FlagValues) -> None:
    """Finds test images on a large canvas with one pass, and compares it with sliding windows."""
    from cnn_jax.analysis.class_map import demo as demonstration
    from cnn_jax.cli import tables

    run = _load_run(values)
    output = _path(values.output) if values.output else run.workdir / "class_map"
    tables.print_class_map(
        demonstration.demonstrate(run, output, values.canvas, values.rounds, values.data_dir)
    )
    print(f"written to {output / 'class_map.png'} and class_map.json")


@command(
    "topic",
    "size",
    "kernel",
    "stride",
    "padding",
    "channels",
    "filters",
    "experiment",
    "input_size",
    "data_dir",
    "output",
    words="topic",
    experiment=None,
)
def explain(values: flags.FlagValues) -> None:
    """Shows the lecture's arithmetic on small numbers, or what the layers of a network see."""
    from cnn_jax.analysis.explain import picture, topics
    from cnn_jax.cli import tables

    own = ("experiment", "input_size", "data_dir")
    numbers = ("size", "kernel", "stride", "padding", "channels", "filters")
    given = {name: values[name].value for name in (*numbers, *own)}
    if values.topic == topics.OF_A_NETWORK:
        from cnn_jax.analysis.explain import counts
        from cnn_jax.config import experiment
        from cnn_jax.data.sources import input_shape
        from cnn_jax.models.summary import summarise

        environment.check_devices()
        topics.check(values.topic, given, own)
        config = experiment.load(values.experiment or "fashion_mnist/lenet")
        shape = input_shape(config.data, values.input_size, values.data_dir)
        explanation = counts.receptive_field(summarise(config.model, shape))
    else:
        explanation = topics.explain(values.topic, given)
    if values.output:
        picture.save(explanation, _path(values.output))
    tables.print_explanation(explanation)
    if values.output:
        print(f"written to {_path(values.output)}")


@command(
    "workdir",
    "format",
    "output",
    "checkpoint",
    "data_dir",
    "experiment",
    "verify",
    experiment=None,
    words="workdir",
)
def export(values: flags.FlagValues) -> None:
    """Writes the network as StableHLO or ONNX, with its class names, for use without this project."""
    from cnn_jax.analysis import evaluate as evaluation
    from cnn_jax.analysis import export as exporting
    from cnn_jax.analysis import export_onnx

    if values.format not in ("stablehlo", "onnx"):
        raise ConfigError(f"--format={values.format}: must be stablehlo or onnx")
    run = _load_run(values)
    output = _path(values.output) if values.output else run.workdir / "export"
    if values.format == "onnx":
        test, _ = evaluation.load(run, "test", data_dir=values.data_dir)
        *paths, line = export_onnx.export(run, output, test)
        print(line)
    else:
        paths = exporting.export(run, output)
    for path in paths:
        print(f"written to {path}")


@command(
    "only",
    "seeds",
    "workdir",
    "data_dir",
    "download",
    "output",
    "rebuild",
    workdir="runs/reproduce",
)
def reproduce(values: flags.FlagValues) -> int:
    """Trains what experiments/RESULTS.md tells of, keeps a record of each run, rebuilds the tables."""
    from cnn_jax.config import experiment
    from cnn_jax.studies.reproduce import plan, run, table

    if values["only"].present and not values.only:
        raise ConfigError("--only=: must name at least one experiment; leave it out for all")
    rows = plan.choose(plan.ROWS, values.only, values.seeds)
    output = _path(values.output) if values.output else experiment.RESULTS
    if values.rebuild:
        for name in ("only", "seeds", "download"):
            if values[name].present:
                raise ConfigError(
                    f"--{name}: must not be given with --rebuild, which trains nothing; leave it out"
                )
        table.rebuild(output)
        print(f"written to {output / 'RESULTS.md'}")
        return 0
    workdir = _path(values.workdir)
    code = run.reproduce(rows, workdir, output, values.data_dir, download=values.download)
    print(f"written to {output / 'RESULTS.md'}")
    return code


@command(
    "experiment",
    "set",
    "seeds",
    "workdir",
    "data_dir",
    "download",
    seeds=3,
    workdir=None,
    words="experiment",
)
def sweep(values: flags.FlagValues) -> int:
    """Trains every combination of --set field=value,value over several seeds, and compares them."""
    from cnn_jax.config import experiment
    from cnn_jax.studies import sweep as sweeps

    workdir = _path(values.workdir or f"runs/sweep/{experiment.short_name(values.experiment)}")
    return sweeps.sweep(
        values.experiment, values.set, values.seeds, workdir, values.data_dir, values.download
    )


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
    output = _path(values.output or f"runs/lr_finder/{name}.png")
    found = finder.find(
        config, values.steps, values.data_dir, values.download, values.init_from, output
    )
    print(
        f"the loss falls fastest near {found.steepest:.2g}, and is lowest near {found.lowest:.2g}"
    )
    print(f"written to {output}")
    print(f"to use their geometric mean: --set learning_rate={found.rate:.2g}")


@command()
def fields(values: flags.FlagValues) -> None:
    """Shows every field of the configuration that --set can change."""
    from cnn_jax.cli import tables
    from cnn_jax.config import Config, DataConfig
    from cnn_jax.config.types import described

    tables.print_fields({"": described(Config), "data.": described(DataConfig)})


@command("shell", words="shell")
def completion(values: flags.FlagValues) -> None:
    """Prints what makes bash or zsh complete commands, flags and experiments."""
    from cnn_jax.cli.completion import script
    from cnn_jax.config import experiment

    print(script(values.shell, PROGRAM, COMMANDS, experiment.names()), end="")
