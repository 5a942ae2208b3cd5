"""Several seeds at once: each run is the one that it is alone, also after a stop and a failure."""

import dataclasses

import jax
import numpy as np
import pytest

from cnn_jax.common.errors import ConfigError, NotFiniteError
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import loop, seeds
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.workdir import metrics
from tests.networks import Linear


@pytest.fixture
def given(splits, monkeypatch):
    monkeypatch.setattr(seeds, "load_splits", lambda *_: splits)
    data = DataConfig("tiny", flip=True, crop_padding=2)
    return Config(Linear(), data, epochs=2, batch_size=32, eval_batch_size=48)


def bits(workdir):
    arrays = Checkpoints(workdir).newest().arrays
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def test_each_seed_has_the_bits_of_its_own_run_also_after_resuming(given, splits, tmp_path):
    count = len(jax.local_devices()) + 1  # two share a device
    short = dataclasses.replace(given, epochs=1)
    seeds.train_seeds(short, 2, tmp_path)
    lines = seeds.train_seeds(given, count, tmp_path)
    assert [line[-1]["epoch"] for line in lines] == [2] * count
    found = [bits(tmp_path / f"seed_{seed}") for seed in range(count)]
    for seed in (1, count - 1):
        alone = dataclasses.replace(given, seed=seed, devices=1)
        loop.train(alone, tmp_path / f"alone_{seed}", splits=splits)
        assert found[seed] == bits(tmp_path / f"alone_{seed}")
    assert len({frozenset(one.items()) for one in found}) == count


def test_a_seed_that_fails_does_not_stop_the_others(given, splits, tmp_path, monkeypatch):
    train = loop.train

    def fails(config, *arguments, **options):
        if config.seed == 0:
            raise NotFiniteError("seed 0")
        return train(config, *arguments, **options)

    monkeypatch.setattr(loop, "train", fails)
    with pytest.raises(NotFiniteError, match="seed 0"):
        seeds.train_seeds(given, 2, tmp_path)
    assert metrics(tmp_path / "seed_1")[-1]["epoch"] == 2


def test_a_seed_takes_one_device(given, tmp_path):
    with pytest.raises(ConfigError, match="--seeds=2"):
        seeds.train_seeds(dataclasses.replace(given, devices=2), 2, tmp_path)
