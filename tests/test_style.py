import subprocess
import sys

import pytest

from tests.tiny import REPOSITORY


def passes(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    """Its settings are in .ruff.toml."""
    passes("ruff", *command, "--no-cache", "--quiet", ".")


def test_mypy():
    """Its settings are in setup.cfg. It takes seconds when .mypy_cache has the results of before."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    passes("mypy", "--no-error-summary")
