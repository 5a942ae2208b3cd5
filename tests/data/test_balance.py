"""Class weights and balanced epochs."""

import dataclasses

import numpy as np
import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.serialize import changes, to_json
from cnn_jax.data import balance, loader
from cnn_jax.data.examples import InMemory
from cnn_jax.data.splits import Splits, check_splits
from tests.networks import Linear

NAMES = ("a", "b", "c", "d")
LABEL = np.repeat(np.array([0, 2, 3], np.int32), [90, 9, 2])  # none of class b
EXAMPLES = InMemory(np.zeros((101, 4, 4, 1), np.uint8), LABEL, NAMES)


def make_config(**fields):
    return Config(Linear(4), DataConfig("x", balanced=True), batch_size=8, **fields)


class Read:
    """As examples that are not in memory."""

    class_names = NAMES

    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, indices):
        return EXAMPLES[indices]


def test_a_balanced_epoch_has_as_many_of_each_class():
    order = loader.make_order(make_config(), EXAMPLES)
    extra = []
    for epoch in range(4):
        found = order(epoch)
        counts = np.bincount(LABEL[found], minlength=4)
        assert (len(found), counts[1], sorted(counts)[1:]) == (101, 0, [33, 34, 34])
        extra.append(tuple(counts))
        assert len(np.unique(found[LABEL[found] == 0])) == counts[0]  # none of 90 twice
        times = np.bincount(found, minlength=101)[LABEL > 0]
        assert max(np.ptp(times[:9]), np.ptp(times[9:])) <= 1 < times.min()
        np.testing.assert_array_equal(found, loader.make_order(make_config(), Read())(epoch))
    assert len({order(epoch).tobytes() for epoch in range(4)}) == 4
    assert len(set(extra)) > 1
    assert (order(0) != loader.make_order(make_config(seed=1), EXAMPLES)(0)).any()
    # The first half of an epoch is as balanced as the whole.
    assert min(np.bincount(LABEL[order(0)[:50]])[[0, 2, 3]]) > 8


def test_balanced_weights_are_scikit_learns():
    config = balance.with_class_weights(make_config(class_weights="balanced"), EXAMPLES)
    np.testing.assert_allclose(config.class_weights, [101 / 270, 0, 101 / 27, 101 / 6])
    np.testing.assert_allclose(np.array(config.class_weights)[LABEL].mean(), 1)
    given = make_config(class_weights=(1.0, 2.0, 3.0, 4.0))
    assert balance.with_class_weights(given, EXAMPLES) is given


def test_a_run_with_balanced_weights_is_the_one_that_kept_their_numbers():
    config = make_config(class_weights="balanced")
    saved = to_json(balance.with_class_weights(config, EXAMPLES))
    assert changes(saved, config) == []
    assert changes(saved, dataclasses.replace(config, class_weights=None)) != []


def test_as_many_weights_as_classes():
    config = make_config(class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError) as caught:
        check_splits(config, Splits(EXAMPLES, None, EXAMPLES))
    said = "class_weights=[1.0, 2.0]: must be one number for each of the 4 classes"
    assert str(caught.value) == said
