"""Classes of different frequency: class weights and balanced epochs, from the training labels."""

import dataclasses

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data.examples import Examples, InMemory, chunks


def labels(examples: Examples) -> np.ndarray:
    """int32 [N]; examples that are not in memory are read and decoded for it."""
    if isinstance(examples, InMemory):
        return examples.label
    return np.concatenate([batch["label"] for batch in chunks(examples)])


def with_class_weights(config: Config, examples: Examples) -> Config:
    """`config` with numbers for class_weights=balanced, from the training `examples`.

    A class has the weight examples / (classes * its examples), as in scikit-learn, so that the mean
    weight of an example is 1. Classes without examples do not count, and have the weight 0.
    """
    if config.class_weights != "balanced":
        return config
    counts = np.bincount(labels(examples), minlength=len(examples.class_names))
    scale = len(examples) / int(np.count_nonzero(counts))
    weights = tuple(scale / int(count) if count else 0.0 for count in counts)
    return dataclasses.replace(config, class_weights=weights)


def balanced_order(seed: int, epoch: int, label: np.ndarray) -> np.ndarray:
    """An order of as many examples as there are, in which classes are equally frequent: int64 [N].

    The frequencies differ by one at most. No example of a class comes again before all of the class
    have come. A function of (seed, epoch), as `loader.epoch_order`.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    classes = [np.flatnonzero(label == one) for one in np.unique(label)]
    sizes = np.full(len(classes), len(label) // len(classes))
    sizes[random.permutation(len(classes))[: len(label) % len(classes)]] += 1
    drawn = []
    for members, size in zip(classes, sizes, strict=True):
        rounds = -(-int(size) // len(members))
        drawn += [np.concatenate([random.permutation(members) for _ in range(rounds)])[:size]]
    return random.permutation(np.concatenate(drawn))
