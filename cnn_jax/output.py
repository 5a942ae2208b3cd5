"""Folders that commands write into."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cnn_jax.errors import ConfigError


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
    """Makes the folder, and turns what then fails to be written into one line.

    Raises:
      ConfigError: the system's reason.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"--output={output}: cannot be written: {error.strerror}") from None
