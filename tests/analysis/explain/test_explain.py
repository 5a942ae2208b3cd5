"""The printed arithmetic is done again, by hand or with NumPy's loops."""

import re

import numpy as np
import pytest
from PIL import Image

from cnn_jax import main
from cnn_jax.analysis.explain import arithmetic, counts, picture, topics
from cnn_jax.common.errors import ConfigError
from cnn_jax.models import FullyConvCNN, LeNet
from cnn_jax.models.summary import summarise


def error(caplog):
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "\n" not in line
    return line.removeprefix("error: ")


def grids(explanation):
    """The grids of all rows by title."""
    return {grid.title: grid.values for row in explanation.rows for grid in row}


def computed(lines):
    """From "m3 = 1*(-2) + 4 = 2": {3: (sum of the terms, the result)}."""
    found = {}
    for line in lines:
        if match := re.fullmatch(r"m(\d+) = ([-\d*+() ]+) = (-?\d+)", line):
            products = re.sub(r"[()]", "", match[2]).split(" + ")
            total = sum(np.prod([int(factor) for factor in p.split("*")]) for p in products)
            found[int(match[1])] = (total, int(match[3]))
    return found


def correlate(data, kernel, bias, stride):
    """[H, W, C] with [kh, kw, C, F], one place at a time."""
    k, out = len(kernel), (len(data) - len(kernel)) // stride + 1
    output = np.empty((out, out, kernel.shape[-1]))
    for i, j, f in np.ndindex(output.shape):
        window = data[i * stride : i * stride + k, j * stride : j * stride + k]
        output[i, j, f] = (window * kernel[..., f]).sum() + bias[f]
    return output


# ------------------------------------------------------------------------------ convolution


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "channels", "filters"),
    [
        (3, 2, 1, "0", 1, 1),
        (4, 3, 2, "1", 1, 1),
        (4, 3, 1, "same", 2, 2),
        (5, 2, 3, "valid", 3, 1),
        (1, 1, 1, "0", 1, 2),
        (4, 3, 2, "same", 1, 1),
        (2, 4, 1, "1", 1, 1),
    ],
)
def test_every_sum_of_a_convolution(size, kernel, stride, padding, channels, filters):
    found = arithmetic.conv(size, kernel, stride, padding, channels, filters)
    order = []
    for row in found.rows:
        part = {
            kind: np.stack([grid.values for grid in row if grid.title.startswith(kind)], -1)
            for kind in ("data", "kernel", "bias", "output")
        }
        expected = correlate(part["data"], part["kernel"][..., None], part["bias"][0, 0], stride)
        np.testing.assert_array_equal(part["output"], expected)
        order += [*expected.ravel()]
    assert len(found.rows) == filters
    lines = computed(found.lines)
    assert [*lines] == [*range(1, min(len(order), arithmetic.MOST_SUMS) + 1)]
    for m, (total, result) in lines.items():
        assert total == result == order[m - 1]


def test_the_lectures_first_convolution():
    found = arithmetic.conv(3, 2, 1, "0", 1, 1)
    assert found.title == "conv 2x2, stride 1, padding 0: 3x3x1 -> 2x2x1"
    assert "m1 = v1*w1 + v2*w2 + v4*w3 + v5*w4 + b" in found.lines
    assert "parameters: 2 x 2 x 1 x 1 weights + 1 for the bias = 5" in found.lines
    two = arithmetic.conv(3, 2, 1, "0", 1, 2)
    assert "parameters: 2 x 2 x 1 x 2 weights + 2 for the bias = 10" in two.lines
    assert "shapes: data (1, 3, 3, 1), kernel (2, 2, 1, 2), output (1, 2, 2, 2)" in two.lines


@pytest.mark.parametrize(
    ("arguments", "formula"),
    [
        ((4, 2, 1, "0"), "(4 + 0 + 0 - 2) // 1 + 1 = 3"),  # the lecture's four
        ((4, 2, 2, "0"), "(4 + 0 + 0 - 2) // 2 + 1 = 2"),
        ((4, 3, 1, "0"), "(4 + 0 + 0 - 3) // 1 + 1 = 2"),
        ((4, 3, 1, "1"), "(4 + 1 + 1 - 3) // 1 + 1 = 4"),
        ((4, 3, 2, "same"), "(4 + 0 + 1 - 3) // 2 + 1 = 2"),  # Keras's
    ],
)
def test_output_sizes(arguments, formula):
    found = arithmetic.conv(*arguments, 1, 1)
    assert f"output size: {formula}" in found.lines


def test_letters_with_channels_and_padding():
    found = arithmetic.conv(2, 2, 1, "1", 2, 1)
    letters = "m1 = 0*w1 + 0*w2 + 0*w3 + 0*w4 + 0*w5 + 0*w6 + v1*w7 + v2*w8 + b"
    assert letters in found.lines


def test_many_sums_are_cut_short():
    found = arithmetic.conv(6, 3, 1, "same", 1, 1)
    assert len(computed(found.lines)) == 16
    assert "... and 20 more" in found.lines


# ----------------------------------------------------------------------- pooling, padding


@pytest.mark.parametrize(("size", "kernel"), [(4, 2), (5, 2), (6, 3), (3, 3), (1, 1)])
def test_every_maximum_of_a_pooling(size, kernel):
    found = arithmetic.pool(size, kernel)
    data, output = grids(found)["data"], grids(found)["strongest"]
    out = size // kernel
    assert output.shape == (out, out)
    lines = [line for line in found.lines if "max(" in line]
    for line, (i, j) in zip(lines, np.ndindex(out, out), strict=True):
        window = data[i * kernel : (i + 1) * kernel, j * kernel : (j + 1) * kernel]
        assert output[i, j] == window.max()
        listed = ", ".join(f"{value:g}" for value in window.ravel())
        assert line.endswith(f"max({listed}) = {window.max():g}")
    dropped = [line for line in found.lines if "dropped" in line]
    assert len(dropped) == (size % kernel > 0)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after", "out"),
    [
        (4, 3, 1, 1, 1, 4),
        (4, 3, 2, 0, 1, 2),
        (5, 3, 2, 1, 1, 3),
        (4, 2, 1, 0, 1, 4),
        (4, 1, 3, 0, 0, 2),
    ],
)
def test_padding(size, kernel, stride, before, after, out):
    found = arithmetic.padding(size, kernel, stride)
    header, valid, same = found.table
    assert len(header) == len(valid)
    assert same[:4] == ("same", str(before), str(after), f"{out}x{out}")
    assert valid[1:3] == ("0", "0")
    assert valid[3] == "x".join([str((size - kernel) // stride + 1)] * 2)
    padded = found.rows[1][0].values
    assert padded.shape == (size + before + after,) * 2
    border = np.ones(padded.shape, bool)
    border[before : before + size, before : before + size] = False
    assert not padded[border].any()
    assert ("Of an odd number of zeros" in " ".join(found.lines)) == (before != after)
    np.testing.assert_array_equal(found.rows[0][0].values, padded[~border].reshape(size, size))


# -------------------------------------------------------------- dense layers, parameters


def test_a_dense_layer_is_a_1x1_convolution():
    found = counts.dense(1, 6, 3)
    assert found.title == "dense 6 -> 3 is a 1x1 convolution over 1x1x6"
    assert [row[2] for row in found.table[1:]] == ["21", "21"]
    named = grids(found)
    expected = named["data"] @ named["kernel"] + named["bias"]
    np.testing.assert_array_equal(named["output"], expected)
    lines = computed(found.lines)
    assert lines == {m + 1: (value, value) for m, value in enumerate(expected[0].astype(int))}
    assert found.lines[-1] == "largest difference between the outputs of the two layers: 0"


def test_a_dense_layer_over_a_map():
    found = counts.dense(7, 512, 10)
    assert found.title == "dense 25,088 -> 10 is a convolution of 7x7 over 7x7x512"
    assert [row[2] for row in found.table[1:]] == ["250,890", "250,890"]
    assert found.rows == ()


def test_parameters_of_the_lecture():
    found = counts.parameters(3, 2, 1, 1)
    assert found.title == "parameters from 3x3x1 to 2x2x1"
    assert [row[2] for row in found.table[1:]] == ["5", "40"]  # 2 * 2 + 1; (9 + 1) * 4
    assert found.lines[-1] == "The dense layer has 8.0 times as many parameters."
    found = counts.parameters(28, 7, 1, 32)
    assert [row[2] for row in found.table[1:]] == ["1,600", f"{785 * 22 * 22 * 32:,}"]


def test_receptive_fields():
    found = counts.receptive_field(summarise(LeNet(), (28, 28, 1)))
    rows = {row[0]: row[2:] for row in found.table}
    assert rows["layer"] == ("outputs", "sees", "step", "from")
    assert rows["Conv_1"] == ("10x10", "14x14", "2", "-2")
    assert rows["Dense_2"] == ("1x1", "32x32", "4", "-2")
    assert found.lines[-1] == "What is seen beyond the image of 28x28 is padding."
    inside = counts.receptive_field(summarise(FullyConvCNN(), (64, 64, 1)))
    assert "padding." not in inside.lines[-1]


# ------------------------------------------------------------------------------ the command

EXAMPLES = [
    "conv --size=4 --kernel=3 --stride=2 --padding=1",
    "conv --size=12 --kernel=5 --padding=2 --channels=4 --filters=2",
    "conv",
    "pool --size=5",
    "padding --size=4 --kernel=3 --stride=2",
    "dense",
    "dense --size=32 --channels=1024 --filters=9",
    "parameters",
    "parameters --size=256 --channels=512 --filters=512",
    "receptive_field --experiment=fashion_mnist/lenet",
    "receptive_field --experiment=cifar10/cifar --input_size=300x100x3",
    "--topic=receptive_field",
]


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_command_and_its_picture(line, tmp_path, capsys):
    path = tmp_path / "x.PNG"
    assert main.main(["explain", *line.split(), f"--output={path}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"written to {path}"
    assert len(printed) > 4
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("L"))
    assert max(pixels.shape) <= 4000
    # Nothing runs into the border.
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (frame == 255).all()


def test_what_is_printed(capsys):
    assert main.main(["explain", "pool", "--size=2"]) == 0
    title, names, *rows = capsys.readouterr().out.splitlines()
    assert title == "max pooling 2x2: 2x2 -> 1x1"
    assert names.split() == ["data", "strongest"]
    numbers = [int(n) for row in rows[:2] for n in re.findall(r"\d+", row)]
    assert numbers[:2] + numbers[3:] == [*grids(arithmetic.pool(2, 2))["data"].ravel()]
    assert numbers[2] == max(numbers)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "",
            "--topic: explain needs it (conv, pool, padding, dense, parameters or receptive_field)",
        ),
        (
            "lenet",
            "--topic=lenet: must be one of conv, pool, padding, dense, parameters, rec",
        ),
        (
            "conv 3",
            "3: explain cannot use this word; it takes TOPIC and flags, which are written --name=",
        ),
        ("conv --size=0", "--size=0: must be from 1 to 12"),
        ("conv --size=13", "--size=13: must be from 1 to 12"),
        ("conv --size=big", "--size=big: must be a whole number"),
        ("conv --stride=0", "--stride=0: must be from 1 to 12"),
        ("conv --padding=-1", "--padding=-1: must be same, valid, or from 0 to 12"),
        ("conv --padding=13", "--padding=13: must be same, valid, or from 0 to 12"),
        ("conv --padding=²", "--padding=²: must be same, valid, or from 0 to 12"),
        ("conv --kernel=5", "--kernel=5: larger than the data with its padding, 4 pixels"),
        ("conv --padding=7", "--size=4: with padding 18, must be at most 16 pixels"),
        ("padding --size=12 --kernel=6", "--size=12: with padding 17, must be at most 16 pixels"),
        ("conv --filters=5", "--filters=5: must be from 1 to 4"),
        (
            "conv --experiment=quickstart",
            "--experiment=quickstart: conv has no such flag; it takes --size, --kernel, ",
        ),
        ("pool --stride=2", "--stride=2: pool has no such flag; it takes --size, --kernel"),
        ("pool --kernel=5", "--kernel=5: must be at most the size, 4"),
        ("padding --size=2", "--kernel=3: must be at most the size, 2"),
        (
            "padding --padding=1",
            "--padding=1: padding has no such flag; it takes --size, --kernel, --stride",
        ),
        (
            "dense --kernel=1",
            "--kernel=1: dense has no such flag; it takes --size, --channels, --filters",
        ),
        (
            "dense --size=32 --channels=1024 --filters=100",
            "--filters=100: must be at most 9 for 1,0",
        ),
        ("parameters --kernel=4", "--kernel=4: must be at most the size, 3"),
        (
            "receptive_field --size=3",
            "--size=3: receptive_field has no such flag; it takes --experiment, --input_size",
        ),
        ("receptive_field --experiment=xyzzy", "--experiment=xyzzy: no such experiment"),
        ("receptive_field --input_size=4x4x1", "model=LeNet: takes no images of 4x4x1 ("),
        ("conv --output=x.jpg", "--output=x.jpg: must end in .png"),
        ("conv --output=/proc/x.png", "--output=/proc/x.png: cannot be written: "),
        ("conv --output=missing/x.png", "--output=missing/x.png: cannot be written: No such file"),
    ],
)
def test_what_the_command_refuses(line, said, caplog, capsys):
    assert main.main(["explain", *line.split()]) == 2
    assert error(caplog).startswith(said)
    assert capsys.readouterr().out == ""


def test_a_topic_takes_what_its_function_does():
    for name, (function, numbers) in topics.TOPICS.items():
        count = function.__code__.co_argcount
        assert [*numbers] == [*function.__code__.co_varnames[:count]], name
    with pytest.raises(ConfigError, match=r"^--stride=1: pool has no such flag; it takes"):
        topics.explain("pool", {"stride": 1})


def test_the_marked_window_is_drawn():
    """Blue where the first output looks, and nowhere else."""
    drawn = np.asarray(picture.draw(arithmetic.pool(4, 2))).astype(int)
    blue = (np.abs(drawn - [0xCF, 0xE6, 0xF7]).sum(-1) < 6).sum()
    cell = (picture.CELL * 150) ** 2
    assert 3 < blue / cell < 5.2  # two by two of the data, one of the output
