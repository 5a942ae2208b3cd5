"""The page under axe-core's rules: no finding that is serious or critical.

AXE_CORE names its script: `npm install --prefix FOLDER axe-core` puts it at
FOLDER/node_modules/axe-core/axe.min.js.
"""

import json
import os
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser

AXE_CORE = os.environ.get("AXE_CORE")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH"),
    pytest.mark.skipif(not AXE_CORE, reason="AXE_CORE does not name axe-core's axe.min.js"),
]
# Everything that the page shows only when it is asked: covers, and each kind of step taken apart.
OPEN_ALL = """
(async () => {
  const until = async (ready) => {
    for (let i = 0; i < 800 && !ready(); i++) await new Promise((next) => setTimeout(next, 25));
    if (!ready()) throw new Error(`never: ${ready}`);
  };
  const one = document.getElementById("language");
  one.value = "LANGUAGE";
  one.dispatchEvent(new Event("change"));
  await until(() => document.getElementById("trust").dataset.values && !playground.state.busy);
  document.getElementById("cover").click();
  await until(() => document.querySelectorAll("#covered figure").length === playground.runs.length);
})()
"""
FOUND = """
(async () => {
  const found = {};
  const look = async (part) => {
    for (const { id, impact, nodes } of (await axe.run(part)).violations)
      if (["serious", "critical"].includes(impact))
        found[id] = nodes.map(({ html, failureSummary }) => `${html}: ${failureSummary}`);
  };
  await look(document);
  for (const run of [0, 1]) {
    document.getElementById(`run-${run}`).click();
    while (playground.state.busy) await new Promise((next) => setTimeout(next, 25));
    const kinds = new Set();
    for (const column of document.querySelectorAll(`#row-${run} .column`)) {
      const button = column.querySelector("button.cell");
      button?.click();
      const kind = document.querySelector("#made p").textContent;
      if (!kinds.has(kind)) await look("#made");
      kinds.add(kind);
    }
  }
  return found;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("language", ["en", "vi"])
def test_nothing_serious(written: Path, browser: Browser, language: str, width: int, dark: bool):
    browser.open(written, width, dark)
    browser.evaluate(OPEN_ALL.replace("LANGUAGE", language))
    assert browser.evaluate("document.documentElement.lang") == language
    browser.evaluate(Path(AXE_CORE).read_text(encoding="utf-8") + "; 0")
    found = browser.evaluate(FOUND)
    assert not found, json.dumps(found, indent=1)
