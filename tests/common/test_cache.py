"""The compilation cache, damaged in the ways that disks and other people know."""

import os
import shutil
import subprocess
import sys

import pytest
from jax._src.compilation_cache import compress_executable

from cnn_jax.common import cache
from tests.tiny import REPOSITORY

PROGRAM = """
import logging
import jax, jax.numpy as jnp
from cnn_jax.common import cache
logging.basicConfig(format="%(message)s")
cache.enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 3))).sum()))
"""


def run(folder):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY,
        # The level that cnn_jax sets; JAX has set one of its own in the process of the tests.
        env=os.environ | {"CNN_JAX_CACHE_DIR": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "well packed garbage": lambda path: path.write_bytes(compress_executable(bytes(500))),
    "a folder": replaced_by_a_folder,
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_told_once_and_written_anew(damage, filled, tmp_path):
    original, (printed, errors) = filled
    assert errors == ""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    entries = sorted(tmp_path.glob("compiled/*/jit_*-cache"))
    assert len(entries) > 1
    for entry in entries:
        DAMAGES[damage](entry)
    again, told = run(tmp_path)
    assert again == printed
    assert told.startswith(f"warning: compilation cache {entries[0].parent}: a damaged entry is ")
    assert told.count("\n") == 1
    assert all(entry.is_file() and entry.stat().st_size > 100 for entry in entries)
    assert run(tmp_path) == (printed, "")


def test_a_cache_that_cannot_be_is_told_once(filled, tmp_path):
    (tmp_path / "file").touch()
    printed, told = run(tmp_path / "file")
    assert printed == filled[1][0]
    assert "cannot be used; set CNN_JAX_CACHE_DIR to another folder, or CNN_JAX_CACHE=off" in told
    assert told.count("\n") == 1


def test_a_program_that_jaxlib_cannot_serialise_is_compiled_each_time_without_a_word(
    tmp_path, caplog
):
    """Programs with calls of oneDNN; anything else that hinders writing is told."""
    mending = cache._Mending(tmp_path, pytest.fail)
    start = "Error writing persistent compilation cache entry for 'jit_f': "
    mending(UserWarning(start + "MemoryError: std::bad_alloc"))
    assert caplog.messages == []
    mending(UserWarning(start + "OSError: No space left on device"))
    assert "No space left on device" in caplog.text
