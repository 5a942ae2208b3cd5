"""The commands that show a dataset, an architecture or the arithmetic, without a run."""

from absl import flags

from cnn_jax import PROGRAM
from cnn_jax.cli.flags import REQUIRED
from cnn_jax.cli.registry import COMMANDS, command
from cnn_jax.common import environment, files
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import local_path
from cnn_jax.common.remote import is_remote


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
    output = (
        local_path(values.output) if values.output else dataset.default_output(config.data.name)
    )
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
    from cnn_jax.train.bucket_run import copied

    environment.check_devices()
    name, workdir = values.experiment, values.workdir
    if name and not workdir and _is_run(name):
        name, workdir = None, name
    if not (name or workdir):
        raise ConfigError("--experiment: summary needs it, or --workdir, the folder of a run")
    config = experiment.load(name, values.set) if name else None
    shape = None
    if workdir:
        if values.set:
            raise ConfigError(
                f"--set {values.set[0]}: must not be given with --workdir, as a trained run "
                "cannot be changed; leave it out"
            )
        with copied([workdir]) as (folder,):
            run = load_run(folder, model=config.model if config else None)
        config, shape = Config(run.model, run.data), run.image_shape
    assert config is not None, "of the experiment or of the run"
    if shape is None or values.input_size:
        shape = input_shape(config.data, values.input_size, values.data_dir)
    tables.print_summary(summarise(config.model, shape))


def _is_run(text: str) -> bool:
    """Whether `text` is a workdir, or a folder that is not an experiment."""
    from cnn_jax.config import experiment

    if is_remote(text):
        return True
    folder = files.user_path(text)
    return folder.is_dir() and ((folder / "config.json").exists() or text not in experiment.names())


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
        picture.save(explanation, local_path(values.output))
    tables.print_explanation(explanation)
    if values.output:
        print(f"written to {local_path(values.output)}")


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
