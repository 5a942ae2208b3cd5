"""Downloads over HTTP: tries several hosts in turn, resumes after a break, checks the SHA-256."""

import contextlib
import dataclasses
import fcntl
import hashlib
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import requests
import rich.console
import rich.progress

from cnn_jax.common.errors import DataError

# A host has failed if it does not connect in CONNECT_SECONDS or sends nothing for READ_SECONDS.
CONNECT_SECONDS = 2.0
READ_SECONDS = 30.0
# How often the list of hosts is tried, and the pause before a host is asked again.
ROUNDS, PAUSE_SECONDS = 2, 2.0
BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file that several hosts offer.

    Attributes:
      name: its name on disk.
      size: in bytes.
      sha256: of the whole file, in hexadecimal digits.
      urls: its addresses, in the order in which they are tried.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]

    def is_at(self, path: Path) -> bool:
        """Whether `path` holds this file, complete and unchanged."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256


def silent_hosts(urls: Iterable[str]) -> list[str]:
    """The hosts of `urls` if none of them answers, else []; takes at most about 3 seconds."""
    hosts = {
        host: url
        for url in urls
        if (host := urllib.parse.urlsplit(url).hostname) and url.startswith("http")
    }
    answered = threading.Event()

    def call(url: str) -> None:
        try:
            requests.head(url, timeout=(CONNECT_SECONDS, CONNECT_SECONDS / 2))
        except requests.exceptions.ReadTimeout:
            pass  # slow, but reachable
        except requests.exceptions.RequestException:
            return
        answered.set()

    # Threads, because a DNS lookup has no time limit.
    callers = [threading.Thread(target=call, args=(u,), daemon=True) for u in hosts.values()]
    for caller in callers:
        caller.start()
    deadline = time.monotonic() + 1.6 * CONNECT_SECONDS
    for caller in callers:
        if not answered.is_set():
            caller.join(max(0.0, deadline - time.monotonic()))
    return [] if answered.is_set() else sorted(hosts)


def bar(*columns: str | rich.progress.ProgressColumn) -> rich.progress.Progress:
    """A progress bar on standard output; a pipe or a file gets none."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        *columns,
        rich.progress.TimeRemainingColumn(compact=True),
        console=rich.console.Console(file=sys.stdout, highlight=False, emoji=False),
        transient=True,
        redirect_stdout=False,  # True would show TFDS's output, which we suppress
        redirect_stderr=False,
        disable=not sys.stdout.isatty(),
    )


def fetch(files: Sequence[RemoteFile], folder: Path) -> list[Path]:
    """Downloads `files` into `folder`, one after another; returns their paths.

    A partial download stays in NAME.part, and the next call resumes it. If two processes fetch the
    same file, one waits for the other.

    Raises:
      DataError: no host sent a complete file; names the file, each host and its problem.
      OSError: `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with bar(rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()) as shown:
        return [_fetch(file, folder, shown) for file in files]


def _fetch(file: RemoteFile, folder: Path, shown: rich.progress.Progress) -> Path:
    path, part = folder / file.name, folder / f"{file.name}.part"
    task = shown.add_task(file.name, total=file.size)
    problems: dict[str, str] = {}
    with open(part, "ab") as stream:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        if file.is_at(path):  # another process was faster
            part.unlink(missing_ok=True)
            return path
        for url in file.urls * ROUNDS:
            host = urllib.parse.urlsplit(url).netloc
            if host in problems:  # asked before, and its problem shown
                time.sleep(PAUSE_SECONDS)
            text = f"fetching {file.name} ({file.size / 1e6:.1f} MB) from {host}"
            shown.console.print(text, markup=False, soft_wrap=True)
            problems[host] = _receive(url, stream, file.size, shown, task)
            if stream.seek(0, 2) >= file.size:
                stream.flush()
                if file.is_at(part):
                    part.rename(path)
                    return path
                problems[host] = "its SHA-256 is not the recorded one"
                stream.truncate(0)
            shown.console.print(
                f"{file.name}: {host}: {problems[host]}", markup=False, soft_wrap=True
            )
    told = "; ".join(f"{host}: {problem}" for host, problem in problems.items())
    raise DataError(
        f"{file.name}: cannot be fetched ({told}); run the command again, which resumes, or put the "
        f"file of {file.size} bytes into {folder}"
    )


def _receive(
    url: str, stream: BinaryIO, size: int, shown: rich.progress.Progress, task: rich.progress.TaskID
) -> str:
    """Appends to `stream` what is missing of `size` bytes; returns the reason for any failure.

    After a break it connects again, as long as each connection brings new bytes.
    """
    problem, before = "", -1
    while before < stream.seek(0, 2) < size:
        before = stream.tell()
        headers = {"Accept-Encoding": "identity"}  # uncompressed: Range counts file bytes
        if before:
            headers["Range"] = f"bytes={before}-"
        timeout = (CONNECT_SECONDS, READ_SECONDS)
        try:
            with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
                response.raise_for_status()
                start = before if response.status_code == requests.codes.partial_content else 0
                length = int(response.headers.get("Content-Length", size - start))
                if length != size - start:
                    return f"it has {start + length} bytes there, not {size}"
                stream.truncate(start)  # a host without ranges sends the whole file again
                stream.seek(start)
                for block in response.iter_content(BLOCK):
                    stream.write(block[: size - stream.tell()])
                    shown.update(task, completed=stream.tell())
                    if stream.tell() == size:  # ignore what the host still sends
                        break
        except requests.exceptions.RequestException as error:
            problem = _short(error)
    return problem or "the connection broke off"


def _short(error: requests.exceptions.RequestException) -> str:
    if isinstance(error, requests.exceptions.HTTPError):
        assert error.response is not None, "it is about an answer"
        return f"HTTP {error.response.status_code}"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, requests.exceptions.ReadTimeout) or "timed out" in str(error):
        return f"nothing came for {READ_SECONDS:g} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return "no connection"
