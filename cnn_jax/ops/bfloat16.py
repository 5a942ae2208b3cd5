"""The three passes of a convolution in bfloat16, on a CPU that multiplies bfloat16.

oneDNN, compiled into jaxlib, multiplies bfloat16 several times as fast as float32 there, and adds the
products in float32. XLA gives it matmuls and plain forward convolutions, and nothing else. So each
pass is written as one of these. Moving data is what takes the time now, not multiplying: Winograd's
and Fourier's sums, which `formulations.py` has for float32, would cost more than they save.

Products are added in float32 and rounded once. Only `_columns_to_image` adds sums over the channels
that are rounded already, in float32.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cnn_jax.ops import formulations
from cnn_jax.ops.formulations import DIMENSIONS, Geometry, applies, xla

_write = lax.optimization_barrier
_used = contextvars.ContextVar("_used", default=False)


def with_onednn(function: Callable) -> Callable:
    """`function`, traced with the passes of this file where its convolutions are in bfloat16.

    For a program that is compiled with oneDNN for the processor at hand. Other programs, such as
    exported ones, which any machine may run, keep the passes of `formulations.py`.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _used.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _used.reset(token)

    return traced


def used() -> bool:
    """Whether a function of `with_onednn` is being traced."""
    return _used.get()


def forward(g: Geometry, image: Array, kernel: Array) -> Array:
    """[N, H, W, C], [KH, KW, C, O] -> [N, OH, OW, O]."""
    if applies("dense", g):
        return formulations.FORMULATIONS["dense"](g, image, kernel)
    if g.out[1] < 4 or (g.strides != (1, 1) and g.in_channels >= 512):
        return formulations.FORMULATIONS["patches"](g, image, kernel)
    return xla(g, image, kernel)


def image_gradient(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    """[N, OH, OW, O], [KH, KW, C, O] -> [N, H, W, C]."""
    if applies("dense", g):
        kernel = kernel.reshape(-1, g.out_channels)
        rows = cotangent.reshape(-1, g.out_channels) @ kernel.T
        return rows.reshape(-1, *g.image, g.in_channels)
    if g.strides == (1, 1) and all(k <= size for k, size in zip(g.kernel, g.out, strict=True)):
        return _mirrored(g, cotangent, kernel)
    if g.strides != (1, 1) and g.in_channels < 128:
        return _phases(g, cotangent, kernel)
    return _columns_to_image(g, cotangent, kernel)


def kernel_gradient(g: Geometry, cotangent: Array, image: Array) -> Array:
    """[N, OH, OW, O], [N, H, W, C] -> [KH, KW, C, O]."""
    if g.out_channels < 32 and not applies("dense", g):
        shape = (*g.kernel, g.in_channels, g.out_channels)
        argument = jax.ShapeDtypeStruct(shape, image.dtype)
        convolution = functools.partial(xla, g, _write(image))
        return _write(jax.linear_transpose(convolution, argument)(cotangent)[0])
    cotangent = cotangent.reshape(-1, g.out_channels)
    if applies("dense", g):
        rows = image.reshape(len(cotangent), -1)
        return (rows.T @ cotangent).reshape(*g.kernel, g.in_channels, g.out_channels)
    kh, kw = g.kernel
    image = formulations.pad(g, _write(image))
    if g.in_channels < 16:
        patches = formulations.im2col(image, 1, kh, g.out[0], g.strides[0])
        patches = _write(formulations.im2col(patches, 2, kw, g.out[1], g.strides[1]))
        product = patches.reshape(len(cotangent), -1).T @ cotangent
        return product.reshape(kw, kh, g.in_channels, -1).swapaxes(0, 1)
    image = _write(formulations.im2col(image, 2, kw, g.out[1], g.strides[1]))
    last = (g.out[0] - 1) * g.strides[0] + 1
    taken = [_write(image[:, i : i + last : g.strides[0]]) for i in range(kh)]
    products = [row.reshape(len(cotangent), -1).T @ cotangent for row in taken]
    return jnp.stack(products).reshape(kh, kw, g.in_channels, -1)


def _mirrored(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    """A forward convolution of the padded cotangent with the mirrored kernel; stride 1."""
    pads = [
        (k - 1 - before, size - out + before)
        for k, size, out, (before, _) in zip(g.kernel, g.image, g.out, g.pads, strict=True)
    ]
    # Without the barrier, XLA makes it a convolution that oneDNN does not get.
    kernel = _write(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    return lax.conv_general_dilated(
        cotangent, kernel, (1, 1), pads, dimension_numbers=DIMENSIONS, precision=g.precision
    )


def _phases(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    """One forward convolution for all pixels that lie alike between the strides.

    Of stride (SH, SW), pixel (SH y + a, SW x + b) of the padded image meets every SH-th row and SW-th
    column of the kernel, from (a, b) on. The SH SW phases are the channels of one small convolution.
    """
    n, (sh, sw) = len(cotangent), g.strides
    th, tw = (-(-k // s) for k, s in zip(g.kernel, g.strides, strict=True))
    missing = [(0, t * s - k) for t, s, k in zip((th, tw), g.strides, g.kernel, strict=True)]
    kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
    kernel = kernel.reshape(th, sh, tw, sw, g.in_channels, g.out_channels)[::-1, :, ::-1]
    kernel = _write(kernel.transpose(0, 2, 5, 1, 3, 4).reshape(th, tw, g.out_channels, -1))
    pads = (th - 1, th - 1), (tw - 1, tw - 1)
    phases = lax.conv_general_dilated(
        cotangent, kernel, (1, 1), pads, dimension_numbers=DIMENSIONS, precision=g.precision
    )
    h, w = phases.shape[1:3]
    phases = _write(phases).reshape(n, h, w, sh, sw, -1).transpose(0, 1, 3, 2, 4, 5)
    return _cut(g, phases.reshape(n, h * sh, w * sw, -1))


def _columns_to_image(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    """One matmul to the gradients of all patches, which are added where they overlap."""
    (kh, kw), (oh, ow), (sh, sw) = g.kernel, g.out, g.strides
    rows = kernel.reshape(-1, g.out_channels).T
    patches = _write(cotangent.reshape(-1, g.out_channels) @ _write(rows))
    patches = patches.reshape(-1, oh, ow, kh, kw, g.in_channels)
    patches = patches.astype(jnp.promote_types(patches.dtype, jnp.float32))
    height, width = (size + sum(pad) for size, pad in zip(g.image, g.pads, strict=True))

    def spread(part: Array, axis: int, start: int, size: int, stride: int) -> Array:
        config = [(0, 0, 0)] * part.ndim
        end = size - start - ((part.shape[axis] - 1) * stride + 1)
        config[axis] = (start, end, stride - 1)
        return lax.pad(part, jnp.zeros((), part.dtype), config)

    spread_rows = [
        formulations.total(spread(patches[:, :, :, i, j], 2, j, width, sw) for j in range(kw))
        for i in range(kh)
    ]
    image = formulations.total(spread(row, 1, i, height, sh) for i, row in enumerate(spread_rows))
    return _cut(g, image).astype(cotangent.dtype)


def _cut(g: Geometry, padded: Array) -> Array:
    """The image without its padding; rows and columns that no patch reached are zero."""
    (top, _), (left, _) = g.pads
    missing = [
        (0, max(0, before + size - have))
        for (before, _), size, have in zip(g.pads, g.image, padded.shape[1:3], strict=True)
    ]
    padded = jnp.pad(padded, ((0, 0), *missing, (0, 0)))
    return padded[:, top : top + g.image[0], left : left + g.image[1]]
