"""Exported networks, used by a process that knows of JAX and NumPy alone."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import zipfile

import flax.linen as nn
import jax
import numpy as np
import pytest

from cnn_jax import main, models
from cnn_jax.analysis import export
from cnn_jax.analysis.convert import as_convolutions
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Dense
from cnn_jax.train import loop, step
from tests.quick import make_run, unoptimised

pytestmark = pytest.mark.oldest

GRAY, COLOUR = (28, 28, 1), (32, 32, 3)
COUNT = 3
# Runs every classify.py below a folder on its images.npy, and keeps its logits.
USE = """
import pathlib, runpy, sys
import numpy as np
for name in ("flax", "cnn_jax", "optax", "orbax", "tensorflow"):
    sys.modules[name] = None  # cannot be imported
for script in sorted(pathlib.Path(sys.argv[1]).glob("*/classify.py")):
    sys.argv = [str(script), str(script.with_name("images.npy"))]
    np.save(script.with_name("logits.npy"), runpy.run_path(str(script))["logits"])
"""


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


def use(folder, elsewhere):
    """What the exported networks below `folder` print."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder)],
        cwd=elsewhere,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected_logits(run, image):
    options = {"model": run.model, "data": run.data, "compute_dtype": run.compute_dtype}
    return np.asarray(
        jax.jit(lambda v, i: step.predict_step(v, i, **options))(run.variables, image)
    )


def test_every_architecture_in_another_process(tmp_path):
    data = DataConfig("x", mean=(0.4,), std=(0.3,))
    dense = [
        make_run(tmp_path, model, GRAY, data=data)
        for model in (
            models.MLP(),
            models.ConvStack(),
            models.MaxPoolCNN(),
            models.StridedCNN(),
            models.SamePaddingCNN(),
            models.LeNet(),
            models.FullyConvCNN(),
        )
    ]
    colour = DataConfig("x", mean=(0.4, 0.5, 0.3), std=(0.3, 0.2, 0.1))
    views = dataclasses.replace(colour, test_time_augmentation="mirror_shift")
    dense += [
        make_run(tmp_path, models.CifarCNN(), COLOUR, data=colour),
        make_run(tmp_path, models.SpeedrunCNN(), COLOUR, data=views),
    ]
    runs = {type(run.model).__name__: run for run in dense}
    assert runs.keys() | {"Convolutional"} == {*models.__all__}
    runs["Convolutional"] = as_convolutions(runs["LeNet"])
    random = np.random.default_rng(0)
    expected = {}
    for name, run in runs.items():
        export.export(run, tmp_path / "out" / name)
        image = random.integers(0, 256, (COUNT, *run.image_shape), np.uint8)
        np.save(tmp_path / "out" / name / "images.npy", image)
        expected[name] = expected_logits(run, image)
    (tmp_path / "elsewhere").mkdir()
    printed = use(tmp_path / "out", tmp_path / "elsewhere").splitlines()
    for name, logits in sorted(expected.items()):
        found = np.load(tmp_path / "out" / name / "logits.npy")
        assert found.shape == logits.shape == (COUNT, 10)
        assert np.abs(found - logits).max() <= 1e-6 * np.abs(logits).max(), name
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = exponentials / exponentials.sum(-1, keepdims=True)
        for i, row in enumerate(probabilities):
            number, class_name, probability = printed.pop(0).split("\t")
            assert (number, class_name) == (str(i), "abcdefghij"[row.argmax()])
            assert float(probability) == pytest.approx(row.max(), abs=1e-4)
    assert printed == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"), models.LeNet(), compute_dtype="bfloat16")
    return run, export.export(run, tmp_path_factory.mktemp("exported"))


def test_any_number_of_images_on_any_platform(exported):
    run, (archive, _) = exported
    with zipfile.ZipFile(archive) as file:
        model = jax.export.deserialize(file.read("model.stablehlo"))
    assert model.platforms == ("cpu", "cuda", "tpu")
    assert [str(shape) for shape in model.in_avals] == ["uint8[n,28,28,1]"]
    assert [str(shape) for shape in model.out_avals] == ["float32[n,10]"]
    for count in (1, 2, 7):
        image = np.random.default_rng(0).integers(0, 256, (count, *GRAY), np.uint8)
        found = np.asarray(jax.jit(model.call)(image))
        # In bfloat16, as the run was trained.
        np.testing.assert_allclose(found, expected_logits(run, image), rtol=0.05, atol=0.05)


def test_what_is_in_the_archive(exported):
    run, (archive, script) = exported
    with zipfile.ZipFile(archive) as file:
        assert sorted(file.namelist()) == ["about.json", "model.stablehlo"]
        about = json.loads(file.read("about.json"))
    assert about["class_names"] == [*run.class_names]
    assert about["input"]["shape"] == ["N", 28, 28, 1]
    assert (about["model"], about["checkpoint"], about["jax"]) == ("LeNet", 7, jax.__version__)
    assert len(script.read_text().splitlines()) < 30
    assert "cnn_jax" not in script.read_text()


def test_the_command(splits, tmp_path, capsys):
    workdir = tmp_path / "run"
    config = Config(models.MLP(), DataConfig("tiny_squares"), epochs=1, devices=1)
    loop.train(config, workdir, "mine", splits=splits)
    capsys.readouterr()
    assert main.main(["export", f"--workdir={workdir}"]) == 0
    folder = workdir / "export"
    paths = [folder / "model.zip", folder / "classify.py"]
    assert capsys.readouterr().out.splitlines() == [f"written to {path}" for path in paths]
    np.save(tmp_path / "images.npy", np.zeros((2, *GRAY), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["classify.py", str(tmp_path / "images.npy")])
        runpy.run_path(str(folder / "classify.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["0", "1"]
    assert lines[0].split("\t")[1:] == lines[1].split("\t")[1:]


def test_class_names_are_data_and_no_code(tmp_path):
    names = ('"; raise SystemExit("', "{0}", "'''", '"""', "\\", "é", "g", "h", "i", "j")
    run = make_run(tmp_path, models.MLP(), class_names=names)
    export.export(run, tmp_path / "out" / "x")
    np.save(tmp_path / "out" / "x" / "images.npy", np.zeros((1, *GRAY), np.uint8))
    printed = use(tmp_path / "out", tmp_path)
    best = expected_logits(run, np.zeros((1, *GRAY), np.uint8)).argmax()
    assert printed.split("\t")[1] == names[best]


# -------------------------------------------------------------------------- what is refused


class Counting(nn.Module):
    """Needs to know how many images there are."""

    @nn.compact
    def __call__(self, image, train=False):
        return Dense(10)(image.reshape(len(image), -1)) * (1.0 if image.shape[0] > 4 else 2.0)


def test_a_network_that_needs_to_know_the_number_of_images(tmp_path):
    run = make_run(tmp_path, Counting())
    said = rf"^workdir={tmp_path}: Counting cannot be exported \(.*\)$"
    with pytest.raises(ConfigError, match=said):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    run = make_run(tmp_path, models.MLP())
    with pytest.raises(ConfigError, match=r"/file is a file; name a folder$"):
        export.export(run, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"^--output=/proc/x: cannot be written: "):
        export.export(run, export.Path("/proc/x"))
