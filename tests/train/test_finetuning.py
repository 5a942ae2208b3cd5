"""Runs that begin with another run's parameters, and train a part of them, or at another rate."""

import dataclasses
import functools
import json
import logging
import shutil
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.traverse_util import flatten_dict

from cnn_jax.analysis.restore import load_run
from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.validate import validate
from cnn_jax.models.layers import BatchNorm, Dense, Flatten
from cnn_jax.train import groups, loop, optim, parallel, pretrained, start
from cnn_jax.train import workdir as workdirs
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.step import init_state, train_step
from tests.networks import Linear, Small
from tests.quick import quick_jit, unoptimised
from tests.tiny import make_examples

SHAPE = (28, 28, 1)


def make_config(**fields):
    defaults = {"epochs": 1, "batch_size": 32, "eval_batch_size": 48, "devices": 1}
    return Config(**{"model": Small(), "data": DataConfig("tiny"), **defaults, **fields})


def arrays_of(workdir):
    return Checkpoints(workdir).newest().arrays


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    with unoptimised():
        yield


@pytest.fixture(scope="module")
def source(splits, tmp_path_factory):
    """The workdir of an epoch of `make_config()`."""
    workdir = tmp_path_factory.mktemp("source")
    loop.train(make_config(), workdir, splits=splits)
    return workdir


# ------------------------------------------------------------------------------- init_from


def first_state_from(source, config, splits):
    found = pretrained.find(str(source))
    optimizer = optim.make_optimizer(config, 5)
    mesh = parallel.make_mesh(1)
    state = start.first_state(config, optimizer, splits.train, mesh, found)
    return parallel.to_host(state)


@pytest.mark.parametrize("which", ["", ":5", ":latest"])
def test_everything_of_an_equal_model_is_taken(source, splits, caplog, which):
    caplog.set_level(logging.INFO)
    state = first_state_from(f"{source}{which}", make_config(seed=7), splits)
    saved = arrays_of(source)
    for name, array in flatten_dict({"params": state.params, **state.model_state}, sep="/").items():
        np.testing.assert_array_equal(array, saved[name], name)
    assert state.step == 0
    assert f"{source}:5: 7 arrays taken (params BatchNorm_0, Conv_0, Dense_0; " in caplog.text
    assert "anew" not in caplog.text
    assert "left over" not in caplog.text


def test_a_head_of_another_size_is_made_anew_and_said(source, splits, caplog):
    caplog.set_level(logging.INFO)
    state = first_state_from(source, make_config(model=Small(12)), splits)
    new = init_state(Small(12), optax.sgd(0.1), SHAPE, 0)
    saved = arrays_of(source)
    np.testing.assert_array_equal(
        state.params["Dense_0"]["kernel"], new.params["Dense_0"]["kernel"]
    )
    np.testing.assert_array_equal(state.params["Conv_0"]["kernel"], saved["params/Conv_0/kernel"])
    np.testing.assert_array_equal(
        state.model_state["batch_stats"]["BatchNorm_0"]["var"],
        saved["batch_stats/BatchNorm_0/var"],
    )
    assert "made anew: params/Dense_0/kernel, 100x10 there, 100x12 here" in caplog.text


def test_a_model_with_nothing_in_common_is_refused(source, splits):
    with pytest.raises(ConfigError, match=r":5: not one of its parameters fits, by name and shape"):
        first_state_from(source, make_config(model=Linear(12)), splits)


def test_the_parameters_that_are_evaluated_are_taken(source):
    found = {"params/a": 1, "eval_params/a": 2, "batch_stats/b": 3}
    assert pretrained.evaluated(found) == {"params/a": 2, "batch_stats/b": 3}


def test_a_run_records_its_source_and_keeps_it(source, splits, tmp_path):
    run = functools.partial(loop.train, workdir=tmp_path / "run", splits=splits)
    run(make_config(seed=1), init_from=f"{source}:5")
    first = workdirs.read_config(tmp_path / "run")["init_from"]
    manifest = json.loads((source / "checkpoints/5/manifest/metadata").read_text())
    assert first == {"path": str(source), "step": 5, "sha256": manifest["sha256"]}
    more = make_config(seed=1, epochs=2)
    run(more, init_from=str(source))  # as before
    run(dataclasses.replace(more, epochs=3))  # or left out
    assert workdirs.read_config(tmp_path / "run")["init_from"] == first
    with pytest.raises(ConfigError, match=rf"run:10: the run in .* began from {source}:5, with"):
        run(dataclasses.replace(more, epochs=3), init_from=f"{tmp_path / 'run'}:10")
    with pytest.raises(ConfigError, match=r"began without it"):
        loop.train(make_config(), source, splits=splits, init_from=str(tmp_path / "run"))


def test_sources_that_cannot_be_used(source, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^--init_from=\S+:6: must be latest, best or a step in \S+: 5$"
    ):
        pretrained.find(f"{source}:6")
    with pytest.raises(CheckpointError, match=r"^--init_from=\S+nowhere:3: no such folder"):
        pretrained.find(f"{tmp_path}/nowhere:3")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as file:
        file.writestr("about.json", "{}")
    with pytest.raises(ConfigError, match=r"an exported file holds a program, not parameters"):
        pretrained.find(str(tmp_path / "model.zip"))


def test_a_source_that_was_damaged_or_changed(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    found = pretrained.find(str(copy))
    other = dataclasses.replace(found, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"is not the checkpoint with which this run began"):
        other.arrays()
    for path in (copy / "checkpoints/5/variables").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"damaged|is valid"):
        pretrained.find(str(copy))


# ------------------------------------------------------------------------ groups of parameters


@pytest.mark.parametrize(
    ("pattern", "path", "fitting"),
    [
        ("Conv_*", "Conv_0/kernel", True),
        ("Conv_0", "Conv_0/kernel", True),
        ("Conv_0/kernel", "Conv_0/kernel", True),
        ("Conv_1", "Conv_10/kernel", False),
        ("Conv_0/bias", "Conv_0/kernel", False),
        ("*/bias", "Block_0/Conv_0/bias", True),
        ("Conv_*", "Block_0/Conv_0/bias", False),
        ("conv_0", "Conv_0/kernel", False),
    ],
)
def test_what_a_pattern_fits(pattern, path, fitting):
    assert groups.fits([pattern], tuple(path.split("/"))) is fitting


def steps_of(config, count=3):
    """The state before and after `count` steps."""
    config = validate(config)
    optimizer = optim.make_optimizer(config, 5)
    more = {"freeze": config.freeze, "ema_decay": config.ema_decay}
    first = init_state(config.model, optimizer, SHAPE, 0, **more)
    step = quick_jit(
        functools.partial(train_step, model=config.model, optimizer=optimizer, config=config)
    )
    states = [first]
    for k in range(count):
        batch = make_examples(32, seed=k)
        arrays = {
            "image": batch.image,
            "label": batch.label,
            "index": np.arange(32, dtype=np.int32),
        }
        states.append(step(states[-1], arrays)[0])
    return jax.device_get(states)


@pytest.mark.parametrize(
    "optimizer", [optax.adamw, optax.contrib.schedule_free_adamw, optax.lamb, optax.lbfgs]
)
def test_frozen_modules_stay_bit_for_bit(optimizer):
    first, *_, last = steps_of(
        make_config(optimizer=optimizer, freeze=("Conv_*", "BatchNorm_0"), weight_decay=0.1)
    )
    before, after = (flatten_dict(state.variables, sep="/") for state in (first, last))
    assert before.keys() == after.keys()
    changed = {name for name, old in before.items() if not np.array_equal(old, after[name])}
    assert changed == {"params/Dense_0/kernel", "params/Dense_0/bias"}


class Normed(nn.Module):
    """Softmax regression behind a layer of batch normalisation."""

    norm: type

    @nn.compact
    def __call__(self, image, train=False):
        return Dense(10)(Flatten()(self.norm(use_running_average=not train)(image)))


@pytest.mark.parametrize("norm", [nn.BatchNorm, BatchNorm])
def test_a_frozen_batch_norm_normalises_with_its_running_statistics(norm):
    """As softmax regression on the features of evaluation: its first loss is that of evaluation."""
    config = make_config(model=Normed(norm), freeze=("BatchNorm_0",))
    optimizer = optim.make_optimizer(config, 5)
    state = init_state(config.model, optimizer, SHAPE, 0, freeze=config.freeze)
    examples = make_examples(32)
    batch = {"image": examples.image, "label": examples.label, "index": jnp.arange(32)}
    _, loss = train_step(state, batch, model=config.model, optimizer=optimizer, config=config)
    logits = config.model.apply(state.variables, examples.image / np.float32(255), train=False)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, examples.label).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"freeze": ("Cov_*",)},
            r"^freeze=Cov_\*: fits no parameter; there are BatchNorm_0/bias, ",
        ),
        ({"freeze": ("*",)}, r"^freeze=\*: must leave something to train"),
        ({"learning_rate_of": ("Cov_*=2",)}, r"^learning_rate_of=Cov_\*: fits no parameter"),
        (
            {"learning_rate_of": ("Conv_0=2",), "freeze": ("Conv_*",)},
            r"^learning_rate_of=Conv_0: fits no parameter; there are BatchNorm_0/bias, ",
        ),
        (
            {"learning_rate_of": ("Conv_0=2",), "optimizer": optax.contrib.schedule_free_sgd},
            r"^learning_rate_of=Conv_0=2: must be empty with this optimizer: ScheduleFree relates",
        ),
        (
            {"learning_rate_of": ("Conv_0=2",), "optimizer": optax.lbfgs},
            r"^learning_rate_of=Conv_0=2: must be empty with this optimizer: ScaleByZoomLinesearch",
        ),
        (
            {"ema_decay": 0.9, "optimizer": optax.contrib.schedule_free_sgd},
            r"^ema_decay=0.9: must be 0 with this optimizer, which has a mean of its own",
        ),
    ],
)
def test_groups_that_cannot_be(fields, said):
    with pytest.raises(ConfigError, match=said):
        steps_of(make_config(**fields), 0)


@pytest.mark.parametrize("optimizer", [optax.adamw, optax.sgd, optax.lion, optax.rmsprop])
def test_a_factor_is_a_learning_rate_of_its_own(optimizer):
    """The first step of each group is that of an optimizer with that rate for everything."""
    fields = {"optimizer": optimizer, "learning_rate": 0.01, "weight_decay": 0.1}
    factors = ("Conv_0=0.1", "*/bias=3", "Conv_*=7")
    own = steps_of(make_config(learning_rate_of=factors, **fields), 1)[1]
    for rate, names in ((0.001, ["Conv_0/kernel"]), (0.03, ["Dense_0/bias", "BatchNorm_0/bias"])):
        other = steps_of(make_config(**(fields | {"learning_rate": rate})), 1)[1]
        for name in names:
            found, expected = (flatten_dict(s.params, sep="/")[name] for s in (own, other))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------ the mean


def test_the_mean_of_the_parameters_is_that_of_float64():
    decay = 0.8
    states = steps_of(make_config(ema_decay=decay, optimizer=optax.sgd, learning_rate=0.5), 4)
    weights = decay ** np.arange(3, -1, -1, dtype=np.float64)

    def mean(*arrays):
        return np.tensordot(weights / weights.sum(), np.array(arrays, np.float64), 1)

    expected = jax.tree.map(mean, *(state.params for state in states[1:]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, states[-1].eval_params, expected)
    assert states[-1].variables["params"] is states[-1].eval_params


def test_the_mean_is_saved_restored_and_evaluated(splits, tmp_path):
    config = make_config(ema_decay=0.9)
    loop.train(config, tmp_path, splits=splits)
    loop.train(dataclasses.replace(config, epochs=2), tmp_path, splits=splits)
    whole = tmp_path / "whole"
    loop.train(dataclasses.replace(config, epochs=2), whole, splits=splits)
    found, expected = arrays_of(tmp_path), arrays_of(whole)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    kernel = load_run(tmp_path, model=Small()).variables["params"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(kernel, found["eval_params/Conv_0/kernel"])
    assert not np.array_equal(kernel, found["params/Conv_0/kernel"])


# -------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"class_weights": tuple(range(1, 11))}])
def test_parts_of_a_batch_give_the_update_of_the_whole(fields, devices):
    base = make_config(model=Linear(), optimizer=optax.sgd, learning_rate=0.5, **fields)
    examples, mesh, states = make_examples(32), parallel.make_mesh(devices), []
    batch = {"image": examples.image, "label": examples.label, "index": np.arange(32)}
    for parts in (1, 4):
        config = validate(dataclasses.replace(base, accumulate_steps=parts))
        optimizer = optim.make_optimizer(config, 5)
        state = parallel.replicate(init_state(config.model, optimizer, SHAPE, 0), mesh)
        pure = functools.partial(train_step, model=config.model, optimizer=optimizer, config=config)
        step = parallel.jit_step(pure, mesh)
        for _ in range(3):
            state, loss = step(state, parallel.shard(batch, mesh))
        states.append(parallel.to_host((state.params, state.sums, loss)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, *states)


def test_batch_norm_sees_one_part_after_the_other():
    config = make_config(accumulate_steps=2, model=Small(rate=0.0))
    first, last = steps_of(config, 1)
    image = make_examples(32, seed=0).image / np.float32(255)
    state = {"batch_stats": first.model_state["batch_stats"]}
    for part in (image[::2], image[1::2]):
        variables = {"params": first.params, **state}
        _, state = config.model.apply(variables, part, train=True, mutable=["batch_stats"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, last.model_state["batch_stats"], dict(state["batch_stats"]))


# ------------------------------------------------------------------------------ early stopping


def test_a_run_ends_where_validation_no_longer_improves(splits, tmp_path, capsys):
    held = dataclasses.replace(splits, validation=make_examples(40, seed=2))
    config = make_config(
        model=Linear(), epochs=9, learning_rate=1e-9, early_stopping_epochs=2
    )  # it never improves
    train = functools.partial(loop.train, workdir=tmp_path, splits=held)
    assert [line["epoch"] for line in train(config)] == [1, 2, 3]
    assert Checkpoints(tmp_path).newest().step == 15
    said = "stopped early after epoch 3: the best validation accuracy is that of epoch 1; "
    assert said in capsys.readouterr().out
    assert len(train(config)) == 3
    assert said in capsys.readouterr().out
    assert len(train(dataclasses.replace(config, early_stopping_epochs=4))) == 5
    with pytest.raises(ConfigError, match=r"^early_stopping_epochs=2: needs a validation split"):
        loop.train(config, tmp_path / "other", splits=splits)
