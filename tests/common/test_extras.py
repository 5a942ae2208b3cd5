"""TensorFlow is added by ./launch.sh where it started the program."""

import os
import sys

import jax
import pytest

from cnn_jax.common.errors import DataError
from cnn_jax.common.extras import add_tensorflow
from cnn_jax.config import DataConfig
from cnn_jax.data import tfds_builder
from cnn_jax.data.sources import load_examples


class Replaced(Exception):
    """This process would have become another program."""


@pytest.fixture
def _launched(monkeypatch):
    def execv(path, arguments):
        raise Replaced(path, arguments)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["cnn_jax", "train", "--download"])
    monkeypatch.setenv("CNN_JAX_LAUNCHER", "/a/launch.sh")


@pytest.mark.usefixtures("_launched")
def test_a_download_that_needs_it_starts_the_same_command_again_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_builder, "tensorflow_is_installed", lambda: False)
    data = DataConfig("svhn_cropped")
    with pytest.raises(DataError, match="train --download"):
        load_examples(data, "train", str(tmp_path), download=False)
    with pytest.raises(Replaced) as caught:
        load_examples(data, "train", str(tmp_path), download=True)
    arguments = ["/a/launch.sh", "--with=prepare", "train", "--download"]
    assert caught.value.args == ("/a/launch.sh", arguments)


@pytest.mark.usefixtures("_launched")
def test_else_the_program_goes_on_to_its_error(monkeypatch):
    with monkeypatch.context() as several:
        several.setattr(jax.distributed, "is_initialized", lambda: True)
        add_tensorflow()
    monkeypatch.delenv("CNN_JAX_LAUNCHER")
    add_tensorflow()
