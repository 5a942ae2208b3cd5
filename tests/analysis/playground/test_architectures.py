"""Every experiment's network in the page against `predict`: ./launch.sh test -mplayground -s."""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.analysis.playground import network, page
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import experiment
from cnn_jax.models.summary import summarise
from cnn_jax.train.preprocess import normalise
from tests.browser import CHROMIUM, Browser
from tests.quick import make_run, quick_jit
from tests.tiny import make_examples

pytestmark = [
    pytest.mark.playground,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH"),
]
IMAGES = 1000
WITH_VIEWS = 200  # images of a network whose test-time augmentation makes several of each


def measure_statistics(run: RestoredRun, image: np.ndarray) -> None:
    """Gives BatchNorm the means and variances of `image`, as a training does."""
    step = quick_jit(
        lambda variables, x: run.model.apply(variables, x, train=True, mutable=["batch_stats"])[1]
    )
    for _ in range(20):
        run.variables.update(step(run.variables, normalise(image, run.data)))


@pytest.mark.parametrize("name", experiment.names())
def test_the_logits_are_those_of_predict(name: str, tmp_path: Path, monkeypatch, capsys):
    # Imported here, because conftest.py drops that file's tests where there is no browser.
    from tests.analysis.playground.test_in_browser import predicted

    config = experiment.load(name)
    shape = (32, 32, 3) if name.startswith("cifar10/") else (28, 28, 1)
    run = make_run(tmp_path, config.model, shape, data=config.data, experiment=name)
    if summarise(config.model, shape).parameters > network.MOST_PARAMETERS:
        with pytest.raises(ConfigError, match=r"parameters, a page .* holds at most") as refused:
            page.playground([run])
        with capsys.disabled():
            print(f"\n{name}: {refused.value}")
        return
    one_view = config.data.test_time_augmentation == "none"
    images = make_examples(IMAGES if one_view else WITH_VIEWS, shape)
    monkeypatch.setattr(page.sources, "load_examples", lambda *_: images)
    if run.variables["batch_stats"]:
        measure_statistics(run, images.image[:100])
    file = page.playground([run])
    expected = page.predict(run, images.image)
    difference, milliseconds = 0.0, []
    with Browser() as browser:
        browser.open(file, 1280)
        for start in range(0, len(images), 10):
            started = time.perf_counter()
            found = predicted(browser, 0, images.image[start : start + 10])
            milliseconds.append(100 * (time.perf_counter() - started))
            difference = max(difference, np.abs(found - expected[start : start + 10]).max())
    relative = difference / np.abs(expected).max()
    with capsys.disabled():
        size = file.stat().st_size / 1e6
        middle = statistics.median(milliseconds)
        about = f"{relative:.1e} of the largest logit on {len(images)} images"
        print(f"\n{name}: {about}, {middle:.1f} ms, {size:.1f} MB")
    assert relative <= 1e-4
