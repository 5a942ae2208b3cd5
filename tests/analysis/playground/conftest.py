"""Pages of small networks that were not trained."""

from pathlib import Path

import pytest

from cnn_jax.analysis.playground import page
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.data.examples import InMemory
from cnn_jax.models import LeNet
from tests.networks import Small
from tests.quick import make_run, unoptimised
from tests.tiny import make_examples


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RestoredRun]:
    """LeNet, and a network with BatchNorm and dropout whose images are normalised."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "lenet").mkdir()
    small = make_run(folder / "small", Small(), experiment="mine/small")
    return [make_run(folder / "lenet", LeNet(), experiment="mine/lenet"), small]


@pytest.fixture(scope="session")
def examples() -> InMemory:
    """48 squares on black, as a drawing is."""
    made = make_examples(48, seed=1)
    made.image[made.image < 64] = 0
    return made


@pytest.fixture(scope="session")
def written(runs: list[RestoredRun], examples: InMemory) -> Path:
    """The page of both."""
    with pytest.MonkeyPatch.context() as patch, unoptimised():
        patch.setattr(page.sources, "load_examples", lambda *_: examples)
        return page.playground(runs)
