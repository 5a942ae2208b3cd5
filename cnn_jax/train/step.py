"""Pure steps: training, evaluation, prediction. No jit, no devices, no files.

With `axis_name`, the train step also runs under jax.pmap, each device on its part of the batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import groups
from cnn_jax.train.apply import (
    apply,
    collections_after,
    flat_collections,
    in_precision,
    make_rngs,
    one_score_each,
)
from cnn_jax.train.augmentation import augmented
from cnn_jax.train.optax_adapter import eval_params
from cnn_jax.train.preprocess import normalise, test_views

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """The complete state of a run at one step; a run restored from it continues bit for bit.

    Attributes:
      step: int32 [], training steps done.
      params: the model's parameters, float32.
      model_state: its other variables by collection, as {"batch_stats": ...} of BatchNorm layers.
      opt_state: of the Optax optimizer.
      rng: uint32 [2], data of the key from which every step's randomness is derived.
      sums: the epoch's sums so far, with the fields of `empty_sums`.
      eval_params: the parameters to evaluate if they are others than `params`: those that the
        optimizer's paper evaluates, or the mean of `Config.ema_decay`; else {}.
    """

    step: jax.Array
    params: Any
    model_state: dict[str, Any]
    opt_state: optax.OptState
    rng: jax.Array
    sums: Sums
    eval_params: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables with which the model is evaluated."""
        return {"params": self.eval_params or self.params, **self.model_state}


def empty_sums() -> Sums:
    """An epoch's sums before its first step.

    loss and correct are sums over `count` examples. bad_step is the epoch's first step with a loss
    that is not finite, counted from 0 over the run; -1 if there is none. bad_loss is that loss.
    """
    return {
        "loss": jnp.zeros((), jnp.float32),
        "correct": jnp.zeros((), jnp.int32),
        "count": jnp.zeros((), jnp.int32),
        "bad_step": jnp.full((), -1, jnp.int32),
        "bad_loss": jnp.zeros((), jnp.float32),
    }


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple,
    seed: int,
    image: jax.Array | None = None,
    given: dict[str, jax.Array] | None = None,
    *,
    freeze: Sequence[str] = (),
    ema_decay: float = 0.0,
) -> TrainState:
    """The state before the first step.

    Args:
      model: maps float32 [N, *image_shape] to logits.
      optimizer: from `optim.make_optimizer`.
      image_shape: (H, W, C).
      seed: of the parameters and of every later random choice.
      image: scaled training images [N, *image_shape], if the first parameters depend on them.
      given: variables that replace the new ones, by name ("params/Conv_0/kernel").
      freeze: of the Config.
      ema_decay: of the Config.

    Raises:
      ConfigError: `freeze` fits nothing or everything, or the optimizer is not one for `ema_decay`.
    """
    init_key, run_key = run_keys(seed)
    if image is None:
        image = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(init_key, image)
    if given:
        flat = flax.traverse_util.flatten_dict(variables, sep="/")
        variables = flax.traverse_util.unflatten_dict(flat | given, sep="/")
    params = variables.get("params", {})
    trained, frozen = groups.split(params, freeze)
    opt_state = optimizer.init(trained)
    evaluated = eval_params(opt_state, trained)
    if ema_decay and evaluated:
        raise ConfigError(
            f"ema_decay={ema_decay}: must be 0 with this optimizer, which has a mean of its own"
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state_of(variables),
        opt_state=opt_state,
        rng=jax.random.key_data(run_key),
        sums=empty_sums(),
        eval_params=_all_evaluated(evaluated, frozen)
        or (jax.tree.map(jnp.copy, params) if ema_decay else {}),
    )


def run_keys(seed: int) -> jax.Array:
    """The keys of a run: of its initialisation, and of all its steps."""
    return jax.random.split(jax.random.key(seed))


def step_keys(run_key: jax.Array, step: jax.Array | int) -> jax.Array:
    """The keys of a step: of augmentation and of dropout."""
    return jax.random.split(jax.random.fold_in(run_key, step))


def _all_evaluated(evaluated: Any, frozen: Any) -> Any:
    return groups.merge(evaluated, frozen) if evaluated else {}


def model_state_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections other than "params" that a model needs in its next call.

    Raises:
      ConfigError: one has the name of another part of a checkpoint, or holds a typed random key.
    """
    state = flax.traverse_util.unflatten_dict(flat_collections(variables))
    for name in state.keys() & TrainState.__dataclass_fields__.keys():
        raise ConfigError(f"model: its collection {name!r} must have another name")
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ConfigError("model: keeps a random key, which no checkpoint holds; use make_rng")
    return state


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> tuple[TrainState, jax.Array]:
    """One update of the parameters.

    Args:
      state: before the step.
      batch: image uint8 [N, H, W, C], label int32 [N], index int32 [N]; epoch int32 [N] for
        `alternating_flip`.
      model: the module; one with BatchNorm or `layers.Dropout` takes its own `axis_name`. Each
        random stream that it asks for gets a key; under pmap the keys differ by device.
      optimizer: from `optim.make_optimizer`.
      config: augmentation, scaling, loss and compute type; its class_weights are numbers or None.
      axis_name: the pmap axis over which the batch is split, None under jit.

    Returns:
      The state after the step, and the batch's mean loss before it.
    """
    with in_precision(config.matmul_precision):
        return _updated(state, batch, model, optimizer, config, axis_name)


def _updated(
    state: TrainState,
    batch: Batch,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None,
) -> tuple[TrainState, jax.Array]:
    """`train_step`, in the precision of the caller."""
    run_key = jax.random.wrap_key_data(state.rng)
    augment_key, dropout_key = step_keys(run_key, state.step)
    batch = augmented(run_key, augment_key, batch, config.data, axis_name)
    trained, frozen = groups.split(state.params, config.freeze)
    options: dict[str, Any] = {"model": model, "config": config, "axis_name": axis_name}
    loss_of: Callable = functools.partial(_loss_and_after, frozen, **options)
    (loss, (model_state, correct)), grads = _gradient(
        loss_of, trained, state.model_state, batch, dropout_key, config.accumulate_steps
    )
    count = jnp.array(len(batch["label"]), jnp.int32)
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
        model_state = jax.tree.map(lambda leaf: _mean_of(leaf, axis_name), model_state)
        count, correct = jax.lax.psum((count, correct), axis_name)
    extra = {"value": loss, "grad": grads}
    if axis_name is None:  # under pmap they would differ by device
        whole = (state.model_state, batch, dropout_key)
        extra |= _functions_of(lambda params: loss_of(params, *whole)[0])
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(_in_order(grads), state.opt_state, trained, **extra)
    trained = optax.apply_updates(trained, updates)
    params = groups.merge(trained, frozen)
    evaluated = _all_evaluated(eval_params(opt_state, trained), frozen)
    if config.ema_decay:
        evaluated = _mean_over_steps(state.eval_params, params, state.step, config.ema_decay)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        rng=state.rng,
        sums=_added(state.sums, state.step, loss, correct, count),
        eval_params=evaluated,
    )
    return new_state, loss


def _loss_and_after(
    frozen: Any,
    trained: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    config: Config,
    axis_name: str | None,
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """The mean loss of augmented examples; the model_state after them, the number that are correct."""

    def call(rngs: dict) -> tuple[jax.Array, Any]:
        variables = {"params": groups.merge(trained, frozen), **model_state}
        options: dict[str, Any] = {"train": True, "rngs": rngs, "mutable": [*model_state]}
        with groups.frozen_norms(config.freeze):
            return apply(model, variables, batch["image"], config.compute_dtype, **options)

    logits, updated = call(make_rngs(call, key, axis_name))
    logits = one_score_each(logits)
    loss = training_loss(logits, batch, config)
    correct = (logits.argmax(-1) == batch["label"]).sum(dtype=jnp.int32)
    after = collections_after(model_state, updated)
    return loss, (groups.keep_frozen(model_state, after, config.freeze), correct)


def _gradient(
    loss_of: Callable, params: Any, model_state: Any, batch: Batch, key: jax.Array, parts: int
) -> tuple[tuple[jax.Array, tuple[Any, jax.Array]], Any]:
    """What `jax.value_and_grad(loss_of, has_aux=True)` returns for the batch, from equal parts of it.

    Args:
      loss_of: (params, model_state, batch, key) -> mean loss, (model_state after it, correct).
      params: of the gradient.
      model_state: passed on from part to part.
      batch: N examples.
      key: each part has its own, derived from this one.
      parts: a divisor of N. A part takes every `parts`-th example, so that devices keep theirs.
    """
    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        return differentiate(params, model_state, batch, key)

    def add(before: Any, numbered: Any) -> tuple[Any, None]:
        number, part = numbered
        model_state, *sums = before
        own_key = jax.random.fold_in(key, number)
        (loss, (model_state, correct)), grads = differentiate(params, model_state, part, own_key)
        return (model_state, *jax.tree.map(jnp.add, sums, [loss, correct, grads])), None

    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
    # In a loop, XLA:CPU computes convolutions without vector instructions; there it is unrolled.
    unroll = parts if jax.default_backend() == "cpu" else 1
    first = (model_state, *zeros)
    after, _ = jax.lax.scan(add, first, (jnp.arange(parts), split), unroll=unroll)
    model_state, loss, correct, grads = after
    return (loss / parts, (model_state, correct)), jax.tree.map(lambda x: x / parts, grads)


def _in_order(grads: Any) -> Any:
    """The gradients; on a GPU the kernels' get the order in memory that the kernels have.

    cuDNN leaves the gradient of a kernel [KH, KW, C, O] in the order [O, KH, KW, C]. XLA would take
    that for all of the optimizer's arithmetic, read the state across, and copy each new average back.
    Of max_pool's step as compiled for an H100, the copies are 0.1 MB instead of 12.6, the kernels 80
    instead of 85.
    """

    def one(grad: jax.Array) -> jax.Array:
        if grad.ndim != 4:
            return grad
        return jax.lax.platform_dependent(
            grad,
            cuda=lambda grad: with_layout_constraint(grad, Layout((0, 1, 2, 3))),
            default=lambda grad: grad,
        )

    return jax.tree.map(one, grads)


def _mean_over_steps(mean: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The mean of the parameters after each step so far, weighted by decay**age.

    Equal to `optax.ema(decay, debias=True)` of the parameters: the initial ones do not count.
    """
    weight = (1 - decay) / (1 - decay ** (step + 1).astype(jnp.float32))
    return jax.tree.map(lambda old, new: old + weight * (new - old), mean, params)


def _functions_of(loss_of: Callable[[Any], jax.Array]) -> dict[str, Callable]:
    """The loss and its gradient as functions of the parameters, for optimizers that call them."""

    # A line search also passes it the arguments that it does not use itself.
    def value_fn(params: Any, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        return loss_of(params)

    def grad_fn(params: Any, _: Any) -> Any:
        return jax.grad(value_fn)(params)

    return {"value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}


def _added(
    sums: Sums, step: jax.Array, loss: jax.Array, correct: jax.Array, count: jax.Array
) -> Sums:
    """The epoch's sums after one more step with this mean loss over `count` examples."""
    first_bad = ~jnp.isfinite(loss) & (sums["bad_step"] < 0)
    return {
        "loss": sums["loss"] + loss * count,
        "correct": sums["correct"] + correct,
        "count": sums["count"] + count,
        "bad_step": jnp.where(first_bad, step, sums["bad_step"]),
        "bad_loss": jnp.where(first_bad, loss, sums["bad_loss"]),
    }


def eval_step(
    variables: Any,
    batch: Batch,
    *,
    model: nn.Module,
    data: DataConfig,
    compute_dtype: str,
    matmul_precision: str = "default",
) -> Sums:
    """The loss and the confusion matrix of a batch, without its masked examples.

    Args:
      variables: "params" and the model's other collections.
      batch: image uint8 [N, H, W, C], label int32 [N], mask float32 [N].
      model: the module.
      data: scaling.
      compute_dtype: as in training.
      matmul_precision: likewise.

    Returns:
      loss float32 [], the sum over examples, and confusion int32 [classes, classes], rows by label,
      columns by prediction.
    """
    options = {"compute_dtype": compute_dtype, "matmul_precision": matmul_precision}
    logits = predict_step(variables, batch["image"], model=model, data=data, **options)
    loss = (cross_entropy(logits, batch["label"]) * batch["mask"]).sum()
    classes = logits.shape[-1]
    mask = batch["mask"].astype(jnp.int32)
    confusion = jnp.zeros((classes, classes), jnp.int32)
    confusion = confusion.at[batch["label"], logits.argmax(-1)].add(mask)
    return {"loss": loss, "confusion": confusion}


def predict_step(
    variables: Any,
    image: jax.Array,
    *,
    model: nn.Module,
    data: DataConfig,
    compute_dtype: str,
    matmul_precision: str = "default",
) -> jax.Array:
    """uint8 [N, H, W, C] -> logits float32 [N, classes]; a class map is averaged."""
    image = normalise(image, data)
    with in_precision(matmul_precision):
        if data.test_time_augmentation == "none":
            return one_score_each(apply(model, variables, image, compute_dtype)[0])
        views, weights = test_views(image, data.test_time_augmentation)
        logits = apply(model, variables, views.reshape(-1, *image.shape[1:]), compute_dtype)[0]
        logits = one_score_each(logits)
        # N may be unknown, in an export.
        logits = logits.reshape(len(weights), -1, logits.shape[-1])
        return jnp.tensordot(jnp.array(weights), logits, 1)


def class_map_step(
    variables: Any,
    image: jax.Array,
    *,
    model: nn.Module,
    data: DataConfig,
    compute_dtype: str,
    matmul_precision: str = "default",
) -> jax.Array:
    """uint8 [N, H, W, C] -> logits float32 [N, h, w, classes] of a model that gives a class map.

    Without test-time augmentation, which would move the image and so the places of the scores.
    """
    with in_precision(matmul_precision):
        return apply(model, variables, normalise(image, data), compute_dtype)[0]


def cross_entropy(logits: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of float32 logits [N, classes] with int32 labels [N]: float32 [N]."""
    if not smoothing:
        plain = optax.softmax_cross_entropy_with_integer_labels
        return jax.lax.platform_dependent(
            logits, label, cuda=cross_entropy_by_comparison, default=plain
        )
    target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, target)


def cross_entropy_by_comparison(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Without smoothing, and without an index, whose gradient would be a scatter on a GPU."""
    here = label[:, None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, -1) - jnp.where(here, logits, 0).sum(-1)


def training_loss(logits: jax.Array, batch: Batch, config: Config) -> jax.Array:
    """The mean loss of `augmentation.augmented` examples, with smoothing, shares and class weights.

    Args:
      logits: float32 [N, classes].
      batch: label int32 [N]; of mixed images other_label int32 [N] and label_share float32 [N] too.
      config: label_smoothing and class_weights.
    """

    def loss_of(label: jax.Array) -> jax.Array:
        loss = cross_entropy(logits, label, config.label_smoothing)
        if config.class_weights is None:
            return loss
        return loss * jnp.array(config.class_weights, jnp.float32)[label]

    loss = loss_of(batch["label"])
    if "other_label" in batch:
        share = batch["label_share"]
        loss = share * loss + (1 - share) * loss_of(batch["other_label"])
    return loss.mean()


def _mean_of(leaf: jax.Array, axis_name: str) -> jax.Array:
    """The mean over devices; whole numbers, such as counters, stay as they are."""
    return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
