"""Four virtual CPU devices, a cache of the tests' own, and small datasets that are really on disk."""

import collections
import os
import tempfile
from pathlib import Path

# Before JAX starts.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose workers share it
    _cache = tempfile.TemporaryDirectory(prefix="cnn_jax_tests_", ignore_cleanup_errors=True)
    os.environ["CNN_JAX_CACHE_DIR"] = _cache.name
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

import jax
import pytest

from cnn_jax.common.cache import enable_compilation_cache
from cnn_jax.data.splits import Splits
from cnn_jax.data.tfds_builder import tensorflow_is_installed
from tests.tiny import make_examples, prepare_tiny_squares

# Many tests compile the same small programs.
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# JAX reads it when it is imported: it halves the compilations of the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(scope="session")
def splits() -> Splits:
    """160 training and 48 test examples of 28x28x1 in ten classes."""
    return Splits(make_examples(160), None, make_examples(48, seed=1))


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS data_dir with `tiny_squares`: 160 train and 48 test images of 28x28x1, array_record."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare_tiny_squares(folder)
    return folder


def pytest_terminal_summary(terminalreporter):
    """A last line for each kind of fault: how many were tried, and what became of the runs.

    Here and not in faults/, because under pytest-xdist only this file is loaded where it prints.
    """
    if not tensorflow_is_installed():
        terminalreporter.write_line(
            "no TensorFlow: TFRECORD files and TFDS's own builders were not tried"
        )
    totals = collections.defaultdict(lambda: [0, 0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "faults" and report.when == "call":
                    kind, tried, survived = value
                    totals[kind][0] += tried
                    totals[kind][1] += survived
    for kind, (tried, survived) in totals.items():
        terminalreporter.write_line(
            f"{kind}: faults tried {tried}, survived {survived}, lost {tried - survived}"
        )
