"""The playground in Chromium. Where there is none, conftest.py deselects these tests."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.analysis.playground import page
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.data import sources
from tests.browser import Browser

READY = """
(async () => {
  const pause = () => new Promise((next) => setTimeout(next, 25));
  for (let i = 0; i < 400 && !playground.state.differences; i++) await pause();
  return playground.state.differences;
})()
"""


@pytest.fixture(scope="module")
def browser(written: Path) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(written, 1280)
        assert max(browser.evaluate(READY)) < 1e-5
        yield browser


def predicted(browser: Browser, run: int, image: np.ndarray) -> np.ndarray:
    """The page's logits, [N, classes], of uint8 [N, H, W, C]."""
    texts = json.dumps([base64.b64encode(one.tobytes()).decode() for one in image])
    script = f"""(async () => {{
      const found = [];
      for (const text of {texts}) found.push([...(await playground.predict({run}, text)).logits]);
      return found;
    }})()"""
    return np.array(browser.evaluate(script))


@pytest.mark.parametrize("run", [0, 1], ids=["lenet", "small"])
def test_the_logits_are_those_of_predict(browser: Browser, runs: list[RestoredRun], run: int):
    image = np.random.default_rng(3).integers(0, 256, (20, 28, 28, 1), np.uint8)
    expected = page.predict(runs[run], image)
    difference = np.abs(predicted(browser, run, image) - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()


def test_occlusion(browser: Browser, runs: list[RestoredRun], tfds_dir: Path):
    """Against squares of 4x4 that cover the image at every second row and column."""
    place = browser.evaluate("playground.images[0]")
    image = sources.load_examples(runs[0].data, "test", str(tfds_dir))[np.array([place])]["image"][
        0
    ]
    corners = [(y, x) for y in range(0, 25, 2) for x in range(0, 25, 2)]
    background = browser.evaluate("playground.background")
    covered = np.repeat(image[None], len(corners) + 1, 0)
    for one, (y, x) in zip(covered[1:], corners, strict=True):
        one[y : y + 4, x : x + 4] = np.round(255 * np.array(background))
    logits = page.predict(runs[0], np.resize(covered, (250, 28, 28, 1)))[: len(covered)]
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probability = (powers / powers.sum(-1, keepdims=True))[:, 3]
    fall, times = np.zeros((28, 28)), np.zeros((28, 28))
    for (y, x), after in zip(corners, probability[1:], strict=True):
        fall[y : y + 4, x : x + 4] += probability[0] - after
        times[y : y + 4, x : x + 4] += 1
    found = browser.evaluate("playground.occlusion(0, 0, 3).then(({ fall }) => [...fall])")
    expected = fall / np.maximum(times, 1)
    np.testing.assert_allclose(np.reshape(found, (28, 28)), expected, atol=1e-5)
