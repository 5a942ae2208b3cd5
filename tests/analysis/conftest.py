"""A browser for the tests of pages; tests in a browser are deselected where there is none."""

from collections.abc import Iterator

import pytest

from tests.browser import CHROMIUM, Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Counts the tests that need Chromium as deselected, not as passed or skipped, without it."""
    if CHROMIUM:
        return
    unable = [item for item in items if item.path.name == "test_in_browser.py"]
    config.hook.pytest_deselected(items=unable)
    items[:] = [item for item in items if item not in unable]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not CHROMIUM:
        terminalreporter.write_line("no chromium on PATH: no page was opened in a browser")
