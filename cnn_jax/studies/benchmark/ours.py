"""The contender cnn_jax: its train step and forward pass.

Arguments: NETWORK BATCH [DTYPE [MODE...]].
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import models
from cnn_jax.common import malloc
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.studies.benchmark.worker import serve
from cnn_jax.train import optim, parallel
from cnn_jax.train.apply import apply
from cnn_jax.train.step import init_state, train_step

# Large enough to reach the float32 peak, small enough for the cache of one core complex.
PEAK_SIZE = 2048


def main(network: str, batch_size: int, compute_dtype: str = "float32", *only: str) -> None:
    """Serves the modes train, eval and peak, or `only` some of them."""
    malloc.keep_freed()
    malloc.compute_in_calling_thread()
    shape = NETWORKS[network].image_shape
    model = getattr(models, NETWORKS[network].model)()
    data = DataConfig("none")
    # The parent process gives one of the two types that there are.
    dtype: Any = compute_dtype
    config = Config(model, data, batch_size=batch_size, compute_dtype=dtype)
    mesh = parallel.make_mesh(1)
    optimizer = optim.make_optimizer(config, steps_per_epoch=1000)
    pure = functools.partial(train_step, model=model, optimizer=optimizer, config=config)
    step = parallel.jit_step(pure, mesh, compute_dtype=compute_dtype)
    forward = parallel.jit(
        lambda variables, image: apply(model, variables, image, compute_dtype)[0], compute_dtype
    )
    initial = init_state(model, optimizer, shape, 0)
    variables = initial.variables
    state = parallel.replicate(initial, mesh)
    # As for the peers: the images are already in memory as float32.
    image = jnp.asarray(np.random.default_rng(0).random((batch_size, *shape), np.float32))
    # A CPU takes it in each step, as in training; an accelerator holds it.
    batch = parallel.shard(noise(batch_size, shape), mesh)

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, loss = step(state, batch)
        loss.block_until_ready()

    def evaluation(steps: int) -> None:
        for _ in range(steps):
            logits = forward(variables, image)
        logits.block_until_ready()

    matrix = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    multiply = parallel.jit(lambda a: a @ a)

    def peak(steps: int) -> None:
        for _ in range(steps):
            product = multiply(matrix)
        product.block_until_ready()

    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    modes: dict[str, Callable[[int], None]] = {"train": train, "eval": evaluation, "peak": peak}
    about = {"version": f"jax {jax.__version__}", "device": jax.default_backend()}
    serve(modes, only, parameters=parameters, **about)


def noise(batch_size: int, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A batch of random images and labels of ten classes."""
    random = np.random.default_rng(0)
    return {
        "image": random.integers(0, 256, (batch_size, *shape), dtype=np.uint8),
        "label": random.integers(0, 10, batch_size).astype(np.int32),
        "index": np.arange(batch_size, dtype=np.int32),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
