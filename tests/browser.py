"""Chromium without a window, driven through the DevTools protocol over a pipe."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
SECONDS = 60

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

# Chromium reads commands from descriptor 3 and writes answers to 4; this puts the pipes there.
START = """
import os, sys
read, write, *command = sys.argv[1:]
os.dup2(int(read), 10); os.dup2(int(write), 11)
os.dup2(10, 3); os.dup2(11, 4)
os.execv(command[0], command)
"""


class Browser:
    """One page of one browser; use it as a context manager.

    Attributes:
      errors: what the page has reported so far: console errors, exceptions, failed requests.
    """

    def __enter__(self) -> "Browser":
        self._profile = tempfile.mkdtemp(prefix="chromium_")
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        start = [sys.executable, "-c", START, str(commands), str(answers)]
        self._process = subprocess.Popen(
            [*start, CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._write)  # Chromium ends when its pipe does
        os.close(self._read)
        try:
            self._process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path, width: int, dark: bool = False) -> None:
        """Loads a file in a window `width` pixels wide and waits until every picture is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844 if width < 500 else 800,  # of a phone, of a laptop
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.errors.clear()
        self.send("Page.navigate", url=page.absolute().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def send(self, method: str, **parameters: Any) -> dict:
        """The answer to a command; what happens meanwhile is noted."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], SECONDS)
            more = os.read(self._read, 1 << 20) if ready else b""
            assert more, "Chromium ended" if ready else f"Chromium said nothing for {SECONDS} s"
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, about: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(about["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(about["args"]))
        if method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        if method == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.errors.append(f"asked the network for {url}")
