"""The tests that need TensorFlow are deselected where it is not installed."""

import pytest

from cnn_jax.data.tfds_builder import tensorflow_is_installed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Counts them as deselected, not as passed or skipped; tests/conftest.py says so at the end."""
    if tensorflow_is_installed():
        return
    unable = [item for item in items if item.path.name == "test_with_tensorflow.py"]
    config.hook.pytest_deselected(items=unable)
    items[:] = [item for item in items if item not in unable]
