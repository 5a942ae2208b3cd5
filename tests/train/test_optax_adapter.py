"""Every optimizer and wrapper of Optax: trained, saved, restored, gone on with; or refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.validate import validate
from cnn_jax.train import checkpoint, optim, step
from cnn_jax.train.checkpoint_writer import CheckpointWriter
from cnn_jax.train.optax_adapter import eval_params
from tests.quick import noisy_variables, quick_jit

SHAPE = (4, 4, 1)
contrib = optax.contrib


class Two(nn.Module):
    """A convolution and a dense layer, for optimizers that tell matrices from other arrays."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.relu(nn.Conv(2, (3, 3))(image))
        return nn.Dense(3)(x.reshape(len(x), -1))


def around(wrapper, *arguments, **options):
    """A factory of SGD inside `wrapper`."""
    return lambda learning_rate: wrapper(optax.sgd(learning_rate), *arguments, **options)


def behind(transformation):
    """A factory of a transformation and SGD."""
    return lambda learning_rate: optax.chain(transformation, optax.sgd(learning_rate))


def before(make):
    """A factory of SGD and what `make()` returns."""
    return lambda learning_rate: optax.chain(optax.sgd(learning_rate), make())


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


MASK = {name: {"kernel": np.zeros((1, 1)), "bias": np.zeros(1)} for name in ("Conv_0", "Dense_0")}
STATELESS = optax.chain(
    optax.adaptive_grad_clip(0.1),
    optax.centralize(),
    optax.clip(0.1),
    optax.clip_by_block_rms(0.1),
    contrib.normalize(),
    optax.normalize_by_update_norm(),
    optax.scale_by_trust_ratio(),
    optax.scale_by_param_block_norm(),
    optax.scale_by_param_block_rms(),
    optax.scale_by_sign(),
    optax.zero_nans(),
)
OPTIMIZERS = """
    adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lbfgs
    lion nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent radam rmsprop sgd sign_sgd
    signum yogi
"""
CONTRIB = """
    acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad momo momo_adam muon prodigy
    schedule_free_sgd simplified_ademamix sophia
"""
OTHERS = {
    "noisy_sgd": functools.partial(optax.noisy_sgd, key=0),
    "optimistic_adam": lambda learning_rate: optax.optimistic_adam(
        float(learning_rate(0)), optimism=0.5
    ),
    "rprop": lambda learning_rate: optax.rprop(float(learning_rate(0))),
    "sm3": lambda learning_rate: optax.sm3(float(learning_rate(0))),
    "schedule_free_adamw": lambda learning_rate: contrib.schedule_free_adamw(1e-2),
    "polyak_sgd": lambda learning_rate: optax.polyak_sgd(0.1),
    "lookahead": around(optax.lookahead, 2, 0.5),
    "lookahead, reset": around(optax.lookahead, 2, 0.5, reset_state=True),
    "schedule_free": lambda learning_rate: contrib.schedule_free(
        optax.sgd(learning_rate), learning_rate
    ),
    "sam": around(contrib.sam, optax.sgd(0.1)),
    "sam, opaque": around(contrib.sam, optax.sgd(0.1), opaque_mode=True),
    "mechanize": around(contrib.mechanize),
    "MultiSteps": around(optax.MultiSteps, 2),
    "apply_if_finite": around(optax.apply_if_finite, 3),
    "flatten": around(optax.flatten),
    "masked": around(optax.masked, is_matrix),
    "selective_transform": lambda learning_rate: optax.selective_transform(
        optax.sgd(learning_rate), freeze_mask=is_matrix(MASK)
    ),
    "partition": lambda learning_rate: optax.partition(
        {True: optax.sgd(learning_rate), False: optax.adam(learning_rate)}, is_matrix
    ),
    "conditionally_mask": around(optax.conditionally_mask, lambda step: step < 2),
    "conditionally_transform": around(optax.conditionally_transform, lambda step: step < 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd),
    "split_real_and_imaginary": around(contrib.split_real_and_imaginary),
    "with_extra_args_support": around(optax.with_extra_args_support),
    "named_chain": lambda learning_rate: optax.named_chain(("sgd", optax.sgd(learning_rate))),
    "reduce_on_plateau": before(lambda: contrib.reduce_on_plateau(patience=1)),
    "backtracking": before(lambda: optax.scale_by_backtracking_linesearch(5)),
    "zoom": before(lambda: optax.scale_by_zoom_linesearch(5)),
    "add_noise": behind(optax.add_noise(0.1, 0.5, key=0)),
    "apply_every": behind(optax.apply_every(2)),
    "ema": behind(optax.ema(0.9)),
    "freeze": behind(optax.freeze(is_matrix)),
    "keep_params_nonnegative": before(optax.keep_params_nonnegative),
    "stateless": behind(STATELESS),
    "snapshot": behind(optax.snapshot("norm", optax.tree.norm)),
}
EVERY = (
    {name: getattr(optax, name) for name in OPTIMIZERS.split()}
    | {name: getattr(contrib, name) for name in CONTRIB.split()}
    | OTHERS
)


def make_step(factory, **fields):
    config = validate(
        Config(Two(), DataConfig("tiny"), optimizer=factory, learning_rate=0.01, **fields)
    )
    optimizer = optim.make_optimizer(config, 10)
    return optimizer, functools.partial(
        step.train_step, model=config.model, optimizer=optimizer, config=config
    )


def first_state(optimizer):
    params = noisy_variables(Two(), SHAPE)["params"]
    opt_state = optimizer.init(params)
    return step.TrainState(
        step=jnp.int32(0),
        params=params,
        model_state={},
        opt_state=opt_state,
        rng=jnp.array([0, 1], jnp.uint32),
        sums=step.empty_sums(),
        eval_params=eval_params(opt_state, params),
    )


def batches(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "image": random.integers(0, 256, (8, *SHAPE), dtype=np.uint8),
            "label": random.integers(0, 3, 8).astype(np.int32),
            "index": np.arange(8, dtype=np.int32),
        }


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_trains_and_goes_on_with_equal_bits(name, tmp_path):
    optimizer, train = make_step(EVERY[name])
    state, train = quick_jit(first_state, static_argnums=0)(optimizer), quick_jit(train)
    for number, batch in enumerate(batches(4)):
        if number == 2:
            checkpoints = CheckpointWriter(tmp_path)
            checkpoints.start_writing(None)
            checkpoints.save(jax.device_get(state), {})
            checkpoints.close()
            restored = checkpoint.fill(state, checkpoints.read(2))
            restored = jax.tree.map(jnp.asarray, restored)
        state, loss = train(state, batch)
        if number >= 2:
            restored, _ = train(restored, batch)
    assert np.isfinite(loss)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    start = noisy_variables(Two(), SHAPE)["params"]
    moved = jax.tree.map(lambda a, b: (np.asarray(a) != b).any(), state.params, start)
    assert any(jax.tree.leaves(moved))


def test_an_array_without_elements_is_saved(tmp_path):
    """`galore` holds arrays of no elements for what it does not project, which Orbax refuses."""
    checkpoints = CheckpointWriter(tmp_path)
    params = {"bias": np.zeros(2)}
    state = {
        "step": np.int32(1),
        "params": params,
        "opt_state": {"none": np.zeros((0, 3), np.float16)},
    }
    checkpoints.start_writing(None)
    checkpoints.save(state, {})
    checkpoints.close()
    found = checkpoints.read(1).arrays["opt_state/none"]
    assert (found.shape, found.dtype) == ((0, 3), np.float16)
    assert "opt_state/none" not in checkpoints.read(1, training=False).arrays


# ---------------------------------------------------------------------------- what is evaluated


def train(factory, steps):
    """The state after each of the steps, from the first one on."""
    optimizer, one = make_step(factory)
    states, one = [quick_jit(first_state, static_argnums=0)(optimizer)], quick_jit(one)
    for batch in batches(steps):
        states.append(one(states[-1], batch)[0])
    return states


def expect(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, expected
    )


def test_others_are_evaluated_at_their_parameters():
    state = train(optax.sgd, 1)[-1]
    assert state.eval_params == {}
    assert state.variables == {"params": state.params}


def test_lookahead_is_evaluated_at_its_slow_parameters():
    """Zhang et al., arXiv 1907.08610: half way from the slow to the fast ones every two steps."""
    slow = train(OTHERS["lookahead"], 3)
    fast = train(optax.sgd, 2)
    expect(slow[0].variables["params"], fast[0].params)
    expect(slow[1].variables["params"], fast[0].params)
    expect(slow[1].params, fast[1].params)
    half = jax.tree.map(lambda a, b: (a + b) / 2, fast[0].params, fast[2].params)
    for found in (slow[2].variables["params"], slow[2].params, slow[3].variables["params"]):
        expect(found, half)


def test_schedule_free_is_evaluated_at_its_average():
    """Defazio et al., arXiv 2405.15682: x is the mean of z where the rate is constant."""
    states = train(OTHERS["schedule_free"], 3)
    z = [state.opt_state[0].z for state in states]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *z[1:])
    expect(states[3].variables["params"], mean)
    y = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, mean, z[3])
    expect(states[3].params, y)


def test_sam_is_evaluated_where_it_is_not_adversarial():
    states = train(OTHERS["sam"], 3)
    for number in (1, 3):  # after the first of its two steps
        expect(states[number].variables["params"], states[number - 1].params)
        assert (
            states[number].params["Conv_0"]["kernel"]
            != states[number - 1].params["Conv_0"]["kernel"]
        ).any()
    expect(states[2].variables["params"], states[2].params)


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (optax.sm3, "sm3 fails (TypeError: "),
        (optax.rprop, "rprop fails (TypeError: "),
        (
            functools.partial(optax.optimistic_adam, optimism=0.5),
            "optimistic_adam fails (ValueError: ",
        ),
        (
            functools.partial(contrib.dpsgd, l2_norm_clip=1.0, noise_multiplier=1.0, seed=0),
            "dpsgd fails (ValueError: Unlike other transforms, ",
        ),
        (
            lambda learning_rate: optax.masked(
                contrib.schedule_free(optax.sgd(learning_rate), learning_rate), is_matrix
            ),
            "ScheduleFree evaluates the network with parameters of its own",
        ),
        (
            lambda learning_rate: optax.chain(
                *[contrib.sam(optax.sgd(learning_rate), optax.sgd(0.1)) for _ in range(2)]
            ),
            "SAM, SAM evaluates the network with parameters of its own; there must be one",
        ),
        (lambda learning_rate: optax.add_decayed_weights("much"), "<lambda> fails (TypeError: "),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_used_is_refused_in_one_line(factory, said):
    with pytest.raises(ConfigError) as caught:
        train(factory, 1)
    message = str(caught.value)
    assert message.startswith("optimizer: ")
    assert said in message
    assert "\n" not in message


def test_a_state_that_changes_its_shape_is_refused():
    grows = optax.GradientTransformation(
        lambda params: jnp.zeros(1),
        lambda updates, state, params=None: (updates, jnp.append(state, 1)),
    )
    with pytest.raises(ConfigError, match=r"<lambda> changes the shapes or types of its state"):
        train(lambda learning_rate: grows, 1)
