"""Folders: what commands write into, and what the storage libraries are given."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cnn_jax.common.errors import CnnJaxError, ConfigError

# What Orbax, TensorStore and TFDS take literally in a path. They read * ? [ ] as a pattern and a
# backslash as a separator, refuse a component that ends in .__lock, and need valid UTF-8.
_LITERAL = re.compile(r"[\w ./+=,~:-]*")
_OPEN_FOLDERS = Path("/proc/self/fd")


def user_path(text: str) -> Path:
    """`text` as a path; the shell leaves the ~ of --workdir=~/runs as it is.

    Raises:
      ConfigError: it begins with the home folder of a user that there is not.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{text}: the home folder {Path(text).parts[0]} is not known; write the whole path"
        ) from None


def library_path(folder: Path) -> Path:
    """A path to the same folder that Orbax, TensorStore and TFDS take literally.

    The file system takes any name, these libraries do not. A folder whose path they would read
    otherwise is opened, and named as a folder that this process holds open.

    Args:
      folder: exists.

    Raises:
      ConfigError: its path has such a character, and the system cannot name open folders.
    """
    real = folder.resolve()
    if _LITERAL.fullmatch(str(real)) and not any(p.endswith(".__lock") for p in real.parts):
        return real
    if not _OPEN_FOLDERS.is_dir():
        raise ConfigError(
            f"{real}: must be a path of letters, digits, spaces and . / + = , ~ : - _ on this system"
        )
    status = os.stat(real)
    return _OPEN_FOLDERS / str(_opened(real, status.st_dev, status.st_ino))


@functools.cache
def _opened(folder: Path, device: int, inode: int) -> int:
    # Open until the process ends: a checkpoint may be written, or records read, at any time.
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def check_folder(output: Path, new: bool = False) -> None:
    """Refuses what no folder can be made of, before time goes into what is to be written there.

    Args:
      output: need not exist.
      new: must not hold anything yet.

    Raises:
      ConfigError: it is a file or below one, or holds something.
    """
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--output={output}: {path} is a file; name a folder")
    if new and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output={output}: holds something already; name a new folder")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Makes the folder; `written` then reports what cannot be written into it.

    Raises:
      ConfigError: the system's reason.
    """
    with written(f"--output={output}", ConfigError):
        output.mkdir(parents=True, exist_ok=True)
        yield


@contextlib.contextmanager
def written(name: object, error: type[CnnJaxError]) -> Iterator[None]:
    """Turns the system's refusal of what is written inside into one line.

    Args:
      name: of the file or folder, as the line names it.
      error: the class that is raised.
    """
    try:
        yield
    except OSError as refusal:
        reason = refusal.strerror or refusal
        raise error(f"{name}: cannot be written: {reason}") from refusal
