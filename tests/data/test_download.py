"""Downloads from hosts that cut, stall, lie or are not there, over real connections on loopback."""

import contextlib
import gzip
import hashlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.common.errors import DataError
from cnn_jax.data import download
from cnn_jax.data.download import RemoteFile
from tests.tiny import REPOSITORY

CONTENT = np.random.default_rng(0).bytes(1_000_000)
OTHER = bytes(len(CONTENT))


class Host(http.server.ThreadingHTTPServer):
    """Serves CONTENT in one of the ways of WAYS under /WAY/data.bin.

    Attributes:
      asked: the way and the Range header of each request, in their order.
    """

    daemon_threads = True

    def __init__(self):
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_):
        """Says nothing where a client hangs up before the end, as it should do here."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        way = self.path.split("/")[1]
        self.server.asked.append((way, self.headers.get("Range")))
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
        WAYS[way](self, start)

    def answer(self, content: bytes, start: int = 0, sent: int | None = None) -> None:
        """Promises `content` from `start` on, sends at most `sent` bytes of it and hangs up."""
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:sent])
        self.close_connection = True

    def answer_without_length(self, start: int) -> None:
        self.send_response(206 if start else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(CONTENT[start:])

    def answer_without_end(self, start: int) -> None:
        self.send_response(206 if start else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(CONTENT[start:])
        with contextlib.suppress(OSError):  # until the other side hangs up
            while True:
                self.wfile.write(OTHER)

    def answer_compressed(self, start: int) -> None:
        """In an encoding of its own choice, unless it is told to send the file as it is."""
        if "gzip" not in self.headers.get("Accept-Encoding", "gzip"):
            return self.answer(CONTENT, start)
        content = gzip.compress(CONTENT)
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return self.wfile.write(content)

    def stall(self, start: int) -> None:
        """Sends a part of it, then nothing, until the other side hangs up."""
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:200_000])
        self.rfile.read(1)

    def log_message(self, *_):
        pass


WAYS: dict[str, Callable[[Handler, int], None]] = {
    "whole": lambda self, start: self.answer(CONTENT, start),
    "cut": lambda self, start: self.answer(CONTENT, start, 300_000),
    "cut_without_ranges": lambda self, start: self.answer(CONTENT, 0, 300_000),
    "without_ranges": lambda self, start: self.answer(CONTENT),
    "without_length": lambda self, start: self.answer_without_length(start),
    "without_end": lambda self, start: self.answer_without_end(start),
    "compressed": lambda self, start: self.answer_compressed(start),
    "other": lambda self, start: self.answer(OTHER, start),
    "longer": lambda self, start: self.answer(CONTENT + b"more", start),
    "stalled": lambda self, start: self.stall(start),
    "absent": lambda self, start: self.send_error(404),
    "broken": lambda self, start: self.send_error(500),
}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(download, "READ_SECONDS", 3.0)
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def remote(host: Host, *ways: str) -> RemoteFile:
    urls = tuple(f"http://127.0.0.1:{host.server_port}/{way}/data.bin" for way in ways)
    return RemoteFile("data.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), urls)


def check_fetched(file: RemoteFile, folder: Path) -> None:
    assert download.fetch([file], folder) == [folder / "data.bin"]
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["data.bin"]


@pytest.mark.parametrize(
    ("ways", "tried"),
    [
        (["whole", "broken"], ["whole"]),
        (["cut"], ["cut"] * 4),
        (["without_ranges"], ["without_ranges"]),
        (["without_length"], ["without_length"]),
        (["without_end"], ["without_end"]),
        (["compressed"], ["compressed"]),
        # A host is left when a connection brings nothing new.
        (["cut_without_ranges", "whole"], ["cut_without_ranges"] * 2 + ["whole"]),
        (["stalled", "whole"], ["stalled"] * 2 + ["whole"]),
        (["absent", "broken", "whole"], ["absent", "broken", "whole"]),
        (["longer", "whole"], ["longer", "whole"]),
        (["other", "whole"], ["other", "whole"]),
    ],
)
def test_hosts_are_tried_in_order(host: Host, tmp_path: Path, ways: list[str], tried: list[str]):
    check_fetched(remote(host, *ways), tmp_path / "new" / "folder")
    assert [way for way, _ in host.asked] == tried


def test_cut_connection_resumes_where_it_was_cut(host: Host, tmp_path: Path):
    check_fetched(remote(host, "cut"), tmp_path)
    ranges = [wanted for _, wanted in host.asked]
    assert ranges[0] is None
    starts = [int(wanted[len("bytes=") : -1]) for wanted in ranges[1:]]
    # Of what a connection brings, less than a block is lost when it breaks off.
    for k, start in enumerate(starts):
        assert 300_000 * (k + 1) - (k + 1) * download.BLOCK < start <= 300_000 * (k + 1)


@pytest.mark.parametrize(
    ("part", "ways", "ranges"),
    [
        (CONTENT[:400_000], ["whole"], ["bytes=400000-"]),
        (CONTENT[:400_000], ["without_ranges"], ["bytes=400000-"]),
        (CONTENT, ["whole"], []),
        # What is left of something else is found out by its sum and fetched anew.
        (OTHER[:400_000], ["whole"], ["bytes=400000-", None]),
        (OTHER, ["whole"], [None]),
        (CONTENT + b"more", ["whole"], [None]),
    ],
)
def test_an_earlier_part_is_resumed(
    host: Host, tmp_path: Path, part: bytes, ways: list[str], ranges: list[str | None]
):
    (tmp_path / "data.bin.part").write_bytes(part)
    check_fetched(remote(host, *ways), tmp_path)
    assert [wanted for _, wanted in host.asked] == ranges


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("other", "its SHA-256 is not the recorded one"),
        ("longer", "it has 1000004 bytes there, not 1000000"),
        ("absent", "HTTP 404"),
        ("broken", "HTTP 500"),
        ("stalled", "nothing came for 3 s"),
        ("cut_without_ranges", "the connection broke off"),
    ],
)
def test_refusal_names_file_host_and_reason(host: Host, tmp_path: Path, way: str, reason: str):
    with pytest.raises(DataError) as caught:
        download.fetch([remote(host, way)], tmp_path)
    assert str(caught.value) == (
        f"data.bin: cannot be fetched (127.0.0.1:{host.server_port}: {reason}); run the command "
        f"again, which resumes, or put the file of 1000000 bytes into {tmp_path}"
    )
    assert not (tmp_path / "data.bin").exists()


def test_host_that_takes_no_connection(host: Host, closed_port: int, tmp_path: Path):
    dead = RemoteFile("data.bin", 1, "", (f"http://127.0.0.1:{closed_port}/data.bin",))
    with pytest.raises(DataError, match=rf"\(127.0.0.1:{closed_port}: no connection\)"):
        download.fetch([dead], tmp_path)
    good = remote(host, "whole")
    both = RemoteFile(good.name, good.size, good.sha256, dead.urls + good.urls)
    check_fetched(both, tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
import rich.progress
from cnn_jax.data import download

class Deadly(rich.progress.Progress):
    def update(self, task, *, completed):
        if completed > 500_000:
            os.kill(os.getpid(), signal.SIGKILL)

download.bar = lambda *_: Deadly(disable=True)
url, size, sha256, folder = sys.argv[1:]
download.fetch([download.RemoteFile("data.bin", int(size), sha256, (url,))], Path(folder))
"""


def test_killed_process_is_resumed(host: Host, tmp_path: Path):
    file = remote(host, "whole")
    arguments = [file.urls[0], str(file.size), file.sha256, str(tmp_path)]
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_fetched(file, tmp_path)
    (first, _), (second, wanted) = host.asked
    assert (first, second) == ("whole", "whole")
    assert 400_000 < int(wanted[len("bytes=") : -1]) < 600_000


def test_two_at_once_fetch_a_file_once(host: Host, tmp_path: Path):
    file = remote(host, "whole")
    threads = [threading.Thread(target=download.fetch, args=([file], tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_fetched(file, tmp_path)
    assert len(host.asked) == 1


def test_what_is_shown_in_a_log(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture):
    download.fetch([remote(host, "absent", "whole")], tmp_path)
    name = f"127.0.0.1:{host.server_port}"
    line = f"fetching data.bin (1.0 MB) from {name}"
    assert capsys.readouterr().out.splitlines() == [line, f"data.bin: {name}: HTTP 404", line]
