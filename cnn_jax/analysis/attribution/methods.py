"""Which pixels a prediction depends on: saliency, occlusion and Grad-CAM."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.models.summary import Summary
from cnn_jax.train import apply, parallel, step
from cnn_jax.train.preprocess import normalise

WINDOWS = 6  # the side of an image, in windows that are covered


class _CalledAgain(Exception):
    """A layer is called more than once: which of its maps would Grad-CAM be of?"""


def explain(
    run: RestoredRun, layers: Summary, image: np.ndarray, target: np.ndarray
) -> dict[str, np.ndarray]:
    """The maps of each method, float [N, H, W], 0 where the score does not depend on a pixel.

    Args:
      run: the restored model.
      layers: the summary of its layers.
      image: uint8 [N, H, W, C].
      target: int [N], the class whose score is explained.

    Returns:
      The maps by method. Grad-CAM is missing for a network without convolutions.
    """
    found = {
        "saliency": saliency(run, image, target),
        "occlusion": occlusion(run, image, target),
        "Grad-CAM": grad_cam(run, layers, image, target),
    }
    return {name: values for name, values in found.items() if values is not None}


def saliency(run: RestoredRun, image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The gradient of the score for each pixel, its largest channel (Simonyan et al. 2013)."""

    def score(image: jax.Array, variables: Any) -> jax.Array:
        return _scores(run, variables, image, target).sum()

    given = normalise(jnp.asarray(image), run.data)
    return np.abs(parallel.jit(jax.grad(score))(given, run.variables)).max(-1)


def occlusion(run: RestoredRun, image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """How far the probability falls where a window is covered (Zeiler and Fergus 2014).

    The window has the mean colour of the image, a sixth of its side, and moves by half of that. A
    pixel has the mean over the windows that cover it; where covering it helps, 0.
    """
    score = probabilities(run)
    return np.stack([_occluded(score, one, int(c)) for one, c in zip(image, target, strict=True)])


def probabilities(run: RestoredRun) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images, uint8 [N, H, W, C], to the probabilities of all classes, [N, classes]."""

    def softmax(variables: Any, image: jax.Array) -> jax.Array:
        return jax.nn.softmax(step.predict_step(variables, image, **run.step_options))

    compiled = parallel.jit(softmax, run.compute_dtype)
    return lambda image: np.asarray(compiled(run.variables, image))


def _occluded(score: Callable, image: np.ndarray, target: int) -> np.ndarray:
    """The map of one image, uint8 [H, W, C]."""
    sides = [max(1, round(length / WINDOWS)) for length in image.shape[:2]]
    rows, columns = (
        [*range(0, length - side, max(1, side // 2)), length - side]
        for length, side in zip(image.shape, sides, strict=False)
    )
    places = [
        (slice(row, row + sides[0]), slice(column, column + sides[1]))
        for row in rows
        for column in columns
    ]
    covered = np.repeat(image[None], len(places) + 1, 0)
    for i, place in enumerate(places):
        covered[i, *place] = image.mean((0, 1)).round()
    *found, whole = score(covered)[:, target]
    falls, times = np.zeros((2, *image.shape[:2]))
    for place, value in zip(places, found, strict=True):
        falls[place] += whole - value
        times[place] += 1
    return np.maximum(falls / times, 0)


def grad_cam(
    run: RestoredRun, layers: Summary, image: np.ndarray, target: np.ndarray
) -> np.ndarray | None:
    """The last convolution's maps, weighted by their mean gradients (Selvaraju et al. 2017).

    Taken before the activation, which the gradient passes through. None without such a layer, if it
    is called more than once, or if it cannot be intercepted, as under nn.remat.
    """
    names = [
        layer.name
        for layer in layers.layers
        if layer.kind.startswith("Conv") and len(layer.shape) == 3 and max(layer.shape[:2]) > 1
    ]
    if not names:
        return None
    shape = {layer.name: layer.shape for layer in layers.layers}[names[-1]]

    def score(added: jax.Array, variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen: list[jax.Array] = []

        def add(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
            output = call(*args, **kwargs)
            if context.method_name != "__call__" or "/".join(context.module.path) != names[-1]:
                return output
            if seen or output.shape != added.shape:
                raise _CalledAgain
            seen.append(output)
            return output + added

        with nn.intercept_methods(add):
            return _scores(run, variables, image, target).sum(), seen[0]

    added = jnp.zeros((len(image), *shape), jnp.float32)
    given = normalise(jnp.asarray(image), run.data)
    try:
        gradient, maps = parallel.jit(jax.grad(score, has_aux=True))(added, run.variables, given)
    except (jax.errors.UnexpectedTracerError, IndexError, _CalledAgain):
        return None
    cam = np.maximum((np.asarray(gradient).mean((1, 2), keepdims=True) * maps).sum(-1), 0)
    rows, columns = (
        np.arange(n) * have // n for n, have in zip(image.shape[1:], cam.shape[1:], strict=False)
    )
    return cam[:, rows][:, :, columns]


def _scores(run: RestoredRun, variables: Any, image: jax.Array, target: np.ndarray) -> jax.Array:
    """The score of the target for normalised images: [N]."""
    logits = apply.one_score_each(apply.forward(run.model, variables, image))
    return jnp.take_along_axis(logits, jnp.asarray(target)[:, None], 1)[:, 0]
