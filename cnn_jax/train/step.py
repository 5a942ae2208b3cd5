"""Pure steps: training, evaluation, prediction. No jit, no devices, no files.

Given `axis_name`, the same train step runs under jax.pmap, each device on its part of the batch.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from cnn_jax.config import Config, DataConfig
from cnn_jax.data.loader import alternate_flip, augment, normalise, test_views

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a run is, at one step; a checkpoint of it lets the run go on bit for bit.

    Attributes:
      step: int32 [], training steps done.
      params: the model's parameters, float32.
      batch_stats: running statistics of its BatchNorm layers; empty without.
      opt_state: of the Optax optimizer.
      rng: uint32 [2], data of the key from which every step's randomness is derived.
      sums: what this epoch's steps have added up: `empty_sums`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array
    sums: Sums


def empty_sums() -> Sums:
    """An epoch's sums before its first step.

    loss and correct are sums over examples; bad_step is the first step of the epoch whose loss was
    not finite, counted from 0 over the run, -1 if there was none, and bad_loss that loss.
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
) -> TrainState:
    """The state before the first step.

    Args:
      model: maps float32 [N, *image_shape] to logits.
      optimizer: from `optim.make_optimizer`.
      image_shape: (H, W, C).
      seed: of the parameters and of every later random choice.
      image: scaled training images [N, *image_shape], for a model whose first parameters follow them.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    if image is None:
        image = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(init_key, image)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(run_key),
        sums=empty_sums(),
    )


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
      model: the module; one with BatchNorm or Dropout takes its own `axis_name`.
      optimizer: from `optim.make_optimizer`.
      config: augmentation, scaling, smoothing and compute type.
      axis_name: the pmap axis over which the batch is split, None under jit.

    Returns:
      The state after the step, and the batch's mean loss before it.
    """
    run_key = jax.random.wrap_key_data(state.rng)
    key = jax.random.fold_in(run_key, state.step)
    augment_key, dropout_key = jax.random.split(key)
    image = augment(augment_key, batch["image"], batch["index"], config.data)
    if config.data.alternating_flip:
        image = alternate_flip(run_key, image, batch["index"], batch["epoch"])
    image = normalise(image, config.data)

    def loss_of(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        logits, updated = _apply(
            model,
            {"params": params, "batch_stats": state.batch_stats},
            image,
            config.compute_dtype,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        logits = _one_score_each(logits)
        loss = cross_entropy(logits, batch["label"], config.label_smoothing).mean()
        return loss, (updated.get("batch_stats", {}), logits)

    (loss, (batch_stats, logits)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    count = jnp.array(len(batch["label"]), jnp.int32)
    correct = (logits.argmax(-1) == batch["label"]).sum(dtype=jnp.int32)
    if axis_name is not None:
        loss, grads, batch_stats = jax.lax.pmean((loss, grads, batch_stats), axis_name)
        count, correct = jax.lax.psum((count, correct), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    first_bad = ~jnp.isfinite(loss) & (state.sums["bad_step"] < 0)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        rng=state.rng,
        sums={
            "loss": state.sums["loss"] + loss * count,
            "correct": state.sums["correct"] + correct,
            "count": state.sums["count"] + count,
            "bad_step": jnp.where(first_bad, state.step, state.sums["bad_step"]),
            "bad_loss": jnp.where(first_bad, loss, state.sums["bad_loss"]),
        },
    )
    return new_state, loss


def eval_step(
    variables: Any, batch: Batch, *, model: nn.Module, data: DataConfig, compute_dtype: str
) -> Sums:
    """What a batch adds to the loss and the confusion matrix; masked examples add nothing.

    Args:
      variables: "params" and "batch_stats".
      batch: image uint8 [N, H, W, C], label int32 [N], mask float32 [N].
      model: the module.
      data: scaling.
      compute_dtype: as in training.

    Returns:
      loss float32 [], the sum over examples, and confusion int32 [classes, classes], rows by label,
      columns by prediction.
    """
    logits = predict_step(
        variables, batch["image"], model=model, data=data, compute_dtype=compute_dtype
    )
    loss = (cross_entropy(logits, batch["label"]) * batch["mask"]).sum()
    classes = logits.shape[-1]
    mask = batch["mask"].astype(jnp.int32)
    confusion = jnp.zeros((classes, classes), jnp.int32)
    confusion = confusion.at[batch["label"], logits.argmax(-1)].add(mask)
    return {"loss": loss, "confusion": confusion}


def predict_step(
    variables: Any, image: jax.Array, *, model: nn.Module, data: DataConfig, compute_dtype: str
) -> jax.Array:
    """uint8 [N, H, W, C] -> logits float32 [N, classes]; of a class map, its mean."""
    image = normalise(image, data)
    if data.test_time_augmentation == "none":
        return _one_score_each(_apply(model, variables, image, compute_dtype)[0])
    views, weights = test_views(image, data.test_time_augmentation)
    logits = _apply(model, variables, views.reshape(-1, *image.shape[1:]), compute_dtype)[0]
    logits = _one_score_each(logits)
    logits = logits.reshape(len(weights), -1, logits.shape[-1])  # N may be unknown, in an export
    return jnp.tensordot(jnp.array(weights), logits, 1)


def class_map_step(
    variables: Any, image: jax.Array, *, model: nn.Module, data: DataConfig, compute_dtype: str
) -> jax.Array:
    """uint8 [N, H, W, C] -> logits float32 [N, h, w, classes] of a model that gives a class map.

    Of the image as it is: test-time augmentation moves it, and with it the places of the scores.
    """
    return _apply(model, variables, normalise(image, data), compute_dtype)[0]


def cross_entropy(logits: jax.Array, label: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of float32 logits [N, classes] with int32 labels [N]: float32 [N]."""
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)
    target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, target)


def _apply(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    compute_dtype: str,
    train: bool = False,
    mutable: Any = False,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Logits in float32 as the model gives them, and the collections named by `mutable`."""
    if compute_dtype != "float32":
        cast = jax.tree.map(lambda p: p.astype(compute_dtype), variables["params"])
        variables, image = {**variables, "params": cast}, image.astype(compute_dtype)
    output = model.apply(variables, image, train=train, mutable=mutable, **options)
    logits, updated = output if mutable else (output, {})
    return logits.astype(jnp.float32), updated


def _one_score_each(logits: jax.Array) -> jax.Array:
    """[N, classes] as they are; of a class map [N, h, w, classes], its mean."""
    return logits.mean((1, 2)) if logits.ndim == 4 else logits
