"""Checks, before the first step, that all processes of a run have the same program and data.

Each process computes a part of every sum. If one used another learning rate, code or data, no
error would occur, but the results would be wrong.
"""

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import cnn_jax
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.config.serialize import differences, to_json
from cnn_jax.data.splits import Splits
from cnn_jax.train import parallel, workdir
from cnn_jax.train.pretrained import Source


def check_program(config: Config) -> None:
    """Compares the configuration, the code and the versions of all processes.

    Raises:
      ConfigError: a process differs from process 0; names it and the differences.
    """
    if jax.process_count() == 1:
        return
    factory = getattr(config.optimizer, "func", config.optimizer)
    _compare(
        {
            "config": to_json(config),
            "code": {
                "cnn_jax": _sum_of_code(Path(cnn_jax.__file__).parent),
                "model": _sum_of_source(type(config.model)),
                "optimizer": _sum_of_source(factory),
            },
            "versions": workdir.machine()["versions"],
        }
    )


def check_data(splits: Splits, source: Source | None = None) -> None:
    """Compares what all processes have read.

    Of a split: its size, classes, pixels and labels of some examples. Of `source`: its SHA-256.

    Raises:
      ConfigError: as `check_program`.
    """
    if jax.process_count() == 1:
        return
    found = {}
    for name, examples in splits.by_name().items():
        fingerprint = dict(splits.fingerprints[name])
        fingerprint.pop("all", None)  # a process with less memory may not have it
        shape, names = list(examples.image_shape), list(examples.class_names)
        found[name] = {"image_shape": shape, "class_names": names, **fingerprint}
    mine = {"data": found, "data_files": splits.data_files}
    _compare({**mine, "init_from": source and dataclasses.asdict(source)})


def _compare(mine: dict[str, Any]) -> None:
    first, *others = parallel.gather(mine)
    lines = [
        f"process {process} differs from process 0 in {line}"
        for process, other in enumerate(others, 1)
        for line in differences(first, other)[:5]
    ]
    if lines:
        raise ConfigError(
            f"{'; '.join(lines)}; all processes of a run need the same flags, code, versions and data"
        )


def _sum_of_code(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _sum_of_source(what: Callable | type) -> str:
    """The hash of the source file that defines `what`, in an experiment or a library."""
    module = sys.modules.get(getattr(what, "__module__", ""))
    try:
        return hashlib.sha256(Path(inspect.getfile(module or what)).read_bytes()).hexdigest()[:12]
    except (TypeError, OSError):  # no file: defined in an interpreter
        return "unknown"
