"""TensorFlow is added by ./launch.sh where it started the program, else its command is named."""

import os
import sys

import jax
import pytest

from cnn_jax.common import extras
from cnn_jax.common.errors import DataError


class Replaced(Exception):
    """This process would have become another program."""


@pytest.fixture
def without_tensorflow(monkeypatch):
    def execv(path, arguments):
        raise Replaced(path, arguments)

    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["cnn_jax", "train", "--download"])


def test_nothing_happens_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: name == "tensorflow")
    extras.require_tensorflow("reading it", install=False)


@pytest.mark.usefixtures("without_tensorflow")
def test_the_launcher_adds_it_and_starts_the_same_command(monkeypatch):
    monkeypatch.setenv("CNN_JAX_LAUNCHER", "/a/launch.sh")
    with pytest.raises(Replaced) as caught:
        extras.require_tensorflow("reading it", install=True)
    arguments = ["/a/launch.sh", "--with=prepare", "train", "--download"]
    assert caught.value.args == ("/a/launch.sh", arguments)


@pytest.mark.usefixtures("without_tensorflow")
@pytest.mark.parametrize(
    ("launcher", "install", "several", "command"),
    [
        ("/a/launch.sh", False, False, "/a/launch.sh setup --with=prepare"),
        ("/a/launch.sh", True, True, "/a/launch.sh setup --with=prepare"),
        (None, True, False, f"{sys.executable} -m pip install tensorflow"),
    ],
)
def test_else_the_error_names_the_command(monkeypatch, launcher, install, several, command):
    monkeypatch.delenv("CNN_JAX_LAUNCHER", raising=False)
    if launcher:
        monkeypatch.setenv("CNN_JAX_LAUNCHER", launcher)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    with pytest.raises(DataError) as caught:
        extras.require_tensorflow("reading it", install)
    assert str(caught.value) == (
        f"reading it needs TensorFlow, which is not installed; install it: {command}"
    )
