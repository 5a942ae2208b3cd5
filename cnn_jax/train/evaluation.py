"""Exact evaluation: every example of a split counts once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnn_jax.config import Config
from cnn_jax.data import loader
from cnn_jax.data.examples import Examples
from cnn_jax.data.splits import Splits
from cnn_jax.train import parallel
from cnn_jax.train.step import eval_step


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The results of an evaluation over every example of a split.

    Attributes:
      examples: their number.
      loss: mean softmax cross-entropy.
      accuracy: the share of correct predictions.
      confusion: int64 [classes, classes], rows by label, columns by prediction.
    """

    examples: int
    loss: float
    accuracy: float
    confusion: np.ndarray

    def class_accuracy(self) -> list[float | None]:
        """The share of correct predictions by class; None for a class without examples."""
        totals = self.confusion.sum(1)
        pairs = zip(self.confusion.diagonal(), totals, strict=True)
        return [float(right / total) if total else None for right, total in pairs]


def make_eval_step(config: Config, mesh: Any) -> Callable:
    """The compiled `step.eval_step` of a run over a mesh: eval_step(variables, batch)."""
    names = ("model", "data", "compute_dtype", "matmul_precision")
    pure = functools.partial(eval_step, **{name: getattr(config, name) for name in names})
    return parallel.jit_step(pure, mesh, donate=False, **parallel.jit_options(config))


def evaluate_examples(
    eval_step: Callable,
    variables: Any,
    examples: Examples,
    batch_size: int,
    mesh: Any,
    before_each: Callable[[], None] | None = None,
) -> Metrics:
    """Evaluates every example once; the arguments are those of `each_batch`."""
    sums = each_batch(eval_step, variables, examples, batch_size, mesh, before_each)
    return metrics_of(sums, len(examples))


def evaluate_splits(
    eval_step: Callable, variables: Any, splits: Splits, batch_size: int, mesh: Any, **options: Any
) -> dict[str, Metrics]:
    """`evaluate_examples` on validation, if there is such a split, and on test."""
    chosen = {"validation": splits.validation, "test": splits.test}
    return {
        name: evaluate_examples(eval_step, variables, examples, batch_size, mesh, **options)
        for name, examples in chosen.items()
        if examples is not None
    }


def as_line(found: Mapping[str, Metrics]) -> dict[str, float]:
    """The metrics of each split as in metrics.jsonl: test_loss, test_accuracy, ..."""
    return {
        f"{split}_{name}": getattr(metrics, name)
        for split, metrics in found.items()
        for name in ("loss", "accuracy")
    }


def each_batch(
    eval_step: Callable,
    variables: Any,
    examples: Examples,
    batch_size: int,
    mesh: Any,
    before_each: Callable[[], None] | None = None,
) -> list[Any]:
    """What `eval_step` returns for each batch of the examples, on the host.

    Args:
      eval_step: from `make_eval_step`.
      variables: "params" and the model's other collections, on the mesh.
      examples: a split.
      batch_size: rounded up to a multiple of the devices; affects the last digits of the loss.
      mesh: the devices.
      before_each: called before each batch; an exception from it ends the evaluation.
    """
    # The rest of a batch larger than the split would be padding.
    batch_size = -(-min(batch_size, len(examples)) // mesh.size) * mesh.size
    outputs: list[Any] = []
    rows = parallel.own_rows(mesh, batch_size)
    batches = loader.evaluation_batches(examples, batch_size, rows)
    for batch in parallel.shard_ahead(batches, mesh, batch_size):
        if before_each is not None:
            before_each()
        outputs.append(eval_step(variables, batch))
        if len(outputs) > parallel.QUEUE:
            jax.block_until_ready(outputs[-parallel.QUEUE])
    return [parallel.to_host(output) for output in outputs]


def metrics_of(sums: Sequence[dict[str, np.ndarray]], examples: int) -> Metrics:
    """The metrics of a split with this number of examples, from the `eval_step` of its batches."""
    confusion = np.sum([s["confusion"] for s in sums], axis=0, dtype=np.int64)
    loss = float(np.sum([s["loss"] for s in sums], dtype=np.float64))
    return Metrics(examples, loss / examples, int(confusion.trace()) / examples, confusion)
