"""The pages in Chromium. Where there is none, conftest.py deselects these tests."""

from pathlib import Path

import pytest

from tests.browser import Browser

MEASURE = """
(async () => {
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode().catch(() => null)));
  const outside = [...document.body.querySelectorAll("*")].filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1);
  });
  return {
    images: images.length,
    charts: document.querySelectorAll("figure.chart").length,
    broken: images.filter((image) => !image.naturalWidth).map((image) => image.alt),
    dark: images.filter((image) => image.currentSrc !== image.src).length,
    scroll: document.documentElement.scrollWidth,
    width: innerWidth,
    outside: outside.map((element) => element.outerHTML.slice(0, 80)),
    paper: getComputedStyle(document.body).backgroundColor,
    smallest: Math.min(...[...document.querySelectorAll("p, td, th, dd, dt, figcaption, span")]
      .map((element) => parseFloat(getComputedStyle(element).fontSize))),
  };
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["lenet_page", "strided_page", "comparison_page", "hostile_pages"])
def test_a_page_opens(
    page: str, width: int, dark: bool, browser: Browser, request: pytest.FixtureRequest
):
    files = request.getfixturevalue(page)
    for file in [files] if isinstance(files, Path) else files:
        browser.open(file, width, dark)
        check(browser, browser.evaluate(MEASURE), width, dark)


def check(browser: Browser, found: dict, width: int, dark: bool) -> None:
    assert browser.errors == []
    assert found["images"] >= 6
    assert found["broken"] == []
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["outside"] == []
    assert found["smallest"] >= 12
    assert found["paper"] == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert found["dark"] == (found["charts"] if dark else 0)


def test_errors_of_a_page_are_seen(browser: Browser, tmp_path: Path):
    """The tests above would be worth nothing if they noticed nothing."""
    file = tmp_path / "index.html"
    file.write_text(
        "<!DOCTYPE html><body style='width: 2000px'><img src='none.png' alt='gone'>"
        "<script>console.error('said'); throw Error('thrown')</script></body>"
    )
    browser.open(file, 390)
    found = browser.evaluate(MEASURE)
    assert found["broken"] == ["gone"]
    assert found["scroll"] > 390
    assert "said" in " ".join(browser.errors)
    assert "thrown" in " ".join(browser.errors)
