"""Networks as ONNX, used by a process that knows of ONNX Runtime and NumPy alone."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import ExifTags, Image

from cnn_jax import main, models
from cnn_jax.analysis import export_onnx
from cnn_jax.common import decode
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import DataConfig
from cnn_jax.models.layers import Dense
from cnn_jax.train import step
from tests.quick import make_run, unoptimised
from tests.tiny import CLASS_NAMES, make_examples

USE = """
import runpy, sys
for name in ("jax", "flax", "cnn_jax", "onnx", "jax2onnx"):
    sys.modules[name] = None  # cannot be imported
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
"""


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed", exc_type=ImportError)
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def use(script, *arguments):
    command = [sys.executable, "-c", USE, str(script), *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("model", "said", "sizes"),
    [
        (models.LeNet(), "opset 13, images of 28x28; on 30", [(28, 28)]),
        (
            models.FullyConvCNN(),
            "opset 15, images of 28x28 and larger, multiples of 4; on 30",
            [(28, 28), (48, 36)],
        ),
    ],
)
def test_the_logits_are_those_of_jax(runtime, tmp_path, model, said, sizes):
    run = make_run(tmp_path, model, data=DataConfig("x", mean=(0.4,), std=(0.3,)))
    path, script, line = export_onnx.export(run, tmp_path / "out", make_examples(30))
    assert line.startswith(said)
    session = runtime.InferenceSession(path)
    for size in sizes:
        image = make_examples(7, (*size, 1), seed=5).image
        options = {"model": run.model, "data": run.data, "compute_dtype": "float32"}
        expected = np.asarray(
            jax.jit(lambda v, i, o=options: step.predict_step(v, i, **o))(run.variables, image)
        )
        (logits,) = session.run(None, {session.get_inputs()[0].name: image})
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
        np.save(tmp_path / "images.npy", image)
        printed = use(script, tmp_path / "images.npy")
        assert [row[1] for row in printed] == [CLASS_NAMES[i] for i in expected.argmax(1)]
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == [*CLASS_NAMES]
    assert (about["model"], about["checkpoint"]) == (type(model).__name__, "7")
    Image.fromarray(make_examples(7, seed=5).image[0, ..., 0]).save(tmp_path / "one.png")
    np.save(tmp_path / "one.npy", make_examples(7, seed=5).image[:1])
    assert use(script, tmp_path / "one.png") == use(script, tmp_path / "one.npy")


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_decoded_as_for_the_training(runtime, tmp_path, channels):
    random = np.random.default_rng(0)
    grey, colour = (random.integers(0, 256, (40, 36, n), np.uint8) for n in (1, 4))
    grey = Image.fromarray(grey[..., 0])
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    pictures = {
        "grey.png": grey,
        "deep.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 250),
        "clear.png": Image.fromarray(colour),
        "grey_clear.png": Image.fromarray(colour).convert("LA"),
        "palette.png": Image.fromarray(colour[..., :3]).quantize(7),
        "small.png": Image.fromarray(colour[:5, :9, :3]),
        "bits.png": grey.convert("1"),
        "turned.jpg": Image.fromarray(colour[..., :3]),
    }
    run = make_run(tmp_path, models.MLP(), (28, 28, channels))
    example = make_examples(3, (28, 28, channels))
    _, script, _ = export_onnx.export(run, tmp_path / "out", example)
    paths = []
    for name, picture in pictures.items():
        paths.append(tmp_path / name)
        picture.save(paths[-1], exif=turned if name == "turned.jpg" else None)
    decoded = [decode.pixels(decode.decode_file(path, channels), 28, 28) for path in paths]
    np.save(tmp_path / "decoded.npy", np.stack(decoded))
    assert use(script, *paths) == use(script, tmp_path / "decoded.npy")


class Inverse(nn.Module):
    """Solves a system of equations, for which ONNX has no operation."""

    @nn.compact
    def __call__(self, image, train=False):
        square = image[:, :4, :4, 0] + 9 * jax.numpy.eye(4)
        return Dense(10)(jax.numpy.linalg.inv(square).reshape(len(image), -1))


@pytest.mark.usefixtures("runtime")
def test_a_network_that_cannot_go_is_refused(tmp_path):
    said = r"Inverse cannot be exported as ONNX \(.+\); use --format=stablehlo$"
    with pytest.raises(ConfigError, match=said):
        export_onnx.export(make_run(tmp_path, Inverse()), tmp_path / "out", make_examples(3))
    assert not (tmp_path / "out").exists()


def test_without_jax2onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    adds = r"\./launch\.sh setup --with=onnx adds it"
    said = f"^--format=onnx: needs jax2onnx, which is missing; {adds}$"
    with pytest.raises(ConfigError, match=said):
        export_onnx.export(make_run(tmp_path, models.MLP()), tmp_path, make_examples(3))


def test_another_format_is_refused(tmp_path, caplog):
    assert main.main(["export", str(tmp_path), "--format=tflite"]) == 2
    assert "--format=tflite: must be stablehlo or onnx" in caplog.text
