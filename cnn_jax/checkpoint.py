"""Checkpoints that prove themselves. The only file that says orbax.

checkpoints/STEP/ holds, as Orbax items:
  variables  the model's params and batch_stats
  training   the rest of the TrainState: step, opt_state, rng, sums
  manifest   shape, dtype and SHA-256 of every array above, what the run noted, and its own SHA-256

Orbax restores a flipped byte without a word and may read a missing file as zeros. The manifest
holds the sums of the arrays as they were in memory, and becomes visible with them in one rename:
what is restored is what was saved, or it is refused.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from cnn_jax import parallel
from cnn_jax.errors import CheckpointError
from cnn_jax.step import TrainState

log = logging.getLogger(__name__)

VARIABLES = ("params", "batch_stats")
Arrays = dict[str, np.ndarray]


class DamagedCheckpoint(CheckpointError):
    """One checkpoint is incomplete or holds other bytes than were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
      step: its training step.
      arrays: name ("params/Conv_0/kernel") to NumPy array.
      notes: what the run noted with it.
    """

    step: int
    arrays: Arrays
    notes: dict


class Checkpoints:
    """The checkpoints of a workdir, written in the background, read with proof."""

    def __init__(self, workdir: Path, keep: int = 1):
        """Args:
        workdir: of the run; checkpoints/ need not exist.
        keep: how many of the latest `save` leaves, besides the best.
        """
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._keep = keep
        self._writer: ocp.AsyncCheckpointer | None = None
        self._saving: int | None = None

    # ------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps for which there is a folder, ascending; what is in it is not looked at."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir())

    def read(self, step: int, training: bool = True, verify: bool = True) -> Restored:
        """The arrays and notes of one checkpoint.

        Args:
          step: which.
          training: False leaves out what evaluation does not need.
          verify: compares every array with its SHA-256 sum.

        Raises:
          DamagedCheckpoint: it is not what was saved; names what is wrong first.
        """
        folder = self.folder / str(step)
        items = {"variables": ocp.args.StandardRestore(), "manifest": ocp.args.JsonRestore()}
        if training:
            items["training"] = ocp.args.StandardRestore()
        try:
            manifest = _read(folder, {"manifest": items.pop("manifest")})["manifest"]
            if manifest["sha256"] != _sum_of_manifest(manifest) or manifest["step"] != step:
                raise ValueError("its manifest does not match its own checksum")
            arrays = {}
            for tree in _read(folder, items).values():
                arrays |= _flatten(tree)
        except Exception as error:  # Orbax raises ValueError, JSONDecodeError, bare Exception, ...
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DamagedCheckpoint(f"{folder}: damaged ({reason})") from error
        expected = {
            name: about
            for name, about in manifest["arrays"].items()
            if training or name.startswith(VARIABLES)
        }
        for name in sorted(expected.keys() | arrays.keys()):
            if name not in arrays or name not in expected:
                raise DamagedCheckpoint(f"{folder}: damaged ({name} is missing or was added)")
            if verify and _describe(arrays[name]) != expected[name]:
                raise DamagedCheckpoint(f"{folder}: damaged ({name} differs from its checksum)")
        return Restored(step, arrays, manifest["notes"])

    def newest(self, training: bool = True, verify: bool = True) -> Restored | None:
        """The newest valid checkpoint; damaged ones are named and skipped. None: there are none.

        Raises:
          CheckpointError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step, training, verify)
            except DamagedCheckpoint as error:
                log.warning("warning: skipped %s", error)
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of its {len(steps)} checkpoints is valid; nothing was changed"
            )
        return None

    def select(self, which: str, training: bool = False, verify: bool = True) -> Restored:
        """The checkpoint that --checkpoint names.

        Args:
          which: "latest", "best" (by validation accuracy) or a step.
          training: as in `read`.
          verify: as in `read`.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        if which == "latest":
            return self.newest(training, verify)
        if which == "best":
            scores = self._scores()
            if not scores:
                raise CheckpointError(
                    f"--checkpoint=best: {self.folder} has no validation accuracy to choose by; "
                    "train with --set data.validation_examples=N"
                )
            return self.read(max(scores, key=scores.get), training, verify)
        if not which.isdigit() or int(which) not in steps:
            raise CheckpointError(
                f"--checkpoint={which}: {self.folder} has latest, best or "
                + ", ".join(map(str, steps))
            )
        return self.read(int(which), training, verify)

    # ------------------------------------------------------------------------------- writing

    def start_writing(self, resume_at: int | None) -> None:
        """Clears away what a dead run left: half-written saves, and damaged later checkpoints.

        Damaged ones are kept as damaged-STEP, out of the way of the steps to be saved again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name.startswith(".deleting-"):
                shutil.rmtree(path, ignore_errors=True)
        for step in self.steps():
            if step > (-1 if resume_at is None else resume_at):
                target = self.folder / f"damaged-{step}"
                shutil.rmtree(target, ignore_errors=True)
                os.rename(self.folder / str(step), target)

    def save(self, state: TrainState, notes: dict) -> None:
        """Starts to save `state`; returns when its arrays are copied, before they are written.

        Args:
          state: replicated over all devices and processes.
          notes: plain JSON, handed back by `read`; "validation_accuracy" makes it a candidate for
            best.

        Raises:
          CheckpointError: this or the save before it could not be written.
        """
        self.wait()
        arrays = {name: np.array(value) for name, value in names(parallel.to_host(state)).items()}
        step = int(arrays["step"])
        manifest = {
            "step": step,
            "notes": notes,
            "arrays": {name: _describe(array) for name, array in arrays.items()},
        }
        manifest["sha256"] = _sum_of_manifest(manifest)
        variables = {name: a for name, a in arrays.items() if name.startswith(VARIABLES)}
        training = {name: a for name, a in arrays.items() if name not in variables}
        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saving = step
        try:
            self._writer.save(
                self.folder / str(step),
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(_nest(variables)),
                    training=ocp.args.StandardSave(_nest(training)),
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits for the save under way, then deletes what is no longer kept.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._writer is None or self._saving is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None
        if parallel.is_main_process():
            self._prune()

    def close(self) -> None:
        """Waits for the save under way and ends the background threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _failed(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        failed, self._saving = self._saving, None
        return CheckpointError(f"{self.folder / str(failed)}: could not be written: {reason}")

    def _prune(self) -> None:
        steps, scores = self.steps(), self._scores()
        kept = {*steps[-self._keep :], *([max(scores, key=scores.get)] if scores else [])}
        for step in set(steps) - kept:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = self.folder / f".deleting-{step}"
            os.rename(self.folder / str(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _scores(self) -> dict[int, float]:
        """Validation accuracy by step, of the checkpoints that have one."""
        scores = {}
        for step in self.steps():
            try:
                items = {"manifest": ocp.args.JsonRestore()}
                notes = _read(self.folder / str(step), items)["manifest"]["notes"]
            except Exception:  # a damaged one is no candidate
                continue
            if notes.get("validation_accuracy") is not None:
                scores[step] = notes["validation_accuracy"]
        return scores


def verify(workdir: Path) -> int:
    """Checks every checkpoint of a workdir, prints what each is worth; 0, or 4 if one is damaged."""
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.folder}: holds no checkpoint")
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
    """The leaves of a TrainState by name, as in "opt_state/0/mu/Conv_0/kernel"."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fill(template: Any, restored: Restored) -> Any:
    """`template` with its leaves replaced by the restored arrays of the same names.

    Args:
      template: a TrainState, or a part of one such as {"params": ..., "batch_stats": ...}, of arrays
        or shapes.
      restored: the checkpoint.

    Raises:
      CheckpointError: names, shapes or types differ; lists how. Nothing is cast or left out.
    """
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in names(template).items()}
    tops = {name.split("/")[0] for name in wanted} | set(VARIABLES)
    found = {
        name: (array.shape, str(array.dtype))
        for name, array in restored.arrays.items()
        if name.split("/")[0] in tops
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


def _read(folder: Path, items: dict) -> dict[str, Any]:
    with warnings.catch_warnings(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        warnings.simplefilter("ignore")  # it recommends to give shardings; these are NumPy arrays
        return dict(reader.restore(folder, args=ocp.args.Composite(**items)).items())


def _nest(arrays: Arrays) -> dict:
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _flatten(tree: dict) -> Arrays:
    return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def _describe(array: np.ndarray) -> dict:
    digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


def _sum_of_manifest(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
