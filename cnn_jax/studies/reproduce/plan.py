"""The experiments that `reproduce` trains, and the accuracies that others measured."""

import dataclasses
import difflib
from collections.abc import Sequence

from cnn_jax.common.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Row:
    """An experiment of the plan.

    Attributes:
      experiment: its name under experiments/, or the path of a file.
      seeds: how many runs, with the seeds 0, 1, ...
      lecture_train: the lecture's training accuracy after its last epoch, if it gives one.
      lecture_test: the lecture's test accuracy.
      keras_test: the test accuracy of Keras 3.15 on TensorFlow, seed 0, with the same settings.
      target: the mean test accuracy that a better recipe should reach.
    """

    experiment: str
    seeds: int
    lecture_train: float | None = None
    lecture_test: float | None = None
    keras_test: float | None = None
    target: float | None = None


LECTURE = (
    Row("fashion_mnist/mlp", 5),
    Row("fashion_mnist/conv_stack", 3, 0.9495, 0.8858),
    Row("fashion_mnist/max_pool", 3, 0.9786, 0.9125),
    Row("fashion_mnist/strided", 3, 0.9797, 0.9055, keras_test=0.886),
    Row("fashion_mnist/same_padding", 3),
    Row("fashion_mnist/lenet", 5, keras_test=0.897),
    Row("fashion_mnist/fully_conv", 3),
    Row("cifar10/lenet", 5, keras_test=0.619),
    Row("cifar10/cifar", 3),
)
BETTER = (
    Row("fashion_mnist/conv_stack_tuned", 3, target=0.8858),
    Row("fashion_mnist/max_pool_tuned", 3, target=0.9125),
    Row("fashion_mnist/strided_tuned", 3, target=0.9055),
    Row("cifar10/cifar_tuned", 3),
)
RECORDS = (
    Row("cifar10/speedrun", 5, target=0.94),
    Row("cifar10/speedrun_small", 3, target=0.9),
    Row("fashion_mnist/record", 3, target=0.95),
)
# Needs no download: shows within a minute that reproduce works.
EMBEDDED = (Row("quickstart", 3),)
ROWS = (*LECTURE, *BETTER, *RECORDS, *EMBEDDED)


def choose(rows: Sequence[Row], only: Sequence[str], seeds: int | None) -> list[Row]:
    """The rows named in `only`, or all if it is empty, each with `seeds` runs if that is given.

    Raises:
      ConfigError: there is no such row (shows the nearest names).
    """
    names = [row.experiment for row in rows]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
            raise ConfigError(
                f"--only={name}: reproduce has no such experiment; nearest: {', '.join(near)}"
            )
    chosen = [row for row in rows if not only or row.experiment in only]
    return [dataclasses.replace(row, seeds=seeds or row.seeds) for row in chosen]
