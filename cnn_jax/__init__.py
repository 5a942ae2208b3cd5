"""cnn_jax: the convolutional networks of a lecture as a functional JAX/Flax research codebase.

Importing the package appends the XLA flags it needs to XLA_FLAGS. XLA reads them when JAX starts its
first backend, so import this package before the first JAX computation.
"""

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parent.parent
# In a checkout, experiments/ lies beside this package; a wheel has it as cnn_jax_experiments.
CHECKOUT = (_BESIDE / "launch.sh").is_file()
EXPERIMENTS = _BESIDE / ("experiments" if CHECKOUT else "cnn_jax_experiments")
# How its user starts the program.
PROGRAM = "./launch.sh" if CHECKOUT else "cnn_jax"

# The YNN fusions of jaxlib 0.10 run many float32 convolutions on CPU up to 8 times slower than Eigen,
# and in jaxlib 0.10.2 they return wrong numbers (jax-ml/jax#39103): an empty list turns them off.
_XLA_FLAGS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def _append_xla_flags() -> None:
    present = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{flag}={value}" for flag, value in _XLA_FLAGS.items() if flag not in present]
    os.environ["XLA_FLAGS"] = " ".join([present, *missing]).strip()


_append_xla_flags()

# XLA:CPU calls every program from the compilation cache a danger of SIGILL, because it counts its own
# tuning preferences ("prefer-no-gather") among the processor's features. cache.py keeps a folder for
# each kind of processor; what is silenced here is noise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
