"""The commands that take a trained run."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from cnn_jax.cli.flags import REQUIRED, SEVERAL
from cnn_jax.cli.registry import command
from cnn_jax.common import environment, files
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import local_path

if TYPE_CHECKING:  # it imports JAX, which not all commands need
    from cnn_jax.analysis.restore import RestoredRun


def _load_run(values: flags.FlagValues, workdir: str | None = None) -> "RestoredRun":
    """The run of --workdir, or of `workdir`."""
    return _loader(values)(local_path(workdir or values.workdir), values.checkpoint)


def _loader(values: flags.FlagValues) -> "Callable[..., RestoredRun]":
    """A function of a workdir and a checkpoint; --experiment is needed for a user-defined model."""
    from cnn_jax.analysis.restore import load_run
    from cnn_jax.config import experiment

    environment.check_devices()
    model = experiment.load(values.experiment).model if values.experiment else None
    return lambda workdir, which: load_run(workdir, which, model, values.verify)


def _reads_runs(run: Callable) -> Callable:
    """Gives a command the local copies of the workdirs that are in a bucket."""

    @functools.wraps(run)
    def with_copies(values: flags.FlagValues) -> int | None:
        from cnn_jax.train import bucket_run

        several = isinstance(values.workdir, list)
        given = values.workdir if several else [values.workdir]
        with bucket_run.copied(given, fresh=run.__name__ == "verify") as folders:
            paths: Any = list(map(str, folders))
            values.workdir = paths if several else paths[0]
            return run(values)

    return with_copies


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
@_reads_runs
def evaluate(values: flags.FlagValues) -> None:
    """Restores checkpoints and evaluates them on every example of their splits."""
    from cnn_jax.analysis import evaluate as evaluation
    from cnn_jax.analysis.study import changes, rows
    from cnn_jax.cli import tables
    from cnn_jax.train.signals import StopSignals

    workdirs = [local_path(workdir) for workdir in dict.fromkeys(values.workdir)]
    output = local_path(values.output) if values.output else None
    if output:
        files.check_folder(output)
    changed = changes.of_kind(values.corruptions, values.shifts)
    where = [(dataset, split) for dataset in values.dataset or [None] for split in values.split]
    if values.watch and values["checkpoint"].present:
        raise ConfigError(
            "--checkpoint: must not be given with --watch, which takes all; leave it out"
        )
    study = rows.Study(
        _loader(values),
        where,
        values.data_dir,
        changed,
        values.temperature,
        rows.PredictionsFile(local_path(values.predictions)) if values.predictions else None,
    )
    many = values.watch or values.checkpoint == "all"
    if not many and len(workdirs) * len(where) + len(changed) == 1:
        (row,) = rows.each(study, workdirs, values.checkpoint)
        try:
            path = evaluation.write(row["report"], workdirs[0], output)
        finally:  # the figures are shown where they cannot be written
            tables.print_evaluation(row["report"])
        if path:
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
    "attribution",
    "output",
    "experiment",
    "verify",
    experiment=None,
    words="workdir images",
)
@_reads_runs
def predict(values: flags.FlagValues) -> int:
    """Restores a checkpoint and names the classes of image files."""
    from cnn_jax.analysis import predict as prediction
    from cnn_jax.cli import tables

    run = _load_run(values)
    output = local_path(values.output) if values.output else run.workdir / "predictions"
    predictions, broken = prediction.predict(run, values.images, output, values.top_k)
    tables.print_predictions(predictions)
    print(f"written to {output / 'predictions.csv'}")
    if values.attribution:
        from cnn_jax.analysis.attribution import picture

        files = [file for file in prediction.find_images(values.images) if file not in broken]
        print(f"written to {picture.of_files(run, files, output)}")
    return prediction.BROKEN_IMAGES_EXIT_CODE if broken else 0


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
@_reads_runs
def report(values: flags.FlagValues) -> None:
    """Draws what a run learned, or how several compare, as one HTML page."""
    from cnn_jax.analysis.report import page

    environment.check_devices()
    path = page.report(
        [local_path(workdir) for workdir in values.workdir],
        values.checkpoint,
        values.experiment,
        values.data_dir,
        local_path(values.output) if values.output else None,
        values.verify,
    )
    print(f"written to {path}")


@_page_of_runs()
@_reads_runs
def playground(values: flags.FlagValues) -> None:
    """Writes one HTML page to play with a trained network in a browser, or with two."""
    from cnn_jax.analysis.playground import page

    runs = [_load_run(values, workdir) for workdir in values.workdir]
    output = local_path(values.output) if values.output else None
    print(f"written to {page.playground(runs, values.data_dir, output)}; open it in a browser")


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
@_reads_runs
def class_map(values: flags.FlagValues) -> None:
    """Finds test images on a large canvas with one pass, and compares it with sliding windows."""
    from cnn_jax.analysis.class_map import demo as demonstration
    from cnn_jax.cli import tables

    run = _load_run(values)
    output = local_path(values.output) if values.output else run.workdir / "class_map"
    tables.print_class_map(
        demonstration.demonstrate(run, output, values.canvas, values.rounds, values.data_dir)
    )
    print(f"written to {output / 'class_map.png'} and class_map.json")


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
@_reads_runs
def convert(values: flags.FlagValues) -> None:
    """Turns flatten + dense into convolutions: the same network for images of any larger size."""
    from cnn_jax.analysis import convert as conversion
    from cnn_jax.cli import tables

    run = _load_run(values)
    tables.print_conversion(conversion.convert(run, local_path(values.output)))


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
@_reads_runs
def export(values: flags.FlagValues) -> None:
    """Writes the network as StableHLO or ONNX, with its class names, for use without this project."""
    from cnn_jax.analysis import evaluate as evaluation
    from cnn_jax.analysis import export as exporting
    from cnn_jax.analysis import export_onnx

    if values.format not in ("stablehlo", "onnx"):
        raise ConfigError(f"--format={values.format}: must be stablehlo or onnx")
    run = _load_run(values)
    output = local_path(values.output) if values.output else run.workdir / "export"
    if values.format == "onnx":
        test, _ = evaluation.load(run, "test", data_dir=values.data_dir)
        *paths, line = export_onnx.export(run, output, test)
        print(line)
    else:
        paths = [*exporting.export(run, output)]
    for path in paths:
        print(f"written to {path}")


@command("workdir", words="workdir")
@_reads_runs
def verify(values: flags.FlagValues) -> int:
    """Checks every checkpoint of a workdir against its checksums."""
    from cnn_jax.train import checkpoint

    return checkpoint.verify(local_path(values.workdir))
