"""Exports a trained network as ONNX, by jax2onnx, for programs that know nothing of JAX.

jax2onnx has no rule for `lax.platform_dependent`, and none that is right for a max pooling of NHWC. So
the layers are traced in a plain formulation, and jitted functions are inlined.
"""

import functools
import json
import logging
from collections.abc import Callable
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

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import files
from cnn_jax.common.errors import ConfigError
from cnn_jax.data.sources import Examples
from cnn_jax.models import layers
from cnn_jax.train import step

# Tried in this order: older programs read lower versions.
OPSETS = (13, 15, 17, 21, 23)
IMAGES = 1000
TOLERANCE = 1e-5  # of the largest logit
SCRIPT = '''"""Classifies images with model.onnx: python classify_onnx.py images.npy, or image files.

images.npy: uint8 [N, {shape}]. Files are resized. Needs onnxruntime and NumPy; Pillow for files.
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
    from PIL import Image

    opened = [Image.open(f).convert("L" if channels == 1 else "RGB") for f in sys.argv[1:]]
    images = np.stack([np.asarray(image.resize((width, height))) for image in opened])
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
    options = {"model": run.model, "data": run.data, "compute_dtype": "float32"}
    pure = functools.partial(step.predict_step, jax.tree.map(jnp.asarray, run.variables), **options)
    expected = np.asarray(jax.jit(pure)(image))
    model, opset, error = _lowest(run, pure, image, expected)
    metadata = {
        "experiment": run.experiment,
        "model": type(run.model).__name__,
        "checkpoint": str(run.step),
        "class_names": json.dumps(run.class_names),
        "image_shape": json.dumps(run.image_shape),
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
        f"opset {opset}; on {len(image):,} test images ONNX Runtime differs from JAX by at most "
        f"{error:.1e} of the largest logit"
    )
    return *paths, line


def _check_installed() -> None:
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format=onnx: {error.name} is not installed; pip install '.[onnx]', then pip install "
            "--no-deps jax2onnx (it asks for an older Orbax, which it does not use here)"
        ) from None


def _lowest(
    run: RestoredRun, pure: Callable, image: np.ndarray, expected: np.ndarray
) -> tuple[Any, int, float]:
    """The model in the lowest opset that serves, that opset, and its error.

    Raises:
      ConfigError: there is none; says why for the last.
    """
    import onnxruntime

    reason = ""
    for opset in OPSETS:
        try:
            model = to_onnx(pure, run.image_shape, opset)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(model.SerializeToString(), options)
            given = {session.get_inputs()[0].name: image}
            (logits,) = session.run(None, given)
        except Exception as error:  # both libraries raise many types
            reason = " ".join(str(error).split())[:200]
            continue
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        if error <= TOLERANCE:
            return model, opset, error
        reason = f"its logits differ by {error:.1e} of the largest, must be at most {TOLERANCE:g}"
    raise ConfigError(
        f"workdir={run.workdir}: {type(run.model).__name__} cannot be exported as ONNX ({reason}); use "
        "--format=stablehlo"
    )


def to_onnx(pure: Callable, image_shape: tuple[int, int, int], opset: int) -> Any:
    """An onnx.ModelProto of a function of uint8 [N, *image_shape]."""
    import jax2onnx

    (count,) = jax.export.symbolic_shape("N")
    spec = jax.ShapeDtypeStruct((count, *image_shape), jnp.uint8)
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
