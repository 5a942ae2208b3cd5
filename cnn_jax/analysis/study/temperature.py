"""Temperature scaling (Guo et al. 2017): one number that makes probabilities honest.

It is fitted on the validation split and kept in temperature.json of the workdir, by checkpoint. The
classes that the network names stay the same.
"""

import contextlib
import json
from typing import Any

import numpy as np
import scipy.optimize

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.analysis.study import measures
from cnn_jax.common.errors import CheckpointError
from cnn_jax.common.files import written
from cnn_jax.train import checkpoint
from cnn_jax.train.workdir import write_json

FILE = "temperature.json"
LEAST, MOST = 0.05, 20.0
KEYS = {"temperature", "fitted_on", "examples", "checkpoint_sha256"}


def fit(scores: measures.Scores) -> float:
    """The temperature that minimises the negative log-likelihood, from LEAST to MOST."""

    def loss(log_temperature: float) -> float:
        return measures.losses(scores.cooled(np.exp(log_temperature))).mean()

    bounds = (np.log(LEAST), np.log(MOST))
    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds, bounds=bounds).x))


def keep(run: RestoredRun, scores: measures.Scores) -> None:
    """Fits the temperature of the run's checkpoint on its validation split, and writes it.

    Raises:
      CheckpointError: temperature.json cannot be written.
    """
    found = {
        "temperature": fit(scores),
        "fitted_on": "validation",
        "examples": len(scores.label),
        "checkpoint_sha256": _digest(run),
    }
    path = run.workdir / FILE
    with written(path, CheckpointError):
        write_json(path, _all(run) | {str(run.step): found})


def kept(run: RestoredRun) -> dict[str, Any] | None:
    """What `keep` wrote for the run's checkpoint; None if there is nothing, or of other weights."""
    found = _all(run).get(str(run.step))
    return found if found and found["checkpoint_sha256"] == _digest(run) else None


def after(scores: measures.Scores, class_names: tuple[str, ...], found: dict) -> dict[str, Any]:
    """Loss, Brier score and calibration with the temperature, beside the temperature itself."""
    cooled = scores.cooled(found["temperature"])
    full = measures.measure(cooled, class_names)
    kinds = {name: full[name] for name in ("brier", "ece", "reliability")}
    about = {name: found[name] for name in ("temperature", "fitted_on", "examples")}
    return about | {"loss": float(measures.losses(cooled).mean())} | kinds


def _all(run: RestoredRun) -> dict[str, dict]:
    """What is kept, by step; nothing where the file is not one of `keep`."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads((run.workdir / FILE).read_bytes())
        return {step: one for step, one in found.items() if one.keys() >= KEYS}
    return {}


def _digest(run: RestoredRun) -> str:
    return checkpoint.Checkpoints(run.workdir).manifest(run.step)["sha256"]
