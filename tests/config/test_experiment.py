import ast
import dataclasses
import shlex
import sys

import jax
import numpy as np
import pytest

from cnn_jax import config, models
from cnn_jax.cli import commands
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import experiment, serialize, validate
from cnn_jax.train import optim, step
from tests.quick import noisy_state, quick_jit
from tests.tiny import make_examples

# In the lecture's order, with the settings that differ from the lecture's (that is, the defaults).
LECTURE = {
    "fashion_mnist/mlp": models.MLP,
    "fashion_mnist/conv_stack": models.ConvStack,
    "fashion_mnist/max_pool": models.MaxPoolCNN,
    "fashion_mnist/strided": models.StridedCNN,
    "fashion_mnist/same_padding": models.SamePaddingCNN,
    "fashion_mnist/lenet": models.LeNet,
    "fashion_mnist/fully_conv": models.FullyConvCNN,
    "cifar10/lenet": models.LeNet,
    "cifar10/cifar": models.CifarCNN,
}
SHAPES = {"garments": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


def train_and_evaluate(run, shape):
    """What one step of training and one of evaluation on four images give."""
    optimizer = optim.make_optimizer(run, steps_per_epoch=10)
    batch = make_examples(4, shape)[np.arange(4)] | {"epoch": np.zeros(4, np.int32)}

    @quick_jit
    def both(state):
        trained, loss = step.train_step(
            state,
            batch | {"index": np.arange(4, dtype=np.int32)},
            model=run.model,
            optimizer=optimizer,
            config=run,
        )
        sums = step.eval_step(
            trained.variables,
            batch | {"mask": np.ones(4, np.float32)},
            model=run.model,
            data=run.data,
            compute_dtype=run.compute_dtype,
        )
        moved = jax.tree.map(lambda a, b: abs(a - b).max(), state.params, trained.params)
        return {"loss": loss, "sums": sums, "step": trained.step, "moved": moved}

    return jax.device_get(both(noisy_state(run.model, optimizer, shape)))


@pytest.fixture(scope="module")
def done():
    """Results by what reaches the compiled steps: equal experiments are run once."""
    return {}


@pytest.mark.parametrize("name", experiment.names())
def test_an_experiment_trains_and_evaluates(name, done):
    loaded = experiment.load(name)
    assert validate.validate(loaded) is loaded
    shape = SHAPES[loaded.data.name]
    if loaded.data.image_size:
        shape = (*loaded.data.image_size, shape[2])
    run = dataclasses.replace(loaded, epochs=10, batch_size=4, eval_batch_size=4)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, name="any"))
    key = (shape, str(serialize.to_json(run)))
    if key not in done:
        done[key] = train_and_evaluate(run, shape)
    result = done[key]
    assert result["step"] == 1
    assert np.isfinite(result["loss"])
    assert np.isfinite(result["sums"]["loss"])
    assert result["sums"]["confusion"].sum() == 4
    moved = jax.tree.leaves(result["moved"])
    assert np.isfinite(moved).all()
    assert max(moved) > 0


@pytest.mark.parametrize("name", experiment.names())
def test_an_experiments_head_gives_source_and_command(name):
    path = experiment.find(name)
    head = ast.get_docstring(ast.parse(path.read_text()))
    assert head.splitlines()[0] == experiment.title(name)
    assert experiment.title(name).endswith(".")
    assert any(source in head for source in ("lecture", "arXiv", "embedded"))
    lines = [line for line in head.splitlines() if line.startswith("./launch.sh")]
    arguments = shlex.split(lines[0])[1:]
    if name == "quickstart":  # ./launch.sh without arguments
        assert arguments == []
    else:
        values = commands.find(arguments[0]).parse(arguments[1:])
        assert values.experiment == name


@pytest.mark.parametrize("name", LECTURE)
def test_the_lectures_experiments_have_its_settings(name):
    loaded = experiment.load(name)
    assert loaded == config.Config(
        model=LECTURE[name](), data=config.DataConfig(name.partition("/")[0])
    )
    # Keras's defaults, as numbers
    assert (loaded.batch_size, loaded.epochs, loaded.learning_rate) == (32, 10, 1e-3)
    assert (loaded.schedule, loaded.weight_decay, loaded.label_smoothing) == ("constant", 0.0, 0.0)
    assert (loaded.data.mean, loaded.data.std) == ((0.0,), (1.0,))
    assert (loaded.data.flip, loaded.data.crop_padding) == (False, 0)


def test_the_quickstart_needs_no_network():
    loaded = experiment.load("quickstart")
    assert loaded.data.name == "garments"
    assert isinstance(loaded.model, models.LeNet)


def test_names_are_sorted_and_complete():
    names = experiment.names()
    assert names == sorted(names)
    assert {*LECTURE, "quickstart"} <= set(names)
    assert not any(name.endswith(".py") or "__" in name for name in names)


def test_a_title_is_read_without_running_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "FOLDER", tmp_path)
    (tmp_path / "a.py").write_text('"""First line.\n\nMore."""\nraise SystemExit(1)\n')
    (tmp_path / "b.py").write_text("x = 1\n")
    assert experiment.names() == ["a", "b"]
    assert experiment.title("a") == "First line."
    assert experiment.title("b") == ""


# ------------------------------------------------------------------------- files of a user's own

HEAD = """
import dataclasses, functools
import optax
import flax.linen as nn
from cnn_jax.config import Config, DataConfig
from cnn_jax.models import LeNet
"""


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(HEAD + text)
    return str(path)


def test_a_file_of_ones_own_takes_set(tmp_path):
    path = write(tmp_path, "def config(): return Config(LeNet(), DataConfig('mnist'), epochs=3)")
    assert experiment.load(path).epochs == 3
    assert experiment.load(path, ["epochs=5", "data.flip=true"]).epochs == 5
    with pytest.raises(ConfigError, match=r"^epochs=0: "):
        experiment.load(path, ["epochs=0"])


def test_a_module_with_postponed_annotations(tmp_path):
    path = tmp_path / "postponed.py"
    path.write_text(
        "from __future__ import annotations\n"
        + HEAD
        + """
class Mine(nn.Module):
    widths: tuple[int, ...] = (8, 8)
    act: "functools.partial | None" = None

@dataclasses.dataclass
class Helper:
    size: int = 3

def config(): return Config(Mine(), DataConfig('mnist'))
"""
    )
    assert experiment.load(str(path), ["model.widths=4,5"]).model.widths == (4, 5)
    with pytest.raises(ConfigError, match="'x' is not a whole number"):
        experiment.load(str(path), ["model.widths=x"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "mine.py fails: SyntaxError: "),
        ("import nonexistent_module", "mine.py fails: ModuleNotFoundError: "),
        ("x = 1", "mine.py fails: AttributeError: "),
        ("raise RuntimeError('first\\nsecond')", "mine.py fails: RuntimeError: first second"),
        ("raise SystemExit(0)", "mine.py fails: SystemExit: 0"),
        ("def config(): return 1 / 0", "mine.py fails: ZeroDivisionError: "),
        ("def config(seed): pass", "mine.py fails: TypeError: "),
        ("config = 3", "mine.py fails: TypeError: "),
        ("def config(): return {'epochs': 3}", "config() returns dict, not a Config"),
        ("def config(): pass", "config() returns NoneType, not a Config"),
        ("def config(): return Config", "config() returns type, not a Config"),
        ("def config(): return Config(LeNet(), DataConfig('x'), epoch=3)", "'epoch'"),
        ("def config(): return Config(LeNet())", "'data'"),
    ],
)
def test_a_file_that_fails(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        experiment.load(path)
    assert str(caught.value).startswith(f"--experiment={path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("epochs='10'", "epochs='10': must be int"),
        ("model=LeNet", "model=<class"),
        ("optimizer=optax.adam(1e-3)", "must be an Optax factory"),
        ("optimizer='adam'", "must be an Optax factory"),
        ("data=DataConfig('x', mean=0.5)", "data.mean=0.5: must be tuple[float, ...]"),
        ("batch_size=0", "batch_size=0: must be at least 1"),
    ],
)
def test_a_config_with_wrong_values(tmp_path, fields, said):
    good = "dict(model=LeNet(), data=DataConfig('x'))"
    text = f"def config(): return Config(**({good} | dict({fields})))"
    with pytest.raises(ConfigError) as caught:
        experiment.load(write(tmp_path, text))
    assert said in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "binary.py"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.py fails: SyntaxError: "):
        experiment.load(str(path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lenet", "nearest: cifar10/lenet, fashion_mnist/lenet"),
        ("fashion_mnist/lenett", "nearest: fashion_mnist/lenet"),
        ("quick_start", "nearest: quickstart"),
        ("xyzzy", "there are: cifar10/cifar, "),
        ("../experiments/quickstart", "no such experiment"),
        ("fashion_mnist/../quickstart", "no such experiment"),
        ("/etc/hostname", "no such experiment"),
        ("fashion_mnist", "no such experiment"),
        ("missing.py", "no such file"),
    ],
)
def test_an_unknown_experiment(name, said):
    with pytest.raises(ConfigError) as caught:
        experiment.load(name)
    assert str(caught.value).startswith(f"--experiment={name}: ")
    assert said in str(caught.value)


def test_a_folder_named_like_a_file(tmp_path):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        experiment.load(str(tmp_path / "folder.py"))


def test_a_path_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path, "def config(): return Config(LeNet(), DataConfig('mnist'), epochs=3)")
    monkeypatch.chdir(tmp_path)
    assert experiment.load("mine.py").epochs == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert experiment.load("~/mine.py").epochs == 3


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("EPOCHS = 7")
    (tmp_path / "jax.py").write_text("raise RuntimeError('not this one')")
    text = """
from beside_it import EPOCHS
import jax.numpy
def config(): return Config(LeNet(), DataConfig('mnist'), epochs=EPOCHS)
"""
    assert experiment.load(write(tmp_path, text)).epochs == 7


def test_loading_leaves_the_search_path_alone(tmp_path):
    before = list(sys.path)
    experiment.load(write(tmp_path, "def config(): return Config(LeNet(), DataConfig('mnist'))"))
    assert sys.path == before
