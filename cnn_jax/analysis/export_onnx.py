"""Exports a trained network as ONNX, by jax2onnx, for programs that know nothing of JAX.

jax2onnx has no rule for `lax.platform_dependent`, and none that is right for a max pooling of NHWC. So
the layers are traced in a plain formulation, and jitted functions are inlined.
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax.linen import dtypes
from jax import lax

from cnn_jax import CHECKOUT
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import extras, files
from cnn_jax.common.errors import ConfigError
from cnn_jax.data.examples import Examples
from cnn_jax.models import layers
from cnn_jax.models.convolutional import gives_class_map
from cnn_jax.train import step

# Tried in this order: older programs read lower versions.
OPSETS = (13, 15, 17, 21, 23)
# Of heights and widths, for networks that take several sizes: their strides must divide them.
MULTIPLES = (1, 4)
IMAGES = 1000
TOLERANCE = 1e-5  # of the largest logit
SCRIPT = '''"""Classifies images with model.onnx: python classify_onnx.py images.npy, or image files.

images.npy: uint8 [N, {shape}]. Files are made upright, laid on white where they are transparent, and
resized bilinearly, as for the training. Needs onnxruntime and NumPy; Pillow for files.
"""

import json
import pathlib
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(pathlib.Path(__file__).with_name("model.onnx"))
about = session.get_modelmeta().custom_metadata_map
names, (height, width, channels) = (json.loads(about[k]) for k in ("class_names", "image_shape"))
if sys.argv[1].endswith(".npy"):
    images = np.load(sys.argv[1])
else:
    from PIL import Image, ImageOps

    def decoded(file):
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
            image = Image.fromarray(grey.astype(np.uint8))
        if channels < 4 and image.has_transparency_data:
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image.convert("RGBA"))
        if channels == 1 and image.mode not in ("1", "L"):
            image = image.convert("RGB")
        image = image.convert({{1: "L", 3: "RGB", 4: "RGBA"}}[channels])
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))

    images = np.stack([decoded(file) for file in sys.argv[1:]])
    images = images.reshape(-1, height, width, channels)
(logits,) = session.run(None, {{session.get_inputs()[0].name: images}})  # float32 [N, {classes}]
probabilities = np.exp(logits - logits.max(-1, keepdims=True))
probabilities /= probabilities.sum(-1, keepdims=True)
for number, row in enumerate(probabilities):
    print(number, names[row.argmax()], f"{{row.max():.4f}}", sep="\\t")
'''


def export(run: RestoredRun, folder: Path, test: Examples) -> tuple[Path, Path, str]:
    """Writes model.onnx and classify_onnx.py.

    The model takes uint8 [N, H, W, C] for any N, and returns the logits of `step.predict_step` in
    float32. Scaling, normalisation and test-time augmentation are inside; class names are in its
    metadata.

    Args:
      run: from `restore.load_run`.
      folder: made if missing.
      test: images on which ONNX Runtime must agree with JAX; at most IMAGES of them are used.

    Returns:
      The paths of the two files, and a line that says how far they agree.

    Raises:
      ConfigError: jax2onnx is not installed, the network cannot be exported or does not agree, or
        `folder` cannot be written.
    """
    files.check_folder(folder)
    _check_installed()
    image = test[np.arange(min(IMAGES, len(test)))]["image"]
    options: dict[str, Any] = {"model": run.model, "data": run.data, "compute_dtype": "float32"}
    pure = functools.partial(step.predict_step, jax.tree.map(jnp.asarray, run.variables), **options)
    model, opset, multiple, error = _first_that_serves(run, pure, image)
    metadata = {
        "experiment": run.experiment,
        "model": type(run.model).__name__,
        "checkpoint": str(run.step),
        "class_names": json.dumps(run.class_names),
        "image_shape": json.dumps(run.image_shape),
        "multiple": str(multiple),
    }
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    shape = ", ".join(map(str, run.image_shape))
    paths = folder / "model.onnx", folder / "classify_onnx.py"
    with files.writing(folder):
        paths[0].write_bytes(model.SerializeToString())
        script = SCRIPT.format(shape=shape, classes=len(run.class_names))
        paths[1].write_text(script, encoding="utf-8")
    line = (
        f"opset {opset}, images of {_sizes(run.image_shape, multiple)}; on {len(image):,} test images "
        "ONNX Runtime differs from JAX by at most "
        f"{error:.1e} of the largest logit"
    )
    return *paths, line


def _sizes(image_shape: tuple[int, int, int], multiple: int) -> str:
    height, width, _ = image_shape
    return f"{height}x{width}" + (f" and larger, multiples of {multiple}" if multiple else "")


def _check_installed() -> None:
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        by_pip = "" if CHECKOUT else "; then pip install --no-deps jax2onnx"
        raise ConfigError(
            f"--format=onnx: {extras.missing(str(error.name), 'onnx')}{by_pip}"
        ) from None


def _first_that_serves(
    run: RestoredRun, pure: Callable, image: np.ndarray
) -> tuple[Any, int, int, float]:
    """A model for images of as many sizes as can be, in the lowest opset; the arguments of `_error`.

    Returns:
      The onnx.ModelProto, its opset, the number whose multiples heights and widths must be (0: the
      training's size alone), and its error.

    Raises:
      ConfigError: there is none; says why for the last.
    """
    reason = ""
    sizes = MULTIPLES if gives_class_map(run.model, run.image_shape) else ()
    for multiple, opset in itertools.product((*sizes, 0), OPSETS):
        try:
            model = to_onnx(pure, run.image_shape, opset, multiple)
            error = _error(model, pure, image, multiple)
        except Exception as refusal:  # JAX, jax2onnx and ONNX Runtime raise many types
            reason = " ".join(str(refusal).split())[:200]
            continue
        if error <= TOLERANCE:
            return model, opset, multiple, error
        reason = f"its logits differ by {error:.1e} of the largest, must be at most {TOLERANCE:g}"
    raise ConfigError(
        f"workdir={run.workdir}: {type(run.model).__name__} cannot be exported as ONNX ({reason}); use "
        "--format=stablehlo"
    )


def _error(model: Any, pure: Callable, image: np.ndarray, multiple: int) -> float:
    """The largest difference between ONNX Runtime and JAX, as a share of the largest logit.

    Args:
      model: an onnx.ModelProto.
      pure: the same function of images.
      image: uint8 [N, H, W, C], used as they are and, if `multiple` is not 0, some larger.
      multiple: of `to_onnx`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised too
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    name = session.get_inputs()[0].name
    border = ((0, 0), (0, 3 * multiple), (0, 5 * multiple), (0, 0))
    errors = []
    for given in [image, *([np.pad(image[:10], border)] if multiple else [])]:
        (logits,) = session.run(None, {name: given})
        expected = np.asarray(jax.jit(pure)(given))
        errors.append(float(np.abs(logits - expected).max() / np.abs(expected).max()))
    return max(errors)


def to_onnx(
    pure: Callable, image_shape: tuple[int, int, int], opset: int, multiple: int = 0
) -> Any:
    """An onnx.ModelProto of a function of uint8 [N, H, W, C].

    Args:
      pure: the function.
      image_shape: (H, W, C) of the training.
      opset: the version of ONNX's operators.
      multiple: if not 0, H and W may be any multiples of it that are at least the training's.
    """
    import jax2onnx

    (count,) = jax.export.symbolic_shape("N")
    height, width, channels = image_shape
    sizes: Sequence = (count, height, width)
    if multiple:
        least = [f"H >= {-(-height // multiple)}", f"W >= {-(-width // multiple)}"]
        text = f"N, {multiple}*H, {multiple}*W"
        sizes = jax.export.symbolic_shape(text, constraints=least)
    spec = jax.ShapeDtypeStruct((*sizes, channels), jnp.uint8)
    with nn.intercept_methods(_plain), jax.disable_jit():
        closed = jax.make_jaxpr(pure)(spec)
    flat = jax.extend.core.jaxpr_as_fun(closed)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of its plugins for packages that are not installed
    try:
        return jax2onnx.to_onnx(lambda image: flat(image)[0], [spec], opset=opset)
    finally:
        logging.disable(disabled)


def _plain(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Computes a layer by operations that do not depend on the platform."""
    layer = context.module
    if context.method_name == "__call__":
        if isinstance(layer, layers.MaxPool):
            return _max_pool(args[0], layer.window)
        # The module lives only in this trace.
        if isinstance(layer, nn.Conv):
            object.__setattr__(layer, "conv_general_dilated", lax.conv_general_dilated)
            object.__setattr__(layer, "promote_dtype", dtypes.promote_dtype)
        if isinstance(layer, nn.Dense):
            object.__setattr__(layer, "dot_general", lax.dot_general)
    return call(*args, **kwargs)


def _max_pool(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Windows that do not overlap; the rest at the border is dropped."""
    (n, h, w, c), (kh, kw) = x.shape, window
    x = x[:, : h // kh * kh, : w // kw * kw]
    return x.reshape(n, h // kh, kh, w // kw, kw, c).max((2, 4))
