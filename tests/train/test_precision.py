"""`matmul_precision` in the programs of training, evaluation, prediction and export."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import models
from cnn_jax.analysis import export
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies.compile.programs import _shapes
from cnn_jax.train import optim, parallel, start, step
from tests.quick import make_run

DATA = DataConfig("mine", test_time_augmentation="mirror")
MODELS = {
    "lenet": (models.LeNet(), (28, 28, 1), {}),
    "speedrun": (models.SpeedrunCNN(), (32, 32, 3), {"optimizer": optim.airbench(8)}),
    "fully_conv": (models.FullyConvCNN(), (28, 28, 1), {}),
}


def precisions_of(text: str) -> set[str]:
    """Those of the matmuls and convolutions in StableHLO's text."""
    names = ("stablehlo.dot_general", "stablehlo.convolution")
    lines = [line for line in text.splitlines() if any(name in line for name in names)]
    assert lines
    return {" ".join(re.findall(r"HIGHEST|HIGH|DEFAULT", line)) for line in lines}


def lowered(function, *arguments) -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("default", {"", "DEFAULT DEFAULT"}),
        ("tensorfloat32", {"HIGH HIGH"}),
        ("highest", {"HIGHEST HIGHEST"}),
    ],
)
def test_every_matmul_and_convolution_has_it(name, precision, expected):
    model, shape, fields = MODELS[name]
    config = Config(model, DATA, batch_size=8, matmul_precision=precision, **fields)
    optimizer = optim.make_optimizer(config, 10)
    state = jax.eval_shape(start.state_maker(config, optimizer, shape))
    image = np.zeros((8, *shape), np.uint8)
    counts = {key: np.zeros(8, np.int32) for key in ("label", "index")}
    batch = _shapes({"image": image, **counts, "mask": np.zeros(8, np.float32)}, 8)
    train = functools.partial(step.train_step, model=model, optimizer=optimizer, config=config)
    assert precisions_of(lowered(train, state, batch)) <= expected
    options = {
        "model": model,
        "data": DATA,
        "compute_dtype": "float32",
        "matmul_precision": precision,
    }
    evaluate = functools.partial(step.eval_step, **options)
    assert precisions_of(lowered(evaluate, state.variables, batch)) <= expected
    scores = functools.partial(step.class_map_step, **options)
    assert precisions_of(lowered(scores, state.variables, batch["image"])) <= expected


@pytest.mark.parametrize(
    ("precision", "expected"), [("highest", "HIGHEST HIGHEST"), ("default", "")]
)
def test_an_exported_network_keeps_it(tmp_path, precision, expected):
    run = make_run(tmp_path, models.LeNet(), matmul_precision=precision)
    exported = jax.export.deserialize(bytearray(export.to_stablehlo(run)))
    assert precisions_of(exported.mlir_module()) == {expected}


def test_on_a_cpu_the_bits_stay():
    def after(precision: str):
        config = Config(models.LeNet(), DATA, batch_size=8, matmul_precision=precision)
        optimizer = optim.make_optimizer(config, 10)
        state = start.state_maker(config, optimizer, (28, 28, 1))()
        random = np.random.default_rng(0)
        batch = {
            "image": jnp.array(random.integers(0, 256, (8, 28, 28, 1), np.uint8)),
            "label": jnp.arange(8, dtype=jnp.int32),
            "index": jnp.arange(8, dtype=jnp.int32),
        }
        train = functools.partial(
            step.train_step, model=config.model, optimizer=optimizer, config=config
        )
        state, loss = parallel.jit(train)(state, batch)
        return jax.device_get((state.params, loss))

    plain, highest = after("default"), after("highest")
    jax.tree.map(np.testing.assert_array_equal, plain, highest)
