"""Pages of small networks that were not trained."""

from pathlib import Path

import pytest

from cnn_jax.analysis.playground import page
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.models import LeNet
from tests.networks import Small
from tests.quick import make_run, unoptimised


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RestoredRun]:
    """LeNet, and a network with BatchNorm and dropout whose images are normalised."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "lenet").mkdir()
    small = make_run(folder / "small", Small(), experiment="mine/small")
    return [make_run(folder / "lenet", LeNet(), experiment="mine/lenet"), small]


@pytest.fixture(scope="session")
def written(runs: list[RestoredRun], tfds_dir: Path) -> Path:
    """The page of both."""
    with unoptimised():
        return page.playground(runs, str(tfds_dir))
