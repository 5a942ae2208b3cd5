"""The learning rate finder."""

import numpy as np
import pytest

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies import lr_finder
from tests.networks import Linear


def test_a_curve_whose_steepest_fall_is_known():
    rates = np.geomspace(1e-6, 10, 701)  # a hundred steps a decade
    x = np.log10(rates)
    fall = 2 / (1 + np.exp((x + 3) / 0.2))  # steepest at 1e-3
    rise = np.where(x > -1, 3 * (x + 1) ** 2, 0)  # from 1e-1 on
    noise = np.random.default_rng(0).normal(0, 0.05, len(rates))
    found = lr_finder.read(rates, 0.3 + fall + rise + noise)
    assert 0.7e-3 < found.steepest < 1.4e-3
    assert 1e-2 < found.lowest < 0.2
    assert found.steepest < found.rate < found.lowest


def test_a_finder_draws_and_stops_where_the_loss_rises(tfds_dir, tmp_path):
    config = Config(
        Linear(), DataConfig("tiny_squares"), batch_size=32, devices=1, schedule="cosine"
    )
    picture = tmp_path / "new" / "rate.png"
    found = lr_finder.find(config, 60, str(tfds_dir), False, None, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(found.rates) == len(found.losses) <= 60
    assert found.rates[0] == 1e-6
    assert np.isfinite(found.losses).all()
    assert 1e-6 < found.rate < 10
    with pytest.raises(ConfigError, match=r"^--output=\S+rate.txt: must end in .png"):
        lr_finder.find(config, 60, str(tfds_dir), False, None, tmp_path / "rate.txt")
