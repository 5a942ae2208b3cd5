"""A trained network as a list of steps and one array of weights, for the page to compute with.

The steps are the calls of the layers that `summary` finds. The functions between two layers are found
from the numbers that flow there: the output of one call and the input of the next.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
from flax.linen.linear import canonicalize_padding

from cnn_jax.analysis.report import features
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common.errors import ConfigError
from cnn_jax.models.layers import BatchNorm, Dropout, Flatten, MaxPool
from cnn_jax.models.summary import Summary

# Of float32 weights in base64: a page of 43 MB, which a browser opens in a second or two.
MOST_PARAMETERS = 8_000_000
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


class Weights:
    """All arrays of a network, one after the other."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, array: Any) -> dict[str, Any]:
        """Appends an array; returns its place and its shape."""
        array = np.asarray(array, "<f4")
        place = {"at": self._size, "shape": list(array.shape)}
        self._parts.append(array.ravel())
        self._size += array.size
        return place

    def tobytes(self) -> bytes:
        return b"".join(part.tobytes() for part in self._parts)


def read(run: RestoredRun, layers: Summary, image: np.ndarray) -> tuple[list[dict], Weights]:
    """The steps of a network, from the normalised image to the logits.

    Args:
      run: the restored model.
      layers: its summary.
      image: uint8 [N, H, W, C] of real images, by which the functions between layers are known.

    Raises:
      ConfigError: it has too many parameters, or a layer or a function that the page does not compute.
    """
    check(run, layers)
    found, logits = features.calls(run, layers, image)
    if not found:
        raise _unknown(run, "its layers are not called one by one")
    weights = Weights()
    steps = _normalisation(run, weights)
    last, before = "the image", features.normalise(image, run.data)
    for call in found:
        steps += _between(run, np.asarray(before), call.given, last, call.layer.name)
        if not isinstance(call.module, nn.Dropout | Dropout):
            step = _step(run, call, weights)
            field = call.layer.field
            steps.append(
                step
                | {
                    "name": call.layer.name.rpartition("/")[2],
                    "title": call.layer.kind.partition(" ")[2],
                    "shape": list(call.layer.shape),
                    "parameters": call.layer.parameters,
                    "field": field and [*field.size, *field.stride, *field.start],
                }
            )
        last, before = call.layer.name, call.output
    steps += _between(run, before, logits, last, "the logits")
    if logits.ndim == 4 and logits[0].size > logits.shape[-1]:
        steps.append(
            {"kind": "mean", "shape": [logits.shape[-1]]}
        )  # as `step.predict_step` does with a class map
    _widen(steps)
    return steps, weights


def _normalisation(run: RestoredRun, weights: Weights) -> list[dict]:
    """The step from values in [0, 1] to the network's input; none if they are the same."""
    shape = run.image_shape[2:]
    mean = np.broadcast_to(np.array(run.data.mean, np.float32), shape)
    std = np.broadcast_to(np.array(run.data.std, np.float32), shape)
    if not mean.any() and (std == 1).all():
        return []
    places = {"mean": weights.add(mean), "var": weights.add(std * std)}
    return [{"kind": "norm", "epsilon": 0, "shape": list(run.image_shape), **places}]


def takes_any_size(steps: list[dict]) -> bool:
    """Whether the steps give a class for every window of a larger image.

    They do without `flatten`, and without the mean of a class map. They do not if something else needs
    the whole map.
    """
    kinds = [step["kind"] for step in steps]
    whole = "mean" in kinds[:-1]
    return not whole and ("flatten", "norm") not in itertools.pairwise(kinds)


def _widen(steps: list[dict]) -> None:
    """Makes convolutions of dense layers: the first one after `flatten` is as large as the map."""
    window = (1, 1)
    for step in steps:
        if step["kind"] == "flatten":
            window = step["window"]
        elif step["kind"] == "conv" and len(step["kernel"]["shape"]) == 2:
            inputs, units = step["kernel"]["shape"]
            step["kernel"]["shape"] = [*window, inputs // (window[0] * window[1]), units]
            window = (1, 1)


def check(run: RestoredRun, layers: Summary) -> None:
    """Refuses a network before it is run.

    Raises:
      ConfigError: it has too many parameters, or images of another number of channels.
    """
    name, channels = type(run.model).__name__, run.image_shape[2]
    if layers.parameters > MOST_PARAMETERS:
        raise ConfigError(
            f"model={name}: has {layers.parameters:,} parameters, a page of the playground holds at "
            f"most {MOST_PARAMETERS:,}; the report shows what each layer makes of an image"
        )
    if channels not in (1, 3):
        raise ConfigError(
            f"model={name}: takes images of {channels} channels, the playground draws 1 or 3; the "
            "report shows what each layer makes of an image"
        )


def _unknown(run: RestoredRun, what: str) -> ConfigError:
    return ConfigError(
        f"model={type(run.model).__name__}: {what}; the playground computes chains of Conv, Dense, "
        f"MaxPool, Flatten, BatchNorm, Dropout, {', '.join(features.ACTIVATIONS)}, and means of maps"
    )


def _between(run: RestoredRun, before: Any, after: Any, last: str, name: str) -> list[dict]:
    """The steps that make `after`, the input of `name`, of `before`, the output of `last`."""
    after = np.asarray(after, np.float32)
    candidates: list[tuple[list[dict], Callable]] = [([], lambda x: x)]
    for function, apply in features.ACTIVATIONS.items():
        candidates.append(([{"kind": "activation", "name": function}], apply))
    for steps, apply in candidates:
        output = np.asarray(apply(before))
        results = {"": output}
        if output.ndim == 4:
            results |= {"flatten": output.reshape(len(output), -1), "mean": output.mean((1, 2))}
        for kind, result in results.items():
            if result.shape == after.shape and np.allclose(result, after, **TOLERANCE):
                last_step = _flatten(output) if kind == "flatten" else {"kind": kind}
                return _shaped([*steps, last_step] if kind else steps, output, after)
        if output.shape == after.shape and (norm := float(np.vdot(output, output))):
            factor = float(np.vdot(output, after)) / norm
            if np.allclose(factor * output, after, rtol=1e-4, atol=1e-6 * abs(factor)):
                return _shaped([*steps, {"kind": "scale", "factor": factor}], output, after)
    raise _unknown(
        run, f"between {last} and {name} is a function that the playground does not know"
    )


def _shaped(steps: list[dict], first: np.ndarray, last: np.ndarray) -> list[dict]:
    """Two steps at most, with the shapes of their outputs."""
    arrays = (first, last)[-len(steps) :] if steps else ()
    return [
        step | {"shape": list(array.shape[1:])} for step, array in zip(steps, arrays, strict=True)
    ]


def _step(run: RestoredRun, call: features.Call, weights: Weights) -> dict:
    """What the page computes for one layer."""
    module, own = call.module, run.variables
    arrays = _own(own.get("params", {}), module)
    if isinstance(module, Flatten):
        return _flatten(call.given)
    if isinstance(module, MaxPool):
        return {"kind": "pool", "window": list(module.window)}
    if isinstance(module, BatchNorm) or (isinstance(module, nn.BatchNorm) and module.axis == -1):
        statistics = _own(own["batch_stats"], module)
        kept = {**statistics, **arrays}
        places = {name: weights.add(kept[name]) for name in kept}
        return {"kind": "norm", "epsilon": module.epsilon, **places}
    if isinstance(module, nn.Dense | nn.Conv):
        plain = isinstance(module, nn.Dense) or _is_plain(module)
        size = arrays["kernel"].shape
        if plain and len(size) in (2, 4):
            bias = {"bias": weights.add(arrays["bias"])} if "bias" in arrays else {}
            kernel = {"kernel": weights.add(arrays["kernel"])}
            return {"kind": "conv", **_geometry(module), **kernel, **bias}
    raise _unknown(
        run, f"{call.layer.name} is a {call.layer.kind} that the playground cannot compute"
    )


def _flatten(given: Any) -> dict:
    return {"kind": "flatten", "window": list(given.shape[1:3]) if given.ndim == 4 else [1, 1]}


def _own(tree: Any, module: nn.Module) -> dict:
    for name in module.path:
        tree = tree.get(name, {})
    return {name: leaf for name, leaf in tree.items() if hasattr(leaf, "shape")}


def _is_plain(module: nn.Conv) -> bool:
    dilations = (module.input_dilation, module.kernel_dilation)
    plain = all(one in (None, 1, (1, 1), [1, 1]) for one in dilations)
    known = not isinstance(module.padding, str) or module.padding in ("SAME", "VALID")
    return plain and known and module.feature_group_count == 1 and module.mask is None


def _geometry(module: nn.Dense | nn.Conv) -> dict:
    if isinstance(module, nn.Dense):
        return {"strides": [1, 1], "padding": [[0, 0], [0, 0]]}
    strides = module.strides or 1
    padding: Any = canonicalize_padding(module.padding, 2)
    if padding != "SAME":
        pairs = ((0, 0), (0, 0)) if padding == "VALID" else padding
        padding = [list(map(int, pair)) for pair in pairs]
    return {
        "strides": [strides] * 2 if isinstance(strides, int) else list(strides),
        "padding": padding,
    }
