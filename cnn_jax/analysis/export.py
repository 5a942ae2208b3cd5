"""Exports a trained network as one file that needs only JAX: StableHLO and metadata.

model.zip holds model.stablehlo, serialised by `jax.export` (a flatbuffer, no pickle), and about.json,
with the class names and the formats of input and output. Scaling and normalisation are part of the
program.
"""

import datetime
import functools
import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import files
from cnn_jax.common.errors import ConfigError
from cnn_jax.train import step

# How long later versions of JAX read what `jax.export` writes: six months.
SUPPORT = datetime.timedelta(days=182)
PLATFORMS = ("cpu", "cuda", "tpu")
SCRIPT = '''"""Classifies images with model.zip: python classify.py images.npy (uint8 [N, {shape}])."""

import json
import pathlib
import sys
import zipfile

import jax.export
import numpy as np

with zipfile.ZipFile(pathlib.Path(__file__).with_name("model.zip")) as file:
    about, program = json.loads(file.read("about.json")), file.read("model.stablehlo")
try:
    model, names = jax.export.deserialize(program), about["class_names"]
except Exception as error:
    sys.exit(
        f"model.zip cannot be read ({{error}}). It could be read until {{about['readable_until']}}. "
        f"After that, pip install jax=={{about['jax']}}, or export the run again."
    )

images = np.load(sys.argv[1])
logits = jax.jit(model.call)(images)  # float32 [N, {classes}]
probabilities = jax.nn.softmax(logits)
for number, row in enumerate(np.asarray(probabilities)):
    best = row.argmax()
    print(number, names[best], f"{{row[best]:.4f}}", sep="\\t")
'''


def export(run: RestoredRun, folder: Path) -> tuple[Path, Path]:
    """Writes model.zip and classify.py.

    The program takes uint8 [N, H, W, C] for any N and returns the logits of `step.predict_step`,
    float32 [N, classes] (the mean of a class map). It runs on CPU, CUDA and TPU.

    Args:
      run: from `restore.load_run`.
      folder: made if missing.

    Returns:
      The paths of the two files.

    Raises:
      ConfigError: `folder` cannot be written, or the network cannot be exported.
    """
    files.check_folder(folder)
    program = to_stablehlo(run)
    about = {
        "experiment": run.experiment,
        "model": type(run.model).__name__,
        "checkpoint": run.step,
        "class_names": run.class_names,
        "input": {"dtype": "uint8", "shape": ["N", *run.image_shape], "scaled_inside": True},
        "mean": run.data.mean,
        "std": run.data.std,
        "output": {"dtype": "float32", "shape": ["N", len(run.class_names)], "kind": "logits"},
        "platforms": PLATFORMS,
        "jax": jax.__version__,
        "readable_until": str(datetime.date.today() + SUPPORT),
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("about.json", json.dumps(about, indent=2) + "\n")
        file.writestr("model.stablehlo", program)
    shape = ", ".join(map(str, run.image_shape))
    script = SCRIPT.format(shape=shape, classes=len(run.class_names))
    paths = folder / "model.zip", folder / "classify.py"
    with files.writing(folder):
        paths[0].write_bytes(archive.getvalue())
        paths[1].write_text(script, encoding="utf-8")
    return paths


def to_stablehlo(run: RestoredRun) -> bytes:
    """Serialises the network and its variables with `jax.export`, for any number of images.

    Raises:
      ConfigError: the network needs a fixed number of images.
    """
    variables = jax.tree.map(jnp.asarray, run.variables)
    pure = functools.partial(step.predict_step, variables, **run.step_options)
    (count,) = jax.export.symbolic_shape("n")
    image = jax.ShapeDtypeStruct((count, *run.image_shape), jnp.uint8)
    try:
        return bytes(jax.export.export(jax.jit(pure), platforms=PLATFORMS)(image).serialize())
    except Exception as error:  # a user's layer may need a fixed number of images
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"workdir={run.workdir}: {type(run.model).__name__} cannot be exported ({reason})"
        ) from error
