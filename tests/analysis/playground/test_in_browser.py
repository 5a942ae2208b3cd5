"""The playground in Chromium. Where there is none, conftest.py deselects these tests."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.analysis.playground import page
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.data.examples import InMemory
from cnn_jax.models import MLP
from tests.browser import Browser
from tests.quick import make_run
from tests.tiny import png_file

MINUS = "\N{MINUS SIGN}"
READY = """
(async () => {
  const trust = document.getElementById("trust");
  const pause = () => new Promise((next) => setTimeout(next, 25));
  for (let i = 0; i < 400 && !trust.dataset.values; i++) await pause();
  return Number(JSON.parse(trust.dataset.values).difference);
})()
"""


@pytest.fixture(scope="module")
def browser(written: Path) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(written, 1280)
        assert browser.evaluate(READY) < 1e-5
        yield browser


def predicted(browser: Browser, run: int, image: np.ndarray) -> np.ndarray:
    """The page's logits, [N, classes], of uint8 [N, H, W, C]."""
    texts = json.dumps([base64.b64encode(one.tobytes()).decode() for one in image])
    script = f"""(async () => {{
      playground.state.ticket++;  // ends what the page computes by itself
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


def test_occlusion(browser: Browser, runs: list[RestoredRun], examples: InMemory):
    """Against squares of 4x4 that cover the image at every second row and column."""
    content = json.loads(browser.evaluate("document.getElementById('content').textContent"))
    image = examples.image[content["images"][0][1]]
    corners = [(y, x) for y in range(0, 25, 2) for x in range(0, 25, 2)]
    covered = np.repeat(image[None], len(corners) + 1, 0)
    for one, (y, x) in zip(covered[1:], corners, strict=True):
        one[y : y + 4, x : x + 4] = np.round(255 * np.array(content["background"]))
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


class Hand:
    """What a reader does: the mouse, a finger, keys, files."""

    def __init__(self, browser: Browser):
        self.browser = browser

    def place(self, selector: str, x: float, y: float) -> tuple[float, float]:
        """In the window, the place at shares (x, y) of an element, which is scrolled into view."""
        return tuple(
            self.browser.evaluate(
                f"""(() => {{
                  const one = document.querySelector({json.dumps(selector)});
                  one.scrollIntoView({{ block: "center", inline: "center" }});
                  const area = one.getBoundingClientRect();
                  return [area.left + {x} * area.width, area.top + {y} * area.height];
                }})()"""
            )
        )

    def drag(self, selector: str, *places: tuple[float, float], touch: bool = False) -> None:
        points = [self.place(selector, *place) for place in places]
        for kind, (x, y) in zip(["start", *["move"] * (len(points) - 1)], points, strict=True):
            if touch:
                method, about = "Input.dispatchTouchEvent", {"touchPoints": [{"x": x, "y": y}]}
                self.browser.send(method, type="touch" + kind.title(), **about)
            else:
                named = {"start": "mousePressed", "move": "mouseMoved"}[kind]
                self._mouse(named, x, y)
        if touch:
            self.browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self._mouse("mouseReleased", *points[-1])
        self.settle()

    def _mouse(self, kind: str, x: float, y: float) -> None:
        about = {"button": "left", "buttons": 1, "clickCount": 1}
        self.browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **about)

    def press(self, selector: str, *keys: str) -> None:
        self.browser.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        for key in keys:
            self.browser.send("Input.dispatchKeyEvent", type="keyDown", key=key)
            self.browser.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def settle(self) -> None:
        """Waits for what a change of the input brings; a frame or two."""
        self.browser.evaluate("new Promise((next) => setTimeout(next, 60))")

    def text(self, selector: str) -> str:
        return self.browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_a_drawing_is_centred_and_scaled(browser: Browser, touch: bool):
    hand = Hand(browser)
    browser.evaluate("document.getElementById('clear').click()")
    hand.drag("#pad", (0.1, 0.1), (0.1, 0.4), touch=touch)
    assert browser.evaluate("playground.state.exact") is None
    image = np.reshape(browser.evaluate("[...playground.state.shown.d]"), (28, 28))
    strong = np.argwhere(image > 0.5)
    middle = (strong.min(0) + strong.max(0)) / 2
    assert np.ptp(strong[:, 0]) + 1 == pytest.approx(6, abs=1)  # the squares' height
    np.testing.assert_allclose(middle, [13.5, 13.5], atol=1)
    assert np.ptp(strong[:, 0]) > np.ptp(strong[:, 1])


def test_a_value_is_taken_apart(browser: Browser):
    hand = Hand(browser)
    browser.evaluate("document.getElementById('test-0').click()")
    hand.settle()
    hand.drag("#cell-1-2 canvas", (0.01, 0.01))
    assert hand.text("#statement").startswith("Conv_0, channel 2, row 0, column 0: the value is")
    assert "Hatched cells are padding" in hand.text(".detail")  # 'same' padding, at the corner
    hand.press("#cell-1-2", "ArrowRight", "ArrowDown")
    chosen = browser.evaluate("playground.state.chosen")
    assert chosen == {"step": 0, "channel": 2, "place": 28 + 1}
    value = browser.evaluate("playground.runs[0].maps[1].d[(28 + 1) * 6 + 2]")
    said = hand.text("#statement").rpartition(" is ")[2].rstrip(".").replace(MINUS, "-")
    assert float(said) == pytest.approx(value, rel=1e-4)
    total = [text for text in hand.text(".detail").split("Sum") if "=" in text][-1]
    assert total.strip().endswith(said.replace("-", MINUS))
    steps = browser.evaluate("playground.runs[0].steps.length")
    for place in range(1, steps + 1):  # every kind of step can be taken apart, by keyboard too
        hand.press(f".column:nth-of-type({place + 1}) .cell", "ArrowRight")
        assert browser.evaluate("playground.state.chosen.step") == place - 1
        assert "=" in hand.text(".detail")
    hand.press("#cell-1-2", "ArrowRight")
    assert "top left by 9, the middle by 25 of the 784 values" in hand.text("#times_text")
    hand.press("#cell-4-0", "ArrowRight")  # sees 14x14 at every second pixel, from -2: 2x2 and 7x7
    assert "top left by 4, the middle by 49 of the 100 values" in hand.text("#times_text")
    assert browser.errors == []


def test_a_large_kernel_is_a_picture(
    browser: Browser, examples: InMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That of a dense layer on the image itself, which is as large as the image."""
    monkeypatch.setattr(page.sources, "load_examples", lambda *_: examples)
    browser.open(page.playground([make_run(tmp_path, MLP())]), 1280)
    assert browser.evaluate(READY) < 1e-5
    hand = Hand(browser)
    hand.press(".column:nth-of-type(3) .cell", "ArrowRight")
    assert hand.text("#statement").startswith("Dense_0, unit")
    sizes = "[...document.querySelectorAll('#made canvas')].map((one) => one.width)"
    assert browser.evaluate(sizes) == [28, 28, 28]  # patch, kernel, products
    assert browser.errors == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"no image", "This is not an image that the browser can read. Drop a PNG"),
        (png_file(10, 20_000, bytes(11 * 20_000)), "This image is too long and narrow"),
    ],
    ids=["text", "long"],
)
def test_files_that_are_refused(browser: Browser, file: bytes, said: str):
    """At once: an image as wide as the pad and 2,000 times as high would hold the page for 20 s."""
    longest = browser.evaluate(
        f"""(async () => {{
          const message = document.getElementById("message");
          const pause = () => new Promise((next) => setTimeout(next, 10));
          const text = atob("{base64.b64encode(file).decode()}");
          const data = Uint8Array.from(text, (one) => one.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([data], "dropped"));
          document.dispatchEvent(new DragEvent("drop", {{ dataTransfer }}));
          let [last, longest] = [performance.now(), 0];
          for (let i = 0; i < 500 && !message.textContent.startsWith("This"); i++) {{
            await pause();
            longest = Math.max(longest, performance.now() - last);
            last = performance.now();
          }}
          return longest;
        }})()"""
    )
    assert Hand(browser).text("#message").startswith(said)
    assert longest < 3000  # ms; an idle machine takes 50


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_speaks(written: Path, browser: Browser, width: int):
    browser.open(written, width)
    browser.evaluate(READY)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    english = page.texts()["en"]
    headings = "[...document.querySelectorAll('h2')].map((one) => one.textContent)"
    assert english["sums"] in browser.evaluate(headings)
    browser.evaluate(
        """(() => {
          const one = document.getElementById("language");
          one.value = "vi";
          one.dispatchEvent(new Event("change"));
        })()"""
    )
    assert page.texts()["vi"]["sums"] in browser.evaluate(headings)
    assert browser.evaluate("document.documentElement.lang") == "vi"
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.errors == []
