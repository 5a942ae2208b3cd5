"""Four virtual devices: equal numbers on 1, 2 and 4 of them, under jit and under pmap."""

import dataclasses
import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import models
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Conv, Dense, Flatten
from cnn_jax.train import evaluation, loop, optim, parallel, step
from cnn_jax.train.processes import start_processes
from tests.networks import Small
from tests.quick import noisy_state, unoptimised
from tests.tiny import REPOSITORY, make_examples

SHAPE = (28, 28, 1)


def make_config(**fields):
    data = DataConfig("tiny", mean=(0.2,), std=(0.3,), flip=True, crop_padding=2, mixup=0.4)
    # SGD: Adam would make steps of full size out of rounding noise.
    sgd = functools.partial(optax.sgd, momentum=0.9)
    fields = {"data": data, "optimizer": sgd, "learning_rate": 0.05, "batch_size": 16, **fields}
    return Config(Small(), label_smoothing=0.1, clip_norm=5.0, weight_decay=1e-3, **fields)


def make_batches(count, size=16):
    examples = make_examples(160)
    order = np.random.default_rng(5).permutation(160)
    parts = [order[size * i : size * (i + 1)] for i in range(count)]
    return [examples[part] | {"index": part.astype(np.int32)} for part in parts]


def pure_step(axis_name=None):
    config = make_config()
    optimizer = optim.make_optimizer(config, steps_per_epoch=10)
    train = functools.partial(
        step.train_step, model=Small(axis_name=axis_name), optimizer=optimizer, config=config
    )
    return noisy_state(Small(), optimizer, SHAPE), train


@functools.cache  # compiled once
def jit_step(devices):
    return parallel.jit_step(pure_step()[1], parallel.make_mesh(devices))


@functools.cache
def pmap_step(devices):
    return parallel.pmap_step(pure_step(axis_name=parallel.AXIS)[1], devices)


def run_jit(devices, batches):
    mesh = parallel.make_mesh(devices)
    state, losses = parallel.replicate(pure_step()[0], mesh), []
    for batch in batches:
        state, loss = jit_step(devices)(state, parallel.shard(batch, mesh))
        losses.append(float(loss))
    return parallel.to_host(state), losses


def run_pmap(devices, batches):
    state, losses = pure_step()[0], []
    for batch in batches:
        state, loss = pmap_step(devices)(state, batch)
        losses.append(float(loss))
    return jax.device_get(state), losses


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture(scope="module")
def on_one_device():
    return run_jit(1, make_batches(4))


@pytest.mark.parametrize(
    ("run", "devices"),
    [(run_jit, 2), (run_jit, 4), (run_pmap, 1), (run_pmap, 2), (run_pmap, 4)],
)
def test_equal_results_on_any_number_of_devices(run, devices, on_one_device):
    expected, losses = on_one_device
    found, found_losses = run(devices, make_batches(4))
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    assert (int(found.step), int(found.sums["count"])) == (4, 64)


def test_the_comparison_could_fail(on_one_device):
    """Without the axis name each device has its own statistics and masks."""
    state, pure = pure_step()
    _, loss = parallel.pmap_step(pure, 4)(state, make_batches(1)[0])
    assert float(loss) != pytest.approx(on_one_device[1][0], rel=1e-4)


def test_a_pmap_step_goes_on_from_a_jit_step():
    """The states are interchangeable, so their checkpoints are."""
    batches = make_batches(4)
    expected, _ = run_jit(2, batches)
    state, _ = run_jit(2, batches[:2])
    for batch in batches[2:]:
        state, _ = pmap_step(4)(state, batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(state), expected)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_equal_evaluation_on_any_number_of_devices(devices):
    examples = make_examples(30)  # the last batch of 8 has 2 places to fill
    mesh = parallel.make_mesh(devices)
    model = models.MLP()
    data = DataConfig("tiny")
    state = noisy_state(model, optax.sgd(0.1), SHAPE)
    variables = {"params": state.params, "batch_stats": {}}
    eval_step = evaluation.make_eval_step(Config(model, data), mesh)
    result = evaluation.evaluate_examples(
        eval_step, parallel.replicate(variables, mesh), examples, 8, mesh
    )
    logits = np.asarray(model.apply(variables, examples.image / np.float32(255)), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected = -log_probabilities[np.arange(30), examples.label].mean()
    assert result.examples == 30
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)
    assert result.accuracy == (logits.argmax(1) == examples.label).mean()


class Dropped(nn.Module):
    """flax's own dropout, which draws one mask for the array that it is given."""

    stream: str = "dropout"

    @nn.compact
    def __call__(self, image, train=False):
        mask = nn.Dropout(0.5, rng_collection=self.stream)(
            jnp.ones((len(image), 64)), deterministic=not train
        )
        self.variable("seen", "masks", jnp.zeros, (4, 4, 64))
        if train:
            masks = jax.lax.all_gather(mask, parallel.AXIS)
            self.put_variable("seen", "masks", masks)
        return Dense(10)(Flatten()(image)) + mask.sum()


@pytest.mark.parametrize("stream", ["dropout", "drop_path"])
def test_flax_dropout_under_pmap_draws_a_mask_of_its_own_on_each_device(stream):
    model, config = Dropped(stream), make_config()
    optimizer = optim.make_optimizer(config, steps_per_epoch=10)
    pure = functools.partial(step.train_step, model=model, optimizer=optimizer, config=config)
    state = step.init_state(model, optimizer, SHAPE, 0)
    state, _ = parallel.pmap_step(pure, 4)(state, make_batches(1)[0])
    masks = np.asarray(state.model_state["seen"]["masks"])
    assert len({mask.tobytes() for mask in masks}) == 4


# ------------------------------------------------------------------------------- refusals


def test_a_batch_that_does_not_divide(monkeypatch, splits, tmp_path):
    mesh = parallel.make_mesh(4)
    with pytest.raises(ConfigError, match=r"^batch_size=30: must be divisible by the 4 devices$"):
        parallel.check_divides(mesh, 30)
    parallel.check_divides(mesh, 32)
    parallel.check_divides(parallel.make_mesh(1), 31)

    def compile_nothing(*arguments, **options):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax, "jit", compile_nothing)
    config = dataclasses.replace(make_config(), batch_size=30, devices=4)
    with pytest.raises(ConfigError, match=r"^batch_size=30: must be divisible by the 4 devices$"):
        loop.train(config, tmp_path / "run", splits=splits)
    assert not (tmp_path / "run").exists()


def test_more_devices_than_there_are():
    assert parallel.make_mesh().size == 4
    assert parallel.make_mesh(3).size == 3
    with pytest.raises(ConfigError, match=r"^devices=5: only 4 visible \(cpu\)$"):
        parallel.make_mesh(5)


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "said"),
    [
        ("", 2, 0, "--coordinator=: must be host:port"),
        (None, 2, 1, "--coordinator=: must be host:port"),
        ("host", 2, 0, "--coordinator=host: must be host:port"),
        ("host:", 2, 0, "--coordinator=host:: must be host:port"),
        (":80", 2, 0, "--coordinator=:80: must be host:port"),
        ("host:80", 2, 2, "--process=2: must be from 0 to 1"),
        ("host:80", 2, -1, "--process=-1: must be from 0 to 1"),
        (None, 1, 1, "--process=1: must be from 0 to 0"),
    ],
)
def test_flags_of_several_processes(coordinator, processes, process, said):
    with pytest.raises(ConfigError) as caught:
        start_processes(coordinator, processes, process, 10)
    assert str(caught.value).startswith(said)


# -------------------------------------------------------------------------- arrays on devices


def test_donation_leaves_the_callers_arrays_alone():
    mesh = parallel.make_mesh(2)
    source = {"a": jnp.arange(8.0), "b": np.arange(3.0)}
    before = jax.tree.map(np.array, source)
    copy = parallel.replicate(source, mesh)
    double = parallel.jit_step(lambda state, batch: jax.tree.map(lambda x: 2 * x, state), mesh)
    result = double(copy, parallel.shard({"x": np.zeros(4, np.float32)}, mesh))
    assert copy["a"].is_deleted()  # donated, or the test shows nothing
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, source), before)
    np.testing.assert_array_equal(parallel.to_host(result)["a"], 2 * before["a"])
    # ... nor the other way round: a copy of a copy
    again = parallel.replicate(result, mesh)
    double(again, parallel.shard({"x": np.zeros(4, np.float32)}, mesh))
    np.testing.assert_array_equal(parallel.to_host(result)["a"], 2 * before["a"])


def test_without_donation_the_argument_stays():
    mesh = parallel.make_mesh(2)
    state = parallel.replicate({"a": jnp.arange(8.0)}, mesh)
    keep = parallel.jit_step(lambda state, batch: state, mesh, donate=False)
    keep(state, parallel.shard({"x": np.zeros(4, np.float32)}, mesh))
    assert not state["a"].is_deleted()


def test_a_batch_is_split_and_a_state_is_whole_on_every_device():
    mesh = parallel.make_mesh(4)
    batch = {"x": np.arange(24).reshape(8, 3)}
    shards = parallel.shard(batch, mesh)["x"].addressable_shards
    assert len({s.device for s in shards}) == 4
    for s in shards:
        np.testing.assert_array_equal(s.data, batch["x"][s.index])
        assert s.data.shape == (2, 3)
    copies = parallel.replicate(batch, mesh)["x"].addressable_shards
    assert len({s.device for s in copies}) == 4
    for s in copies:
        np.testing.assert_array_equal(s.data, batch["x"])


def test_a_single_process_is_the_main_one():
    assert parallel.is_main_process()
    assert parallel.largest(143) == 143


# -------------------------------------------------------------------------- what XLA computes


def python(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_networks_are_computed_without_ynn_and_other_programs_as_xla_comes():
    """In a process of its own: XLA reads XLA_FLAGS, which stay the user's, once."""
    code = """
import os, jax, jax.numpy as jnp
from cnn_jax.train import parallel
def f(image, kernel):
    sizes = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=sizes)
    return jax.nn.relu(x) @ jnp.ones((16, 8))
image, kernel = jnp.ones((8, 12, 12, 8)), jnp.ones((3, 3, 8, 16))
for jit in (parallel.jit, jax.jit):
    print("ynn" in jit(f).lower(image, kernel).compile().as_text().lower())
print(os.environ["XLA_FLAGS"], jax.device_count())
"""
    count = "--xla_force_host_platform_device_count=3"
    assert python(code, XLA_FLAGS=count) == ["False", "True", count, "3"]


# The first wrong sums of jax-ml/jax#39103 were in the last of 32,769 rows: 1071645696 or
# 1065369600 instead of 32768**2, in jaxlib 0.10.2 with its defaults.
SUMS_OF_SQUARES = """
import jax, jax.numpy as jnp
def f(x):
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x)
i = jnp.arange(32_769, dtype=jnp.float32)
x = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
print(float(f(x)[-1]), float(jax.jit(f)(x)[-1]))
"""


def test_jit_computes_what_eager_execution_does():
    assert python(SUMS_OF_SQUARES) == [str(32768.0**2)] * 2


@pytest.mark.parametrize("count", [8, 49, 50, 64, 1000])
def test_arctan_of_many(count):
    """From 50 elements on jaxlib 0.10.2 returns other numbers (jax-ml/jax#39352)."""
    values = np.linspace(-300, 300, count).astype(np.float32)
    got = jax.jit(jnp.arctan)(values)
    np.testing.assert_allclose(got, np.arctan(values.astype(np.float64)), rtol=3e-7)


def test_a_jitted_network_computes_what_eager_execution_does():
    random = np.random.default_rng(0)
    image = random.normal(size=(64, 12, 12, 8)).astype(np.float32)
    kernel = random.normal(size=(3, 3, 8, 16)).astype(np.float32)

    def network(image, kernel):
        x = nn.relu(Conv(16, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, image))
        return jnp.sum(jax.nn.log_softmax(x.reshape(64, -1)) ** 2, axis=-1)

    np.testing.assert_allclose(jax.jit(network)(image, kernel), network(image, kernel), rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU alone drops them")
def test_a_step_keeps_its_barriers():
    """By the name of a pass of XLA, which it would not tell us if that changed."""

    def apart(state, batch):
        return jax.lax.optimization_barrier(jnp.maximum(state + batch.sum(), 0)).T * 2

    mesh = parallel.make_mesh(1)
    state, batch = jnp.ones((4, 3)), jnp.ones(2)
    compiled = parallel.jit_step(apart, mesh, donate=False).lower(state, batch).compile()
    assert "opt-barrier" in compiled.as_text()
    np.testing.assert_array_equal(compiled(state, batch), jnp.full((3, 4), 6))
