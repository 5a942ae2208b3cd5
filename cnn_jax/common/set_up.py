"""Makes or mends .venv beside launch.sh, then starts a command in place of itself.

Called by launch.sh as `set_up.py PYTHON PLATFORM OPTIONS SOURCES [COMMAND ...]`:
  PYTHON: the Python that the user asked for; "" for any. It is the one that runs this file.
  PLATFORM: cpu, cuda, cuda12, cuda13 or tpu; "" for what is found.
  OPTIONS: extras of setup.cfg, and `pinned` for the versions of .ci/constraints.txt, between spaces.
  SOURCES: checksums of the files that say what is installed.
  COMMAND: without it, the set-up looks again for a GPU or TPU; otherwise .venv keeps its platform.

It runs before any package is installed, so it imports only the standard library.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
STAMP = VENV / ".cnn_jax-ready"  # written when a set-up has succeeded
UNREADY = VENV / ".cnn_jax-unready"  # in its place while a set-up is incomplete
LOG = ROOT / ".venv-setup.log"  # output of the last set-up; also the lock file
GOOGLE = "0x1ae0"  # as vendor of a PCI device


class Stamp(NamedTuple):
    """What .venv was made for: the lines of STAMP, which launch.sh reads too."""

    root: str = ""
    python: str = ""
    platform: str = ""
    options: str = ""
    sources: str = ""


def read_stamp() -> Stamp:
    lines = STAMP.read_text().splitlines() if STAMP.exists() else []
    return Stamp(*lines) if len(lines) == len(Stamp._fields) else Stamp()


def say(text: str) -> None:
    print(f"launch.sh: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    say(text)
    sys.exit(1)


# ------------------------------------------------------------------------------- the platform


def choose_platform(asked: str, before: str = "") -> tuple[str, str]:
    """(what JAX is installed for, why). CUDA's requirements are from docs.jax.dev, Installation.

    Args:
      asked: as CNN_JAX_PLATFORM.
      before: what .venv was made for; kept if it is as asked.
    """
    if before in ("cpu", "cuda12", "cuda13", "tpu") and before.startswith(asked):
        return before, "as before"
    if asked not in ("", "cuda"):
        return asked, "as CNN_JAX_PLATFORM says"
    driver, capability = smallest("driver_version"), smallest("compute_cap")
    if not driver:
        why = "nvidia-smi finds no GPU"
        if asked:
            return "cuda12", f"{why}; more drivers run CUDA 12 than 13"
        return ("tpu", "there is a PCI device of Google's") if has_tpu() else ("cpu", why)
    if numbers(driver) < (525,) and not asked:
        why = "older than 525, which CUDA 12 needs; update it, then run ./launch.sh setup"
        return "cpu", f"driver {driver} is {why}"
    if numbers(driver) < (580,):
        return "cuda12", f"driver {driver} is older than 580, which CUDA 13 needs"
    if capability and numbers(capability) < (7, 5):
        return "cuda12", f"compute capability {capability} is below 7.5, which CUDA 13 needs"
    return "cuda13", f"driver {driver} is 580 or newer"


def smallest(name: str) -> str:
    """The smallest version of this name that nvidia-smi tells of a GPU; "" if it tells of none."""
    query = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
    try:  # the time limit: a broken driver can hang nvidia-smi
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return min(re.findall(r"^\d+(?:\.\d+)+$", shown, re.MULTILINE), key=numbers, default="")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def has_tpu() -> bool:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(Path(name).exists() for name in ("/dev/accel0", "/dev/vfio/0")) and any(
        vendor.read_text().strip() == GOOGLE for vendor in vendors
    )


# --------------------------------------------------------------------------------- the set-up


@contextlib.contextmanager
def only_one() -> Iterator[TextIO]:
    """Waits for another set-up of .venv; yields the log, which holds the lock.

    The commands of a set-up write into the log, so each of them holds the lock too until it ends,
    even if this process is killed.
    """
    try:
        log = LOG.open("a")
    except OSError:
        fail(f"cannot write to {ROOT}, where .venv belongs")
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another set-up of {VENV}")
            fcntl.flock(log, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield log


def run(log: TextIO, *command: str | Path) -> int:
    """Runs a command of the set-up in the repository; returns its exit status.

    It is a process group of its own, so that a signal that ends this process ends its children too.
    """
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        process_group=0,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        return child.wait()
    except SystemExit:  # by cut_short
        os.killpg(child.pid, signal.SIGTERM)
        raise


def cut_short(number: int, _: object) -> NoReturn:
    say("the set-up was cut short; the next call starts it again")
    sys.exit(128 + number)


def is_installed() -> bool:
    return PYTHON.exists() and any(VENV.glob("lib/python3*/site-packages/cnn_jax-*.dist-info"))


def reason_to_make(had: Stamp, wanted: Stamp, log: TextIO) -> str:
    """Why .venv must be made again before an installation; "" if it can stay."""
    if not VENV.is_dir():
        return "there is none"
    if UNREADY.exists():
        return "its last set-up did not finish"
    if had.root not in ("", wanted.root):
        return "it was made in another folder"
    if had.python != wanted.python:
        return f"it was made with {had.python or 'another Python'}"
    if had.platform != wanted.platform and had.platform.startswith(("cuda", "tpu")):
        return f"it was made for {had.platform}"
    if not PYTHON.exists() or run(log, PYTHON, "-m", "pip", "--version"):
        return "its Python or pip cannot be used"
    return ""


def make_venv(python: str, reason: str, log: TextIO) -> None:
    """Makes .venv with the Python that runs this; `python` is the name that the user knows it by."""
    version = "{}.{}".format(*sys.version_info)
    say(f"creating .venv with {python} (Python {version}): {reason}")
    if not VENV.is_dir():
        VENV.unlink(missing_ok=True)
        VENV.mkdir()
    UNREADY.touch()
    STAMP.unlink(missing_ok=True)
    for path in VENV.iterdir():  # .venv itself stays, because it may be a link
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != UNREADY:
            path.unlink()
    if status := run(log, sys.executable, "-m", "venv", VENV):
        fail(f"{sys.executable} could not make {VENV} (exit {status}); see {LOG}")


def install(wanted: Stamp, why: str, log: TextIO) -> None:
    """Installs cnn_jax into .venv and writes the stamp. If pip fails, the old stamp stays."""
    if STAMP.exists():
        STAMP.replace(UNREADY)
    UNREADY.touch()
    options = wanted.options.split()
    shown = ", ".join([f"{wanted.platform} ({why})", *options])
    say(f"installing cnn_jax for {shown}; a first set-up takes a minute or two")
    # Modules are compiled at their first import, which halves the time of a set-up. For the tests,
    # all are compiled below: compilation can warn, and the tests treat warnings as errors.
    pip = ["-m", "pip", "install", "--no-compile", "--no-input", "--disable-pip-version-check"]
    if "pinned" in options:
        pip += ["--constraint", ".ci/constraints.txt"]
    extras = ",".join(name for name in (*options, wanted.platform) if name not in ("pinned", "cpu"))
    status = run(log, PYTHON, *pip, "--editable", f".[{extras}]" if extras else ".")
    if "onnx" in options and not status:
        # It asks for an older Orbax, which `export` does not use.
        status = run(log, PYTHON, *pip, "--no-deps", "jax2onnx")
    if status:
        if UNREADY.stat().st_size:
            UNREADY.replace(STAMP)
        *_, cause = ["", *re.findall(r"ERROR.*", LOG.read_text(errors="replace"))]
        fail(f"pip could not install cnn_jax (exit {status}): {cause}; see {LOG}")
    if "test" in options:
        run(log, PYTHON, "-m", "compileall", "-q", "-j", "0", VENV / "lib")
    UNREADY.write_text("".join(f"{line}\n" for line in wanted))
    UNREADY.replace(STAMP)


def main(python: str, platform: str, options: str, sources: str, *command: str) -> None:
    """See the docstring of this file."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
            signal.signal(number, cut_short)
    with only_one() as log:
        had = read_stamp()
        platform, why = choose_platform(platform, had.platform if command else "")
        options = " ".join(dict.fromkeys([*had.options.split(), *options.split()]))
        wanted = Stamp(str(ROOT), python or had.python, platform, options, sources)
        if wanted != had or not is_installed():
            started = time.monotonic()
            log.truncate(0)
            if reason := reason_to_make(had, wanted, log):
                wanted = wanted._replace(python=python or sys.executable)
                make_venv(wanted.python, reason, log)
            install(wanted, why, log)
            say(f"ready after {time.monotonic() - started:.0f} s")
    if command:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores
        os.execvp(command[0], command)
    say(f"{VENV} is set up for {', '.join([wanted.platform, *wanted.options.split()])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
