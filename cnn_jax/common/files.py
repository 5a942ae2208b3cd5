"""Folders: checks of output folders, and paths for the storage libraries."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cnn_jax.common.errors import CnnJaxError, ConfigError

# The characters that Orbax, TensorStore and TFDS take literally in a path. They read * ? [ ] as a
# pattern and a backslash as a separator, refuse a component that ends in .__lock, need valid UTF-8.
_LITERAL = re.compile(r"[\w ./+=,~:-]*")
# Not /proc/self: the processes that decode images open files below these paths too.
_OPEN_FOLDERS = Path("/proc", str(os.getpid()), "fd")
# Files of Windows and macOS in folders and archives.
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx"}


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left by a system beside images."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def printable(path: str) -> str:
    """`path` as text that can be printed: Linux allows any bytes in a name."""
    return os.fsencode(path).decode(errors="backslashreplace")


def user_path(text: str) -> Path:
    """`text` as a path, with ~ expanded: the shell does not expand it in --workdir=~/runs.

    Raises:
      ConfigError: it begins with ~ or ~user, and that home folder is not known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{text}: the home folder {Path(text).parts[0]} is not known; write the whole path"
        ) from None


def local_path(text: str) -> Path:
    """`user_path`, for what is read from and written to a file system only.

    Raises:
      ConfigError: it is a URL, or as `user_path`.
    """
    if "://" in text:
        raise ConfigError(
            f"{text}: must be a folder of this machine or a mounted one; URLs are not read"
        )
    return user_path(text)


def library_path(folder: Path) -> Path:
    """A path to `folder` that Orbax, TensorStore and TFDS take literally.

    The file system accepts any name, but these libraries do not. If they would misread the path,
    the folder is opened, and its path is that of the open file descriptor.

    Args:
      folder: must exist.

    Raises:
      ConfigError: its path has such a character, and the system cannot name open folders.
    """
    real = folder.resolve()
    if _LITERAL.fullmatch(str(real)) and not any(p.endswith(".__lock") for p in real.parts):
        return real
    if not _OPEN_FOLDERS.is_dir():
        raise ConfigError(
            f"{real}: on this system, a path must consist of letters, digits, spaces and "
            ". / + = , ~ : - _"
        )
    status = os.stat(real)
    return _OPEN_FOLDERS / str(_opened(real, status.st_dev, status.st_ino))


@functools.cache
def _opened(folder: Path, device: int, inode: int) -> int:
    # Stays open until the process ends: it may write a checkpoint or read records at any time.
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def check_folder(output: Path, new: bool = False) -> None:
    """Checks that `output` can be an output folder, before the work whose results go there.

    Args:
      output: need not exist.
      new: the folder must be empty or absent.

    Raises:
      ConfigError: it is a file, is below a file, or must be new and is not empty.
    """
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--output={output}: {path} is a file; name a folder")
    if new and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output={output}: must be a new or an empty folder; name another one")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Creates the folder; inside the context, an OSError becomes an error of one line.

    Raises:
      ConfigError: the folder, or a file in it, cannot be written.
    """
    with written(f"--output={output}", ConfigError):
        output.mkdir(parents=True, exist_ok=True)
        yield


@contextlib.contextmanager
def written(name: object, error: type[CnnJaxError]) -> Iterator[None]:
    """Turns an OSError of the code inside the context into an error of one line.

    Args:
      name: of the file or folder, for the message.
      error: the class of the error.
    """
    try:
        yield
    except OSError as refusal:
        reason = refusal.strerror or refusal
        raise error(f"{name}: cannot be written: {reason}") from refusal
