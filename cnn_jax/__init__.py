"""cnn_jax: the convolutional networks of a lecture as a functional JAX/Flax research codebase."""

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parent.parent
# In a checkout, experiments/ lies beside this package; a wheel has it as cnn_jax_experiments.
CHECKOUT = (_BESIDE / "launch.sh").is_file()
EXPERIMENTS = _BESIDE / ("experiments" if CHECKOUT else "cnn_jax_experiments")
# How its user starts the program.
PROGRAM = "./launch.sh" if CHECKOUT else "cnn_jax"

# XLA:CPU calls every program from the compilation cache a danger of SIGILL, because it counts its own
# tuning preferences ("prefer-no-gather") among the processor's features. cache.py keeps a folder for
# each kind of processor; what is silenced here is noise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
