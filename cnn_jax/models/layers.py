"""The lecture's layers with Keras's defaults, so that a model reads like its listing.

Flax has other defaults than Keras: nn.Conv pads SAME (Keras: valid), nn.max_pool strides by 1 (Keras:
by its window), Linen draws kernels from lecun_normal (Keras: glorot_uniform). Images are float32
[N, H, W, C] throughout.
"""

import bisect
import functools
from collections.abc import Callable, Mapping

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer, PaddingLike

from cnn_jax.ops import channels, conv, dense, pool

# The random stream of `Dropout` under pmap. Only its key is the same on all devices.
WHOLE_BATCH_DROPOUT = "whole_batch_dropout"

glorot_uniform = nn.initializers.glorot_uniform()


class Conv(nn.Conv):
    """`nn.Conv` with Keras's defaults: valid padding, glorot-uniform kernels, zero biases."""

    padding: PaddingLike = "VALID"
    kernel_init: Initializer = glorot_uniform
    conv_general_dilated: Callable = conv.conv_general_dilated
    promote_dtype: Callable = channels.promote_dtype


class Dense(nn.Dense):
    """`nn.Dense` with Keras's default initialisation."""

    kernel_init: Initializer = glorot_uniform
    dot_general: Callable | None = dense.dot_general


class BatchNorm(nn.Module):
    """Batch normalisation over the last axis, as `nn.BatchNorm`, with sums that are fast on CPU.

    It has the variables of `nn.BatchNorm`: the parameters scale and bias, and mean and var in the
    collection batch_stats. Source: arXiv 1502.03167.

    Attributes:
      use_running_average: normalises by the running statistics, as in evaluation.
      momentum: the share of the running statistics that stays in each step.
      epsilon: added to the variance.
      use_scale: whether a factor for each channel is trained.
      axis_name: the pmap axis over which the batch is split, None under jit.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        chosen = self.use_running_average, use_running_average
        running = bool(nn.merge_param("use_running_average", *chosen))
        features = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        scale = self.param("scale", nn.initializers.ones, features) if self.use_scale else 1.0
        bias = self.param("bias", nn.initializers.zeros, features)
        apart = (lambda x: x) if running else channels.apart
        wide = apart(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        if running:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = self._statistics(wide)
            if not self.is_initializing():
                kept = self.momentum
                running_mean.value = kept * running_mean.value + (1 - kept) * mean
                running_var.value = kept * running_var.value + (1 - kept) * var
        scale *= jax.lax.rsqrt(var + self.epsilon)
        # Not (x - mean) * scale, so that the gradient needs two sums instead of three.
        y = wide * channels.spread(scale, x.shape)
        y += channels.spread(bias - mean * scale, x.shape)
        return apart(y.astype(jnp.promote_types(x.dtype, bias.dtype)))

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of each channel over images, pixels and devices."""
        sums = jnp.stack([channels.sums(x), channels.sums(x**2)])
        moments = sums / (x.size // x.shape[-1])
        if self.axis_name is not None and not self.is_initializing():
            moments = jax.lax.pmean(moments, self.axis_name)
        # Rounding may make a variance of about 0 negative.
        return moments[0], jnp.maximum(0.0, moments[1] - moments[0] ** 2)


class MaxPool(nn.Module):
    """Keeps the strongest feature of each window: [N, H, W, C] -> [N, H // h, W // w, C]."""

    window: tuple[int, int] = (2, 2)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return pool.max_pool(x, self.window)


class Flatten(nn.Module):
    """[N, H, W, C] -> [N, H * W * C], rows first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)


class Dropout(nn.Module):
    """Dropout whose mask depends only on an example's place in the global batch.

    `nn.Dropout` draws one mask for the array it is given, so under jax.pmap it depends on the number
    of devices. This one gives equal masks under jit and under pmap on any number of devices.

    Attributes:
      rate: the probability that a unit is dropped, in [0, 1).
      axis_name: the pmap axis over which the batch is split, None under jit.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        place, stream = jnp.arange(x.shape[0]), "dropout"
        if self.axis_name is not None:
            place += jax.lax.axis_index(self.axis_name) * x.shape[0]
            stream = WHOLE_BATCH_DROPOUT
        keys = jax.vmap(functools.partial(jax.random.fold_in, self.make_rng(stream)))(place)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def one_image_size(call: Callable) -> Callable:
    """Decorates the `__call__` of a model that ends in flatten + dense.

    Its parameters fit one image size. For another size, Flax reports the shapes of a kernel; this
    reports the image sizes, and an architecture that takes any. If an image is too small for the
    layers, Flax divides by zero or, in later versions, makes kernels without weights; this raises a
    ValueError that says so.
    """

    @functools.wraps(call)
    def checked(self: nn.Module, image: jax.Array, train: bool = False) -> jax.Array:
        got = "x".join(map(str, image.shape[1:]))
        nothing = ValueError(
            f"{type(self).__name__} needs larger images than {got}: nothing is left of them here"
        )
        try:
            logits = call(self, image, train)
        except ZeroDivisionError:  # Flax up to 0.12.8, for a kernel without weights
            raise nothing from None
        except flax.errors.ScopeParamShapeError:
            fitting = images_that_fit(self.clone(parent=None, name=None), self.variables["params"])
            raise ValueError(
                f"{type(self).__name__} was initialised for images of {fitting}, got {got}: "
                "flatten + dense needs one size; FullyConvCNN takes any size from 28x28"
            ) from None
        if any(leaf.size == 0 for leaf in jax.tree.leaves(self.variables.get("params", {}))):
            raise nothing
        return logits

    # A function may carry attributes, but no type says which.
    checked.one_image_size = True  # type: ignore[attr-defined]
    return checked


def takes_one_image_size(model: nn.Module) -> bool:
    """Whether `one_image_size` decorates the model."""
    return getattr(type(model).__call__, "one_image_size", False)


def images_that_fit(model: nn.Module, params: Mapping) -> str:
    """The square images, as text, for which `model` has parameters of these shapes.

    Strides and pooling round, so several sizes may need the same parameters.
    """
    sizes = range(1, 1025)
    shapes = jax.tree.map(jnp.shape, params)
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
    for depth in [min(shape[2] for shape in kernels)] if kernels else [1, 3]:
        params_for = functools.cache(functools.partial(_abstract_params, model, depth))
        # The number of parameters grows with the size.
        number = _number(params)
        smallest = bisect.bisect_left(sizes, number, key=lambda size: _number(params_for(size)))
        largest = bisect.bisect_right(sizes, number, key=lambda size: _number(params_for(size))) - 1
        if smallest <= largest and jax.tree.map(jnp.shape, params_for(sizes[smallest])) == shapes:
            ends = sorted({sizes[smallest], sizes[largest]})
            return " to ".join(f"{size}x{size}x{depth}" for size in ends)
    return "another size"


def _abstract_params(model: nn.Module, depth: int, size: int) -> dict:
    image = jax.ShapeDtypeStruct((1, size, size, depth), jnp.float32)
    try:
        return jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    except Exception:  # too small an image: each layer raises its own error
        return {}


def _number(params: Mapping) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
