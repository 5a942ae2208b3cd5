"""What tests use instead of the slow parts of JAX: full optimisation, and drawing parameters."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from cnn_jax.analysis import restore
from cnn_jax.config import DataConfig
from cnn_jax.train import step
from tests.tiny import CLASS_NAMES

# Unoptimised, a step that runs a few times is compiled in half the time.
quick_jit: Callable = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@contextlib.contextmanager
def unoptimised() -> Iterator[None]:
    """The same for whatever is compiled inside."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def noisy_variables(model, shape: tuple[int, ...], seed: int = 0) -> dict:
    """Variables of the model's shapes: noise for the parameters, ones for the statistics.

    The initialisers, which take longer to compile than a network, are the models' tests'.
    """
    random = np.random.default_rng(seed)
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return {
        name: jax.tree.map(
            lambda leaf, name=name: (
                random.normal(0, 0.1, leaf.shape).astype(leaf.dtype)
                if name == "params"
                else np.ones(leaf.shape, leaf.dtype)
            ),
            tree,
        )
        for name, tree in variables.items()
    }


def noisy_state(model, optimizer, shape: tuple[int, ...], seed: int = 0) -> step.TrainState:
    """A state as `step.init_state` gives it, with `noisy_variables`."""
    variables = noisy_variables(model, shape, seed)
    return step.TrainState(
        step=np.int32(0),
        params=variables["params"],
        model_state=step.model_state_of(variables),
        opt_state=quick_jit(optimizer.init)(variables["params"]),
        rng=np.array([1, seed], np.uint32),
        sums=jax.tree.map(np.asarray, step.empty_sums()),
    )


def make_run(
    workdir: Path, model, shape: tuple[int, ...] = (28, 28, 1), **fields
) -> restore.RestoredRun:
    """A run as `restore.load_run` gives it, without a training."""
    about = {
        "workdir": workdir,
        "experiment": "mine",
        "model": model,
        "data": DataConfig("tiny_squares"),
        "class_names": CLASS_NAMES,
        "image_shape": shape,
        "batch_size": 20,
        "compute_dtype": "float32",
        "matmul_precision": "default",
        "step": 7,
        "variables": {"batch_stats": {}, **noisy_variables(model, shape)},
        "saved": {},
    }
    return restore.RestoredRun(**{**about, **fields})
