import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cnn_jax import main, models
from cnn_jax.cli import tables
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig, experiment
from cnn_jax.data.sources import input_shape
from cnn_jax.models import summary

TOTALS = {  # the lecture's table
    "fashion_mnist/mlp": 101_770,
    "fashion_mnist/conv_stack": 2_150_410,
    "fashion_mnist/max_pool": 1_588_490,
    "fashion_mnist/strided": 1_588_490,
    "fashion_mnist/same_padding": 1_818_890,
    "fashion_mnist/lenet": 61_706,
    "fashion_mnist/fully_conv": 6_816_010,
    "cifar10/lenet": 83_126,
    "cifar10/cifar": 14_682_442,
    "quickstart": 61_706,
}


def layer(found, name):
    return next(layer for layer in found.layers if layer.name == name)


@pytest.mark.parametrize("name", TOTALS)
def test_the_totals_are_the_lectures(name):
    config = experiment.load(name)
    found = summary.summarise(config.model, input_shape(config.data, None))
    assert found.parameters == TOTALS[name]
    assert found.parameters == sum(layer.parameters for layer in found.layers)
    assert found.flops == sum(layer.flops for layer in found.layers)
    assert found.model == type(config.model).__name__


def test_flops_by_hand():
    found = summary.summarise(models.LeNet(), (28, 28, 1))
    # Two for each multiplication: kernel elements x filters x places of the output.
    assert layer(found, "Conv_0").flops == 2 * (5 * 5 * 1) * 6 * (28 * 28) == 235_200
    assert layer(found, "Conv_1").flops == 2 * (5 * 5 * 6) * 16 * (10 * 10) == 480_000
    assert layer(found, "Dense_0").flops == 2 * 400 * 120
    assert layer(found, "MaxPool_0").flops == 0
    assert found.flops == 235_200 + 480_000 + 96_000 + 2 * 120 * 84 + 2 * 84 * 10


def test_flops_of_a_strided_convolution_count_its_places():
    found = summary.summarise(models.StridedCNN(), (28, 28, 1))
    assert layer(found, "Conv_1").flops == 2 * (3 * 3 * 32) * 64 * (12 * 12)
    assert layer(found, "Conv_1").shape == (12, 12, 64)


def test_layers_of_lenet():
    found = summary.summarise(models.LeNet(), (28, 28, 1))
    assert [(layer.name, layer.kind, layer.shape, layer.parameters) for layer in found.layers] == [
        ("Conv_0", "Conv 5x5 same", (28, 28, 6), 156),
        ("MaxPool_0", "MaxPool 2x2", (14, 14, 6), 0),
        ("Conv_1", "Conv 5x5 valid", (10, 10, 16), 2_416),
        ("MaxPool_1", "MaxPool 2x2", (5, 5, 16), 0),
        ("Flatten_0", "Flatten", (400,), 0),
        ("Dense_0", "Dense", (120,), 48_120),
        ("Dense_1", "Dense", (84,), 10_164),
        ("Dense_2", "Dense", (10,), 850),
    ]


class Shared(nn.Module):
    """One convolution called three times, and a parameter of its own."""

    @nn.compact
    def __call__(self, image, train=False):
        again = nn.Conv(8, (3, 3), name="again")
        x = nn.Conv(8, (3, 3))(image) + self.param("offset", nn.initializers.ones, (8,))
        for _ in range(3):
            x = nn.relu(again(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Stored(nn.Module):
    """Layers without a __call__ of their own, or that return no array."""

    @nn.compact
    def __call__(self, image, train=False):
        cell = nn.LSTMCell(4)
        x = image.mean((2, 3))
        _, x = cell(cell.initialize_carry(jax.random.key(0), x.shape), x)
        return nn.Embed(5, 4).attend(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = image.reshape(len(image), -1, 4)
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


@pytest.mark.parametrize("model", [Shared(), Stored(), Attention()])
def test_parameters_are_those_of_the_initialisation(model):
    found = summary.summarise(model, (28, 28, 1))
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_layer_that_is_called_again_counts_in_flops_only():
    found = summary.summarise(Shared(), (28, 28, 1))
    calls = [layer for layer in found.layers if layer.name == "again"]
    assert [layer.parameters for layer in calls] == [584, 0, 0]
    assert {layer.flops for layer in calls} == {2 * 3 * 3 * 8 * 8 * 28 * 28}
    assert found.parameters - sum(layer.parameters for layer in found.layers) == 8


def test_flops_of_kernels_with_several_axes_of_features():
    found = summary.summarise(Attention(), (28, 28, 1))
    assert layer(found, "attention/query").flops == 2 * (4 * 2 * 2) * 196
    assert layer(found, "attention/out").flops == 2 * (2 * 2 * 4) * 196
    up = nn.Sequential([nn.ConvTranspose(3, (4, 4), strides=(2, 2))])
    assert summary.summarise(up, (6, 5, 2)).flops == 2 * (4 * 4 * 2 * 3) * (6 * 5)


def test_the_table_prints_the_training_flops(capsys):
    found = summary.summarise(models.MLP(), (28, 28, 1))
    tables.print_summary(found)
    first, rest = 2 * 784 * 128, 2 * 128 * 10
    assert found.training_flops == 2 * first + 3 * rest == 409_088
    assert capsys.readouterr().out.endswith("203,264 FLOPs an image forward, 409,088 in training\n")


def test_layers_inside_of_blocks_are_counted_once():
    found = summary.summarise(models.SpeedrunCNN(), (32, 32, 3))
    assert found.parameters == 1_971_640
    names = [layer.name for layer in found.layers]
    assert len(names) == len(set(names))
    assert layer(found, "ConvGroup_0/Conv_0").parameters == 3 * 3 * 24 * 64
    assert layer(found, "ConvGroup_0/BatchNorm_0").parameters == 64
    assert layer(found, "whitening").kind == "Conv 2x2 valid"
    assert layer(summary.summarise(models.StridedCNN(), (28, 28, 1)), "Conv_1").kind == (
        "Conv 3x3 /2 valid"
    )


def test_fully_conv_on_a_larger_image():
    small = summary.summarise(models.FullyConvCNN(), (28, 28, 1))
    large = summary.summarise(models.FullyConvCNN(), (64, 64, 1))
    assert small.parameters == large.parameters
    assert layer(large, "Conv_5").shape == (10, 10, 10)
    assert layer(large, "Conv_5").flops == 100 * layer(small, "Conv_5").flops


# -------------------------------------------------------------------------------- input size

GRAY = Config(models.LeNet(), DataConfig("fashion_mnist"))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (models.LeNet(), (3, 3, 1)),
        (models.ConvStack(), (24, 24, 1)),
        (models.FullyConvCNN(), (27, 64, 1)),
    ],
)
def test_an_image_the_model_does_not_take(model, shape):
    shown = "x".join(map(str, shape))
    with pytest.raises(ConfigError) as caught:
        summary.summarise(model, shape)
    assert str(caught.value).startswith(
        f"model={type(model).__name__}: takes no images of {shown} "
    )
    assert "\n" not in str(caught.value)
    assert "zero" not in str(caught.value)


# ------------------------------------------------------------------------------- the command


def test_the_command(capsys):
    code = main.main(
        ["summary", "--experiment=fashion_mnist/lenet", "--set", "model.num_classes=20"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines[0] == "LeNet on 28x28x1"
    header, first, *_, last = (line.split() for line in lines[1:-1])
    assert header == ["layer", "kind", "output", "parameters", "FLOPs", "sees", "step", "from"]
    assert first[:4] == ["Conv_0", "Conv", "5x5", "same"]
    assert first[4:] == ["28x28x6", "156", "235,200", "5x5", "1", "-2"]
    assert last[-3:] == ["32x32", "4", "-2"]
    total = 61_706 + 10 * 85
    assert lines[-1].startswith(f"{total:,} parameters (0.3 MB), 834,720 FLOPs an image forward")
    assert len(lines) == 2 + 8 + 1


def test_the_command_on_another_size(capsys):
    code = main.main(["summary", "--experiment=fashion_mnist/fully_conv", "--input_size=64"])
    assert code == 0
    output = capsys.readouterr().out
    assert output.startswith("FullyConvCNN on 64x64x1\n")
    assert re.search(r"Conv_5 +Conv 1x1 valid +10x10x10 +5,130", output)


def test_a_table_is_not_cut_short_in_a_pipe(capsys):
    tables.print_summary(summary.summarise(models.SpeedrunCNN(), (32, 32, 3)))
    output = capsys.readouterr().out
    assert "…" not in output
    assert "ConvGroup_2/BatchNorm_1" in output
