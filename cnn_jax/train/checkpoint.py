"""The format of checkpoints in a workdir, and how they are read and verified.

checkpoints/STEP/ holds these Orbax items:
  variables  the model's params, other collections (batch_stats), and eval_params if they differ
  training   the rest of the TrainState: step, opt_state, rng, sums
  manifest   shape, dtype and SHA-256 of every array above, the run's notes, and its own SHA-256

Orbax restores a flipped byte without a word and may read a missing file as zeros. The manifest
holds the sums of the arrays in memory, and one rename makes both visible. So a restore gives the saved
arrays, or refuses.

Orbax writes the arrays. This file reads them with TensorStore, which Orbax uses too. Orbax's own
restore of a damaged file prints tracebacks from its threads, and makes several processes wait for
each other.

The folder may also hold damaged-STEP, set aside by a run that resumed from an earlier step, and
unfinished saves or deletions of a killed run. The next run deletes the unfinished ones.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from cnn_jax.common.errors import CheckpointError
from cnn_jax.common.files import library_path
from cnn_jax.train.bucket_run import copy_of, shown
from cnn_jax.train.workdir import metrics

log = logging.getLogger(__name__)

STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)
TRAINING = ("step", "opt_state", "rng", "sums")
Arrays = dict[str, np.ndarray]


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is incomplete, or differs from what was saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
      step: its training step.
      arrays: name ("params/Conv_0/kernel") to NumPy array.
      notes: the JSON that the run saved with it.
    """

    step: int
    arrays: Arrays
    notes: dict


class Checkpoints:
    """Reads and verifies the checkpoints of a workdir; `checkpoint_writer` writes them."""

    def __init__(self, workdir: Path):
        """`workdir`/checkpoints need not exist."""
        self.workdir = Path(workdir).resolve()
        self.folder = self.workdir / "checkpoints"
        self.copy = copy_of(self.workdir)
        self.place = f"{shown(self.workdir)}/checkpoints"

    def steps(self) -> list[int]:
        """The steps that have a file or folder, ascending; it may be damaged."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if STEP.fullmatch(p.name))

    def read(self, step: int, training: bool = True, verify: bool = True) -> Restored:
        """The arrays and notes of one checkpoint.

        Args:
          step: its training step.
          training: False omits the arrays that only training needs.
          verify: compares every array with its SHA-256 sum.

        Raises:
          DamagedCheckpoint: it differs from what was saved; names the first problem.
        """
        folder = self.folder / str(step)
        if self.copy:
            self.copy.fetch(step, "" if training else "variables/")
        try:
            manifest = self.manifest(step)
            notes = manifest["notes"]
            if manifest["step"] != step:
                raise ValueError(f"its manifest is that of step {manifest['step']}")
            expected = manifest["arrays"]
            given = library_path(folder)
            full = [name for name, about in expected.items() if 0 not in about["shape"]]
            arrays = _read(given / "variables", filter(is_variable, full))
            if training:
                arrays |= _read(given / "training", itertools.filterfalse(is_variable, full))
                empty = {name: about for name, about in expected.items() if name not in full}
                arrays |= {n: np.zeros(a["shape"], a["dtype"]) for n, a in empty.items()}
            for name, array in arrays.items():
                if verify and describe(array) != expected[name]:
                    raise ValueError(f"{name} differs from its checksum")
        except Exception as error:  # TensorStore and damaged JSON raise many types
            raise DamagedCheckpoint(f"{self.place}/{step}: damaged ({reason_of(error)})") from error
        return Restored(step, arrays, notes)

    def manifest(self, step: int) -> dict:
        if self.copy:
            self.copy.fetch(step, "manifest/")
        manifest = json.loads((self.folder / str(step) / "manifest" / "metadata").read_bytes())
        if manifest.get("sha256") != sum_of_manifest(manifest):
            raise ValueError("its manifest differs from its own checksum")
        return manifest

    def newest(self, training: bool = True, verify: bool = True) -> Restored | None:
        """The newest valid checkpoint, None if there are none; warns of damaged ones, skips them.

        Raises:
          CheckpointError: all checkpoints are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step, training, verify)
            except DamagedCheckpoint as error:
                log.warning("warning: skipped %s", error)
        if steps:
            raise CheckpointError(
                f"{self.place}: none of its {len(steps)} checkpoints is valid; nothing was changed"
            )
        return None

    def select(
        self,
        which: str,
        training: bool = False,
        verify: bool = True,
        flag: str = "--checkpoint=",
    ) -> Restored:
        """The checkpoint that a flag names.

        Args:
          which: "latest", "best" (by validation accuracy) or a step.
          training: as in `read`.
          verify: as in `read`.
          flag: for the error: what stands before `which`.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        steps = self.steps()
        newest = self.newest(training, verify) if which == "latest" else None
        if not steps or (which == "latest" and newest is None):
            raise CheckpointError(f"{self.place}: holds no checkpoint")
        if newest:
            return newest
        if which == "best":
            best = self.best()
            if best is None:
                raise CheckpointError(
                    f"{flag}best: no checkpoint in {self.place} has a validation accuracy; "
                    "choose latest, or train with --set data.validation_examples=N"
                )
            return self.read(best, training, verify)
        if which not in map(str, steps):
            raise CheckpointError(
                f"{flag}{which}: must be latest, best or a step in {self.place}: "
                + ", ".join(map(str, steps))
            )
        return self.read(int(which), training, verify)

    def best(self) -> int | None:
        """The step with the highest validation accuracy in metrics.jsonl; the first in a tie."""
        steps = set(self.steps())
        scores = {
            line["step"]: line["validation_accuracy"]
            for line in metrics(self.workdir)
            if line["step"] in steps and isinstance(line.get("validation_accuracy"), float)
        }
        return max(scores, key=scores.__getitem__) if scores else None


def verify(workdir: Path) -> int:
    """Checks all checkpoints of a workdir, prints the results; 0, or 4 if one is damaged."""
    if not workdir.is_dir():
        raise CheckpointError(f"workdir={workdir}: no such folder")
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.place}: holds no checkpoint")
    valid = []
    for step in steps:
        try:
            restored = checkpoints.read(step)
        except DamagedCheckpoint as error:
            print(f"step {step:>8}  {str(error).partition(': ')[2]}")
            continue
        valid.append(step)
        size = sum(array.nbytes for array in restored.arrays.values())
        print(f"step {step:>8}  valid, {len(restored.arrays)} arrays, {size / 1e6:.1f} MB")
    newest = f"training and evaluation go on from step {valid[-1]}" if valid else "none is valid"
    print(f"{len(valid)} of {len(steps)} checkpoints are valid; {newest}")
    return 0 if len(valid) == len(steps) else CheckpointError.exit_code


def names(state: Any) -> dict[str, Any]:
    """The leaves of a TrainState by name, as in "opt_state/0/mu/Conv_0/kernel".

    Names in model_state begin with their collection, as in "batch_stats/BatchNorm_0/mean".
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name.removeprefix("model_state/"): leaf for name, leaf in named.items()}


def fill(template: Any, restored: Restored) -> Any:
    """`template` with its leaves replaced by the restored arrays of the same names.

    Args:
      template: a TrainState, or variables such as {"params": ..., "batch_stats": ...}, of arrays or
        shapes.
      restored: the checkpoint.

    Raises:
      CheckpointError: names, shapes or types differ; lists them. Nothing is cast or omitted.
    """
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in names(template).items()}
    tops = {name.split("/")[0] for name in wanted}
    found = {
        name: (array.shape, str(array.dtype))
        for name, array in restored.arrays.items()
        if is_variable(name) or name.split("/")[0] in tops
    }
    lines = [
        f"{name}: {_shown(found.get(name))} saved, {_shown(wanted.get(name))} expected"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise CheckpointError(
            f"checkpoint {restored.step} does not fit the model: {'; '.join(lines[:5])}{more}"
        )
    leaves = [restored.arrays[name] for name in names(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _shown(kind: tuple | None) -> str:
    return f"{kind[1]}{list(kind[0])}" if kind else "nothing"


def _read(folder: Path, names: Iterable[str]) -> Arrays:
    """Arrays of an Orbax item by name: zarr arrays in one OCDBT database."""
    context = tensorstore.Context()  # a new cache: the files may have changed
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}

    def opened(name: str) -> tensorstore.Future:
        place = database | {"path": name.replace("/", ".") + "/"}
        return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, context=context)

    opening = {name: opened(name) for name in names}
    reading = {name: future.result().read() for name, future in opening.items()}
    return {name: np.asarray(future.result()) for name, future in reading.items()}


def is_variable(name: str) -> bool:
    return name.split("/")[0] not in TRAINING


def reason_of(error: Exception) -> str:
    """The message of an Orbax or TensorStore error, shortened to fit in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
        return os.strerror(int(number[1]))
    text = " ".join(str(error).partition(" [tensorstore_spec=")[0].split())
    return text[:300] or type(error).__name__


def describe(array: np.ndarray) -> dict:
    digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


def sum_of_manifest(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
