"""The matmul of a dense layer, with an image gradient that is fast on CPU.

`dot_general` takes the place of `jax.lax.dot_general` in `flax.linen.nn.Dense` (its field of that
name). Forward-mode differentiation (`jax.jvp`) does not work for the covered shapes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# A smaller transposed kernel fits into the caches: see `times_transposed`.
_FEWEST_WEIGHTS = 2**18
_BATCH_BY_FEATURES = (((1,), (0,)), ((), ()))


def times_transposed(rows: Array, kernel: Array, precision: lax.PrecisionLike = None) -> Array:
    """[N, O], [I, O] -> [N, I]: `rows @ kernel.T`, computed with the rows in columns.

    Eigen needs two to four times as long to multiply few rows by a large transposed matrix as with
    the matrix on the left. GFLOP/s on two Zen 4 cores, float32, rows and then columns: 128 rows by
    512 x 16384 24 and 68, by 512 x 2048 39 and 76, by 512 x 784 39 and 64; 32 rows by 512 x 2048 32 and
    111, by 512 x 784 16 and 68; but 128 by 84 x 120 47 and 40, by 10 x 512 39 and 16.
    """
    # Without the barriers, XLA folds the small transpositions back into the matmul.
    columns = lax.optimization_barrier(rows.T)
    product = jnp.matmul(kernel, columns, precision=precision)
    return lax.optimization_barrier(product).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(precision: lax.PrecisionLike, x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel, precision=precision)


def _forward(precision: lax.PrecisionLike, x: Array, kernel: Array) -> tuple[Array, tuple]:
    return _dense(precision, x, kernel), (x, kernel)


def _backward(precision: lax.PrecisionLike, saved: tuple, cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    x_gradient = lax.platform_dependent(
        cotangent,
        kernel,
        cpu=functools.partial(times_transposed, precision=precision),
        default=lambda cotangent, kernel: jnp.matmul(cotangent, kernel.T, precision=precision),
    )
    return x_gradient, jnp.matmul(x.T, cotangent, precision=precision)


_dense.defvjp(_forward, _backward)


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    **options: Any,
) -> Array:
    """`jax.lax.dot_general`, whose gradient for `lhs` is faster on CPU where `rhs` is a large kernel.

    Args and result are those of `jax.lax.dot_general`, which computes what is not covered: other
    arrays than float32 [N, I] by [I, O], fewer than 2**18 weights, further options.
    """
    covered = (
        not options
        and lhs.ndim == rhs.ndim == 2
        and dimension_numbers == _BATCH_BY_FEATURES
        and lhs.dtype == rhs.dtype == jnp.float32
        and rhs.size >= _FEWEST_WEIGHTS
    )
    if covered:
        return _dense(precision, lhs, rhs)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **options)
