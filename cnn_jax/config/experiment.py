"""Finds and loads experiment files: experiments/NAME.py, or the user's own file."""

import ast
import contextlib
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnn_jax import CHECKOUT, EXPERIMENTS, PROGRAM
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import user_path
from cnn_jax.config.overrides import override
from cnn_jax.config.paths import resolve
from cnn_jax.config.schema import Config, DataConfig
from cnn_jax.config.validate import validate
from cnn_jax.models import LeNet

FOLDER = EXPERIMENTS
# Where RESULTS.md and the records are written. They do not belong in an installed package.
RESULTS = FOLDER if CHECKOUT else Path("runs", "results")


def names() -> list[str]:
    """The experiments of the project, as --experiment takes them."""
    files = FOLDER.rglob("*.py")
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in files)


def title(name: str) -> str:
    """The first line of an experiment's docstring; its code is not run."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def short_name(experiment: str) -> str:
    """The name of its runs: the experiment's name, or a file's name without folder and .py."""
    return Path(experiment).stem if experiment.endswith(".py") else experiment


def find(experiment: str) -> Path:
    """The file of an experiment.

    Args:
      experiment: a name below experiments/ ("fashion_mnist/lenet"), or a path that ends in .py.

    Raises:
      ConfigError: there is none; lists the nearest names.
    """
    if experiment.endswith(".py"):
        path = user_path(experiment).absolute()
        if not path.is_file():
            raise ConfigError(f"--experiment={experiment}: no such file")
        return path
    known = names()
    if not re.fullmatch(r"\w+(/\w+)*", experiment) or experiment not in known:
        near = difflib.get_close_matches(experiment, known, n=3, cutoff=0.4)
        raise ConfigError(
            f"--experiment={experiment}: no such experiment; "
            f"{'nearest' if near else 'there are'}: {', '.join(near or known)} "
            f"({PROGRAM} list shows all; the path to a file of your own must end in .py)"
        )
    return FOLDER / f"{experiment}.py"


def load(experiment: str, assignments: Sequence[str] = ()) -> Config:
    """The checked configuration of an experiment, with --set's changes.

    Raises:
      ConfigError: there is no such experiment, its file fails or returns no Config, or a field is
        unknown or out of range.
    """
    path = find(experiment)
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None, "a name that ends in .py has a spec"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations as text here
    try:
        with _neighbours_importable(path):
            spec.loader.exec_module(module)
            config = module.config()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"--experiment={experiment}: {path.name} fails: {reason}") from error
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise ConfigError(f"--experiment={experiment}: config() returns {kind}, not a Config")
    return resolve(validate(override(config, assignments)))


def of_dataset(dataset: str, assignments: Sequence[str] = ()) -> Config:
    """The configuration of an experiment, or LeNet's on another dataset, with --set's changes.

    Args:
      dataset: as `find` takes it, or a `data.name`.
      assignments: as in `load`.

    Raises:
      ConfigError: as `load`.
    """
    if dataset in names() or dataset.endswith(".py"):
        return load(dataset, assignments)
    return resolve(validate(override(Config(LeNet(), DataConfig(dataset)), assignments)))


@contextlib.contextmanager
def _neighbours_importable(path: Path) -> Iterator[None]:
    """Lets the file import the files beside it; searched last, as one may be named jax.py."""
    before = list(sys.path)
    sys.path.append(str(path.parent))
    try:
        yield
    finally:
        sys.path[:] = before
