"""Sums over the images and pixels of each channel, which are fast on CPU, and what needs them.

XLA:CPU adds windows of neighbours, one channel at a time. Here one loop adds eight images, in rows of
all their pixels and channels; two matmuls with ones then add what is left. Milliseconds of the sums
of x and x * x on two Zen 5 cores, XLA's and these: [128, 15, 15, 256] 16.2 and 1.0; [128, 7, 7, 256]
3.3 and 0.14. Errors relative to the largest sum: 2e-6 and 7e-7.

`promote_dtype` takes the place of `flax.linen.dtypes.promote_dtype` in `flax.linen.nn.Conv` (its field
of that name).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jax import Array, lax

_IMAGES_AT_ONCE = (8, 4, 2)


def sums(x: Array) -> Array:
    """[N, H, W, C] -> [C]; the gradient spreads the cotangent."""
    if not _covered(x):
        return jnp.sum(x, range(x.ndim - 1))
    return lax.platform_dependent(x, cpu=_sums, default=lambda x: jnp.sum(x, (0, 1, 2)))


def spread(values: Array, shape: tuple[int, ...]) -> Array:
    """[C] -> `shape`, [N, H, W, C]; the gradient is `sums` of the cotangent."""
    plain = functools.partial(jnp.broadcast_to, shape=shape)
    if not _covered(jax.ShapeDtypeStruct(shape, values.dtype)):
        return plain(values)
    return lax.platform_dependent(values, cpu=functools.partial(_spread, shape), default=plain)


def add(y: Array, bias: Array) -> Array:
    """`y + bias`, whose gradient for `bias` is `sums` of the cotangent."""
    if bias.shape != y.shape[-1:] or bias.dtype != y.dtype:
        return y + bias
    return y + spread(bias, y.shape)


def apart(x: Array) -> Array:
    """`x`, which on CPU is written to memory, and its gradient too.

    Otherwise XLA computes an array again in each loop that reads it, as those of `sums`.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def _covered(x: Array | jax.ShapeDtypeStruct) -> bool:
    return x.ndim == 4 and x.dtype in (jnp.float32, jnp.bfloat16)


def _in_rows(shape: tuple[int, ...], values: Array) -> Array:
    """`spread`, written so that its transposition, which JAX derives, is quick."""
    n, height, width, _ = shape
    images = next((count for count in _IMAGES_AT_ONCE if n % count == 0), 1)
    pixels = jnp.matmul(jnp.ones((height * width, 1)), values.astype(jnp.float32)[None])
    rows = jnp.matmul(jnp.ones((n // images, 1)), pixels.reshape(1, -1))
    # Neighbours are one group, so that each of several devices has whole groups.
    return jnp.stack([rows] * images, 1).reshape(shape).astype(values.dtype)


@jax.custom_jvp
def _sums(x: Array) -> Array:
    values = jax.ShapeDtypeStruct(x.shape[3:], x.dtype)
    return jax.linear_transpose(functools.partial(_in_rows, x.shape), values)(x)[0]


@_sums.defjvp
def _sums_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _sums(*primals), jnp.sum(*tangents, (0, 1, 2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _spread(shape: tuple[int, ...], values: Array) -> Array:
    return jnp.broadcast_to(values, shape)


@_spread.defjvp
def _spread_jvp(
    shape: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _spread(shape, *primals), _in_rows(shape, *tangents)


class _Bias:
    """A bias that `nn.Conv` reshapes to as many axes as its output has, and adds by `add`."""

    def __init__(self, bias: Array):
        self._bias = bias
        self.ndim, self.shape = bias.ndim, bias.shape

    def reshape(self, shape: tuple[int, ...]) -> "_Bias":
        """Itself: `add` needs no axes of length 1."""
        return self

    def __radd__(self, y: Array) -> Array:
        return add(y, self._bias)


def promote_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> list:
    """`flax.linen.dtypes.promote_dtype` for inputs, kernel and a bias that `add` will add."""
    *arrays, bias = dtypes.promote_dtype(*args, dtype=dtype, inexact=inexact)
    return [*arrays, None if bias is None else _Bias(bias)]
