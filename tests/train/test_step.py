import dataclasses
import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax import models
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Conv, Dense, Flatten
from cnn_jax.train import optim, step
from cnn_jax.train.preprocess import alternate_flip, augment, normalise
from tests.networks import Linear, Small
from tests.quick import noisy_state, quick_jit
from tests.tiny import make_examples

pytestmark = pytest.mark.oldest

DATA = DataConfig("tiny")
SHAPE = (6, 5, 2)


class Map(nn.Module):
    """A class map [N, H, W, 3]."""

    @nn.compact
    def __call__(self, image, train=False):
        return Conv(3, (1, 1))(image)


def make_batch(count=8, shape=SHAPE, classes=3, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (count, *shape), dtype=np.uint8),
        "label": random.integers(0, classes, count).astype(np.int32),
        "index": random.permutation(100)[:count].astype(np.int32),
    }


def make_config(model, **fields):
    fields = {"optimizer": optax.sgd, "learning_rate": 0.5, "data": DATA, **fields}
    return Config(model, **fields)


def setup(config, shape=SHAPE):
    optimizer = optim.make_optimizer(config, steps_per_epoch=10)
    train = functools.partial(
        step.train_step, model=config.model, optimizer=optimizer, config=config
    )
    return noisy_state(config.model, optimizer, shape), quick_jit(train)


def evaluate(config, variables, batch):
    options = {"model": config.model, "data": config.data, "compute_dtype": config.compute_dtype}
    return quick_jit(functools.partial(step.eval_step, **options))(variables, batch)


def close(found, expected, rtol=1e-5, atol=1e-6):
    check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(check, found, expected)


# ---------------------------------------------------------------------- against a reference


def reference(kernel, bias, batch, rate, smoothing=0.0, decay=0.0, clip=None, mean=0.0, std=1.0):
    """A step of softmax regression in float64: kernel, bias and loss before it."""
    x = (batch["image"].reshape(len(batch["label"]), -1) / 255 - mean) / std
    logits = x @ kernel + bias
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    target = np.eye(3)[batch["label"]] * (1 - smoothing) + smoothing / 3
    loss = -(target * np.log(probabilities)).sum(1).mean()
    error = (probabilities - target) / len(x)
    grads = [x.T @ error, error.sum(0)]
    if clip:
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1, clip / norm) for g in grads]
    correct = (logits.argmax(1) == batch["label"]).sum()
    return kernel - rate * (grads[0] + decay * kernel), bias - rate * grads[1], loss, correct


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"label_smoothing": 0.3}, {"smoothing": 0.3}),
        ({"weight_decay": 0.1}, {"decay": 0.1}),
        ({"clip_norm": 0.01, "weight_decay": 0.1}, {"clip": 0.01, "decay": 0.1}),
        ({"data": DataConfig("x", mean=(0.4,), std=(0.2,))}, {"mean": 0.4, "std": 0.2}),
    ],
)
def test_steps_of_softmax_regression(fields, options):
    state, train = setup(make_config(Linear(3), **fields))
    kernel = np.asarray(state.params["Dense_0"]["kernel"], np.float64)
    bias = np.asarray(state.params["Dense_0"]["bias"], np.float64)
    total = right = 0
    for i in range(4):
        batch = make_batch(seed=i)
        state, loss = train(state, batch)
        kernel, bias, expected, correct = reference(kernel, bias, batch, 0.5, **options)
        total, right = total + 8 * expected, right + correct
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        close(state.params, {"Dense_0": {"kernel": kernel, "bias": bias}}, atol=1e-5)
        assert int(state.step) == i + 1
    sums = state.sums
    assert (int(sums["correct"]), int(sums["count"]), int(sums["bad_step"])) == (right, 32, -1)
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-5)


def test_a_step_of_lenet_is_optax_on_the_gradient_of_the_mean_loss():
    config = Config(models.LeNet(), DATA)
    state, train = setup(config, shape=(28, 28, 1))
    batch = make_examples(8)[np.arange(8)] | {"index": np.arange(8, dtype=np.int32)}

    def loss_of(params):
        logits = config.model.apply({"params": params}, batch["image"] / np.float32(255))
        chosen = jnp.take_along_axis(nn.log_softmax(logits), batch["label"][:, None], 1)
        return -chosen.mean()

    @quick_jit
    def update(params):
        adam = optax.adam(1e-3)
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, _ = adam.update(grads, adam.init(params))
        return loss, grads, optax.apply_updates(params, updates)

    loss, grads, expected = update(state.params)
    after, found = train(state, batch)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    # Adam divides by the gradient's size: compare where it is not rounding noise alone.
    for name, layer in expected.items():
        for kind, leaf in layer.items():
            clear = np.abs(grads[name][kind]) > 1e-5
            assert clear.mean() > 0.3
            np.testing.assert_allclose(
                after.params[name][kind][clear], leaf[clear], rtol=1e-4, atol=2e-6
            )


def test_batch_statistics_are_updated_and_used_in_evaluation():
    config = make_config(Small(3, 1, 0.0))
    state, train = setup(config)
    batch = make_batch()
    after, _ = train(state, batch)
    kernel = np.asarray(state.params["Conv_0"]["kernel"])
    x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False).apply(
        {"params": {"kernel": kernel}}, batch["image"] / np.float32(255)
    )
    x = np.asarray(x, np.float64).reshape(-1, 4)
    found = after.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], 0.9 + 0.1 * x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * x.var(0), rtol=1e-4)
    masked = {**batch, "mask": np.ones(8, np.float32)}
    variables = after.variables
    sums = evaluate(config, variables, masked)
    logits = config.model.apply(variables, batch["image"] / np.float32(255))
    expected = step.cross_entropy(logits, batch["label"]).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)


# ------------------------------------------------------------------------------- randomness


def test_dropout_follows_seed_and_step_alone():
    state, train = setup(make_config(Small(3, 1, 0.5)))
    batch = make_batch()
    losses = [float(train(state.replace(step=jnp.int32(n)), batch)[1]) for n in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]
    other = jax.random.key_data(jax.random.key(9))
    assert float(train(state.replace(rng=other), batch)[1]) != losses[0]
    np.testing.assert_array_equal(train(state, batch)[0].rng, state.rng)


def test_the_seed_draws_the_parameters_and_the_rest():
    optimizer = optim.make_optimizer(make_config(Linear(3)), steps_per_epoch=10)
    init = quick_jit(functools.partial(step.init_state, Linear(3), optimizer, (3, 3, 1)))
    states = [init(seed) for seed in (0, 0, 1)]
    kernels = [np.asarray(s.params["Dense_0"]["kernel"]) for s in states]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()
    assert (np.asarray(states[0].rng) != np.asarray(states[2].rng)).any()
    assert (states[0].rng.dtype, states[0].rng.shape) == (jnp.uint32, (2,))
    assert int(states[0].step) == 0
    assert jax.tree.leaves(states[0].model_state) == []


def test_augmentation_is_for_training_and_follows_the_index():
    plain = make_config(Linear(3))
    flipping = make_config(Linear(3), data=dataclasses.replace(DATA, flip=True, crop_padding=2))
    state, train = setup(flipping)
    batch = make_batch()
    loss = float(train(state, batch)[1])
    assert loss != pytest.approx(float(setup(plain)[1](state, batch)[1]), rel=1e-4)
    # Another order of the batch changes nothing, another place in the dataset does.
    turned = {name: array[::-1] for name, array in batch.items()}
    assert float(train(state, turned)[1]) == pytest.approx(loss, rel=1e-5)
    moved = batch | {"index": batch["index"] + 1}
    assert float(train(state, moved)[1]) != pytest.approx(loss, rel=1e-4)
    masked = batch | {"mask": np.ones(8, np.float32)}
    variables = {"params": state.params, "batch_stats": {}}
    results = [evaluate(config, variables, masked) for config in (plain, flipping)]
    assert results[0]["loss"] == results[1]["loss"]


# ---------------------------------------------------------------------------- augmentation


def augmented(data, count=64, key=0, index=None, shape=(6, 5, 2)):
    image = np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)
    index = np.arange(count, dtype=np.int32) if index is None else index
    run = quick_jit(functools.partial(augment, data=data))
    return image, np.asarray(run(jax.random.key(key), image, index))


def windows(image, padding):
    """Every crop of a reflect-padded image, in NumPy."""
    height, width = image.shape[:2]
    border = ((padding, padding), (padding, padding), (0, 0))
    padded = np.pad(image, border, mode="reflect")
    places = [(r, c) for r in range(2 * padding + 1) for c in range(2 * padding + 1)]
    return {place: padded[place[0] :, place[1] :][:height, :width] for place in places}


def test_a_flip_mirrors_half_of_the_images():
    image, output = augmented(dataclasses.replace(DATA, flip=True), count=400)
    mirrored = np.array([(o == i[:, ::-1]).all() for i, o in zip(image, output, strict=True)])
    left = np.array([(o == i).all() for i, o in zip(image, output, strict=True)])
    assert (mirrored ^ left).all()
    assert 160 < mirrored.sum() < 240
    assert output.dtype == np.uint8


@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_a_window_of_the_reflected_image(padding):
    image, output = augmented(dataclasses.replace(DATA, crop_padding=padding), count=400)
    seen = []
    for before, after in zip(image, output, strict=True):
        found = [p for p, w in windows(before, padding).items() if (w == after).all()]
        assert len(found) == 1
        seen += found
    assert output.shape == image.shape
    assert len(set(seen)) == (2 * padding + 1) ** 2  # every place, up to the borders
    rows, columns = np.array(seen).T
    assert abs(rows.mean() - padding) < 0.25 * padding
    assert abs(columns.mean() - padding) < 0.25 * padding
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2


def test_a_flip_and_a_crop_are_independent():
    data = dataclasses.replace(DATA, flip=True, crop_padding=1)
    image, output = augmented(data, count=400)
    seen = []
    for before, after in zip(image, output, strict=True):
        for flip in (False, True):
            candidates = windows(before[:, ::-1] if flip else before, 1)
            seen += [(flip, *p) for p, w in candidates.items() if (w == after).all()]
    assert len(seen) == 400
    assert len(set(seen)) == 18


def test_augmentation_does_not_depend_on_the_rest_of_the_batch():
    data = dataclasses.replace(DATA, flip=True, crop_padding=2)
    image, output = augmented(data)
    order = np.random.default_rng(2).permutation(64)[:16].astype(np.int32)
    run = quick_jit(functools.partial(augment, data=data))
    np.testing.assert_array_equal(run(jax.random.key(0), image[order], order), output[order])
    again = augmented(data)[1]
    np.testing.assert_array_equal(again, output)
    assert (augmented(data, key=1)[1] != output).any()
    assert (augmented(data, index=np.arange(1, 65, dtype=np.int32))[1] != output).any()


def test_alternating_flips_show_both_sides_in_any_two_epochs():
    image = np.random.default_rng(1).integers(0, 256, (400, 6, 5, 2), dtype=np.uint8)
    index = np.arange(400, dtype=np.int32)
    mirrored = []
    for epoch in range(3):
        epochs = np.full(400, epoch, np.int32)
        output = np.asarray(quick_jit(alternate_flip)(jax.random.key(0), image, index, epochs))
        sides = [(output == side).all((1, 2, 3)) for side in (image[:, :, ::-1], image)]
        assert (sides[0] ^ sides[1]).all()
        mirrored.append(sides[0])
    assert 160 < mirrored[0].sum() < 240
    np.testing.assert_array_equal(mirrored[1], ~mirrored[0])
    np.testing.assert_array_equal(mirrored[2], mirrored[0])


def test_alternating_flips_follow_the_epoch_not_the_step():
    config = make_config(Linear(3), data=dataclasses.replace(DATA, alternating_flip=True))
    state, train = setup(config)
    batch = make_batch()
    losses = []
    for epoch, done in ((0, 0), (0, 5), (1, 5), (2, 0)):
        at = state.replace(step=jnp.int32(done))
        losses.append(float(train(at, batch | {"epoch": np.full(8, epoch, np.int32)})[1]))
    assert losses[0] == losses[1] == losses[3] != losses[2]


def shifted(image, rows, columns):
    """Moved by pixels, what enters mirrored at the border: NumPy's `reflect`."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    height, width = image.shape[1:3]
    return padded[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]


@pytest.mark.parametrize("augmentation", ["none", "mirror", "mirror_shift"])
def test_test_time_augmentation_averages_the_logits_of_the_views(augmentation):
    data = dataclasses.replace(DATA, test_time_augmentation=augmentation)
    config = make_config(Linear(3), data=data)
    state, _ = setup(config)
    variables = {"params": state.params, "batch_stats": {}}
    image = make_batch()["image"]
    plain = functools.partial(
        step.predict_step, variables, model=Linear(3), data=DATA, compute_dtype="float32"
    )
    views = [(1.0, image)]
    if augmentation == "mirror_shift":
        views = [(0.5, image), (0.25, shifted(image, -1, -1)), (0.25, shifted(image, 1, 1))]
    if augmentation != "none":
        views = [(w / 2, v) for w, x in views for v in (x, x[:, :, ::-1])]
    expected = sum(weight * plain(view) for weight, view in views)
    found = step.predict_step(variables, image, model=Linear(3), data=data, compute_dtype="float32")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_augmentation_leaves_the_images():
    image, output = augmented(DATA)
    np.testing.assert_array_equal(output, image)


def test_normalisation():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    plain = np.asarray(normalise(image, DATA))
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, image / 255, rtol=1e-6)
    assert (plain.min(), plain.max()) == (0.0, 1.0)
    data = DataConfig("x", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    expected = (image / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    np.testing.assert_allclose(normalise(image, data), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ compute type


def test_bfloat16_keeps_float32_parameters_and_moves_the_loss_slightly():
    exact, train = setup(make_config(Small(3, 1, 0.0)))
    coarse, train_16 = setup(make_config(Small(3, 1, 0.0), compute_dtype="bfloat16"))
    close(exact.params, coarse.params, rtol=0, atol=0)
    batch = make_batch()
    for _ in range(3):
        exact, loss = train(exact, batch)
        coarse, loss_16 = train_16(coarse, batch)
        assert loss_16.dtype == jnp.float32
        assert 0 < abs(float(loss) - float(loss_16)) < 0.02 * float(loss)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, (exact, coarse))
    assert dtypes[0] == dtypes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse.params)} == {jnp.dtype("float32")}
    close(exact.params, coarse.params, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_compute_type_is_that_of_the_activations(compute_dtype):
    seen = set()

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            x = Dense(3)(Flatten()(image))
            seen.update({str(image.dtype), str(x.dtype)})
            return x

    state, _ = setup(make_config(Spy()))
    seen.clear()
    logits = step.predict_step(
        {"params": state.params},
        make_batch()["image"],
        model=Spy(),
        data=DATA,
        compute_dtype=compute_dtype,
    )
    assert seen == {compute_dtype}
    assert logits.dtype == jnp.float32


# -------------------------------------------------------------------- loss that is not finite


def test_the_first_step_with_a_bad_loss_is_kept():
    state, train = setup(make_config(Linear(3)))
    batch = make_batch()
    state, _ = train(state, batch)
    good = state.params
    infinite = jax.tree.map(lambda leaf: leaf + np.inf, state.params)
    state, loss = train(state.replace(params=infinite), batch)
    assert not np.isfinite(loss)
    assert int(state.sums["bad_step"]) == 1
    state, _ = train(state.replace(params=good), batch)
    state, _ = train(state.replace(params=infinite), batch)
    assert int(state.sums["bad_step"]) == 1
    assert not np.isfinite(state.sums["bad_loss"])
    assert int(state.step) == 4


# ------------------------------------------------------------------ evaluation and prediction


def test_evaluation_counts_what_the_mask_lets_through():
    state, _ = setup(make_config(Linear(3)))
    batch = make_batch(count=12)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1], np.float32)
    variables = {"params": state.params, "batch_stats": {}}
    config = make_config(Linear(3))
    sums = evaluate(config, variables, batch | {"mask": mask})
    kernel, bias = (np.asarray(state.params["Dense_0"][k], np.float64) for k in ("kernel", "bias"))
    confusion, losses = np.zeros((3, 3), int), 0.0
    for i in np.flatnonzero(mask):
        one = {name: array[i : i + 1] for name, array in batch.items()}
        logits = one["image"].reshape(1, -1) / 255 @ kernel + bias
        confusion[one["label"][0], logits.argmax()] += 1
        losses += reference(kernel, bias, one, 0.0)[2]
    np.testing.assert_array_equal(sums["confusion"], confusion)
    assert int(sums["confusion"].sum()) == 8
    np.testing.assert_allclose(sums["loss"], losses, rtol=1e-5)
    nothing = evaluate(config, variables, batch | {"mask": 0 * mask})
    assert float(nothing["loss"]) == 0
    assert int(nothing["confusion"].sum()) == 0


def test_a_class_map_counts_by_its_mean():
    state, train = setup(make_config(Map()))
    image = make_batch()["image"]
    options = {"model": Map(), "data": DATA, "compute_dtype": "float32"}
    logits = step.predict_step({"params": state.params}, image, **options)
    kernel = np.asarray(state.params["Conv_0"]["kernel"], np.float64).reshape(2, 3)
    expected = (image / 255).mean((1, 2)) @ kernel + np.asarray(state.params["Conv_0"]["bias"])
    assert logits.shape == (8, 3)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
    assert np.isfinite(train(state, make_batch())[1])


def test_cross_entropy():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    label = jnp.array([0, 2])
    first = 2 - np.log(np.exp(2) + 1 + np.exp(-1))
    for loss in (step.cross_entropy, step.cross_entropy_by_comparison):
        np.testing.assert_allclose(loss(logits, label), [-first, np.log(3)], rtol=1e-6)
        slope = jax.grad(lambda logits, loss=loss: loss(logits, label).sum())(logits)
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(slope, chances - np.eye(3)[label], rtol=1e-6, atol=1e-7)
    # 0.7 of the label's, 0.3 of the mean over all classes
    smoothed = 0.7 * -first + 0.3 * (-first + 2 - 1 / 3)
    found = step.cross_entropy(logits, label, 0.3)
    np.testing.assert_allclose(found, [smoothed, np.log(3)], rtol=1e-6)


def test_the_loss_has_no_scatter_on_a_gpu():
    def lowered(platform):
        shapes = jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
        slope = jax.jit(jax.grad(lambda *arguments: step.cross_entropy(*arguments).sum()))
        return jax.export.export(slope, platforms=(platform,))(*shapes).mlir_module()

    assert "stablehlo.scatter" not in lowered("cuda")
    assert "stablehlo.scatter" in lowered("cpu")


# ------------------------------------------------------------- streams and collections of a module


class Noisy(nn.Module):
    """Asks for two streams of random numbers, and keeps two collections besides BatchNorm's."""

    stream: str = "drop_path"

    @nn.compact
    def __call__(self, image, train=False):
        steps = self.variable("counters", "steps", lambda: jnp.int32(0))
        mean = self.variable("averages", "mean", jnp.zeros, image.shape[-1])
        x = nn.BatchNorm(use_running_average=not train)(image)
        if train:
            mean.value = 0.9 * mean.value + 0.1 * image.mean((0, 1, 2))
            x = x + jax.random.normal(self.make_rng(self.stream), x.shape)
            x = nn.Dropout(0.5, deterministic=False, rng_collection="second")(x)
        steps.value += 1  # in evaluation too, which drops it
        self.sow("intermediates", "x", x)
        self.sow("sown", "x", x)
        return Dense(3)(Flatten()(x))


def run_steps(model, count, **options):
    config = make_config(model, optimizer=optax.sgd)
    optimizer = optim.make_optimizer(config, 10)
    train = functools.partial(step.train_step, model=model, optimizer=optimizer, config=config)
    make = functools.partial(step.init_state, model, optimizer, SHAPE, 0)
    states, train = [quick_jit(make)()], quick_jit(functools.partial(train, **options))
    for number in range(count):
        states.append(train(states[-1], make_batch(seed=number))[0])
    return states


def test_every_collection_is_part_of_the_state():
    states = run_steps(Noisy(), 2)
    assert states[0].model_state.keys() == {"batch_stats", "counters", "averages"}
    assert [int(state.model_state["counters"]["steps"]) for state in states] == [1, 2, 3]
    first = make_batch()["image"].astype(np.float64).mean((0, 1, 2)) / 255
    found = states[1].model_state["averages"]["mean"]
    np.testing.assert_allclose(found, 0.1 * first, rtol=1e-4)
    data = {"image": make_batch()["image"], "data": DATA, "compute_dtype": "float32"}
    logits = step.predict_step(states[2].variables, model=Noisy(), **data)
    again = step.predict_step(states[2].variables, model=Noisy(), **data)
    np.testing.assert_array_equal(logits, again)


def test_every_stream_has_a_key_of_its_own_by_its_name():
    one, same, other = (run_steps(Noisy(name), 1)[1].params for name in ("a", "a", "b"))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one["Dense_0"]["kernel"] != other["Dense_0"]["kernel"]).any()


def test_a_stream_that_is_asked_for_by_has_rng():
    class Asks(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            scale = 0.0 if train and self.has_rng("noise") else 1.0
            return Dense(3)(scale * Flatten()(image))

    before, after = (state.params["Dense_0"]["kernel"] for state in run_steps(Asks(), 1))
    np.testing.assert_array_equal(before, after)


def test_noise_in_evaluation_is_the_same_at_every_call():
    class Always(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            return Dense(3)(Flatten()(image)) + jax.random.normal(self.make_rng("noise"), (3,))

    state = run_steps(Always(), 1)[1]
    data = {"image": make_batch()["image"], "data": DATA, "compute_dtype": "float32"}
    logits = [step.predict_step(state.variables, model=Always(), **data) for _ in range(2)]
    np.testing.assert_array_equal(*logits)


class Changing(nn.Module):
    """A module that breaks the rules in one way."""

    how: str

    @nn.compact
    def __call__(self, image, train=False):
        if self.how == "late" and train:
            self.variable("batch_stats", "late", jnp.zeros, ())
        if self.how == "name":
            self.variable("opt_state", "mine", jnp.zeros, ())
        if self.how == "key":
            self.variable("keys", "mine", lambda: jax.random.key(0))
        seen = self.variable("batch_stats", "seen", jnp.zeros, 2)
        if self.how == "shape" and train:
            seen.value = jnp.zeros(3)
        if self.how == "type" and train:
            seen.value = jnp.zeros(2, jnp.int32)
        return Dense(3)(Flatten()(image))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("late", "model: makes its variable batch_stats/late in training only"),
        ("name", "model: its collection 'opt_state' must have another name"),
        ("key", "model: keeps a random key"),
        ("shape", "batch_stats/seen is float32[2] before a step, float32[3] after it"),
        ("type", "batch_stats/seen is float32[2] before a step, int32[2] after it"),
    ],
)
def test_a_module_whose_variables_no_step_can_carry_on(how, said):
    with pytest.raises(ConfigError) as caught:
        run_steps(Changing(how), 1)
    assert said in str(caught.value)
