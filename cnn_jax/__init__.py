"""cnn_jax: the convolutional networks of a lecture as a functional JAX/Flax research codebase."""

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parent.parent
# In a checkout, experiments/ lies beside this package; a wheel has it as cnn_jax_experiments.
CHECKOUT = (_BESIDE / "launch.sh").is_file()
EXPERIMENTS = _BESIDE / ("experiments" if CHECKOUT else "cnn_jax_experiments")
# How the user starts the program.
PROGRAM = "./launch.sh" if CHECKOUT else "cnn_jax"

# Silences a false warning: XLA:CPU warns of SIGILL for every program from the compilation cache,
# because it counts its own tuning preferences ("prefer-no-gather") as processor features. cache.py
# keeps a folder for each kind of processor, so no program runs on another kind.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
