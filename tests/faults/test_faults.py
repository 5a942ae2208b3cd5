"""Faults by the dozen, for real: started by ./launch.sh test --faults, which adds them up."""

import json
import resource
import shutil
import signal
import time

import numpy as np
import pytest

from cnn_jax.train.checkpoint import Checkpoints, DamagedCheckpoint
from tests.faults import runs
from tests.faults.runs import differences, finish, signal_when, start

pytestmark = pytest.mark.faults


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(runs.EXPERIMENT)
    return path


@pytest.fixture(scope="session")
def flags(experiment, tfds_dir):
    return "train", f"--experiment={experiment}", f"--data_dir={tfds_dir}"


@pytest.fixture(scope="session")
def undisturbed(flags, tmp_path_factory):
    """The workdir of a whole run, and the seconds it takes when its programs are compiled."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    for name in ("first", "second"):
        began = time.monotonic()
        code, _, errors = finish(start(*flags, f"--workdir={workdir / name}"), 900)
        assert code == 0, errors
        seconds = time.monotonic() - began
    assert differences(workdir / "first", workdir / "second") == []
    return workdir / "first", seconds


def disturbances(chain, count, undisturbed, flags, tmp_path, number):
    """Runs that get signal `number`, each resumed by the next, until `count` were hit.

    A third is hit at a random moment of the first half of a run's time, which is mostly start-up, a
    third after a random step, a third while a checkpoint is written. A run that ends first is
    compared, and another begins.

    Yields:
      workdir, exit code, standard error.
    """
    whole, seconds = undisturbed
    last = Checkpoints(whole).steps()[-1]
    random = np.random.default_rng(chain)
    hits, begun = 0, 0
    while hits < count:
        workdir = tmp_path / f"run{begun}"
        reached = max(Checkpoints(workdir).steps(), default=0)
        kind = random.choice(["moment", "step", "save"])
        moment = random.uniform(0, seconds / 2) + time.monotonic()
        step = min(reached + random.integers(1, last), last)
        saves = random.integers(1, 6)
        seen = set()

        def hit(workdir=workdir, kind=kind, moment=moment, step=step, saves=saves, seen=seen):
            if kind == "moment":
                return time.monotonic() > moment
            if kind == "step":
                return runs.has_saved(workdir, step)()
            seen.update((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
            return len(seen) >= saves

        process = start(*flags, f"--workdir={workdir}")
        signal_when(hit, process, number)
        code, _, errors = finish(process, 900)
        if code == 0:
            assert differences(workdir, whole) == []
            begun += 1
            continue
        hits += 1
        yield workdir, code, errors
    code, _, errors = finish(start(*flags, f"--workdir={workdir}"), 900)
    assert code == 0, errors
    assert differences(workdir, whole) == []
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {str(step) for step in Checkpoints(workdir).steps()}


@pytest.mark.parametrize("chain", range(5))
def test_killed_at_random_moments(chain, undisturbed, flags, tmp_path, tally):
    """SIGKILL: what was complete stays, and the run ends bit for bit as an undisturbed one."""
    tried, reached = 0, {}
    try:
        for workdir, code, errors in disturbances(
            chain, 10, undisturbed, flags, tmp_path, signal.SIGKILL
        ):
            tried += 1
            assert code == -signal.SIGKILL, errors
            newest = Checkpoints(workdir).newest()
            step = newest.step if newest else 0
            assert step >= reached.get(workdir, 0)
            reached[workdir] = step
    except AssertionError:
        tally.add("SIGKILL", tried, tried - 1)
        raise
    tally.add("SIGKILL", tried, tried)


@pytest.mark.parametrize("chain", range(4))
def test_asked_to_end_at_random_moments(chain, undisturbed, flags, tmp_path, tally):
    """SIGTERM: the run saves and ends by itself; before it can, it just ends."""
    tried = 0
    try:
        hits = disturbances(100 + chain, 5, undisturbed, flags, tmp_path, signal.SIGTERM)
        for _, code, errors in hits:
            tried += 1
            assert code in (143, -signal.SIGTERM), errors
            assert "Traceback" not in errors
    except AssertionError:
        tally.add("SIGTERM", tried, tried - 1)
        raise
    tally.add("SIGTERM", tried, tried)


def test_flipped_bytes(undisturbed, tmp_path, tally):
    """One byte of one file: refused, or the arrays are those that were saved."""
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.steps()[-1]
    saved = {name: a.tobytes() for name, a in checkpoints.read(step).arrays.items()}
    paths = [p for p in (checkpoints.folder / str(step)).rglob("*") if p.is_file()]
    paths = sorted(path for path in paths if path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in paths])
    random = np.random.default_rng(0)
    detected = harmless = 0
    for i in range(100):  # in turn: all files equally likely, all bytes equally likely
        path = paths[random.choice(len(paths), p=None if i % 2 else sizes / sizes.sum())]
        data = path.read_bytes()
        changed = bytearray(data)
        changed[random.integers(len(data))] ^= random.integers(1, 256)
        path.write_bytes(changed)
        try:
            arrays = checkpoints.read(step).arrays
            harmless += {name: array.tobytes() for name, array in arrays.items()} == saved
        except DamagedCheckpoint:
            detected += 1
        path.write_bytes(data)
    tally.add(f"flipped byte ({detected} detected, {harmless} harmless)", 100, detected + harmless)
    assert detected + harmless == 100
    assert detected > 40


@pytest.mark.parametrize("chain", range(2))
def test_the_disk_is_full(chain, undisturbed, flags, tmp_path, tally):
    """From a random step on no file may grow beyond a random size; afterwards the run goes on."""
    random = np.random.default_rng(chain)
    survived = 0
    for attempt in range(5):
        workdir = tmp_path / f"run{attempt}"
        process = start(*flags, f"--workdir={workdir}")
        runs.wait_until(runs.has_saved(workdir, int(random.integers(1, 60))), process)
        size = int(random.integers(0, 1200))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        code, _, errors = finish(process, 900)
        good = code == 4 and "Traceback" not in errors
        good &= len([x for x in errors.splitlines() if x.startswith("error: ")]) == 1
        good &= Checkpoints(workdir).newest() is not None
        again, _, _ = finish(start(*flags, f"--workdir={workdir}"), 900)
        good &= again == 0 and differences(workdir, undisturbed[0]) == []
        survived += good
    tally.add("disk full", 5, survived)
    assert survived == 5


BROKEN = """
import functools
import dataclasses
import jax
import jax.numpy as jnp
import optax

def breaks(learning_rate, at):
    def update(updates, count, params=None):
        factor = jnp.where(count == at, jnp.nan, -1e-3)
        return jax.tree.map(lambda g: g * factor, updates), count + 1
    return optax.GradientTransformation(lambda params: jnp.int32(0), update)

small = config

def config():
    return dataclasses.replace(small(), optimizer=functools.partial(breaks, at={at}))
"""


@pytest.mark.parametrize("at", [0, 17, 50])
def test_not_finite(at, experiment, tfds_dir, tmp_path, tally):
    path = tmp_path / "broken.py"
    path.write_text(experiment.read_text() + BROKEN.format(at=at))
    workdir = tmp_path / "run"
    flags = f"--experiment={path}", f"--data_dir={tfds_dir}", f"--workdir={workdir}"
    code, _, errors = finish(start("train", *flags), 900)
    steps = Checkpoints(workdir).steps()
    finite = all(
        np.isfinite(array).all()
        for step in steps
        for array in Checkpoints(workdir).read(step).arrays.values()
    )
    dump = json.loads((workdir / "not_finite.json").read_text())
    good = code == 5 and finite and dump["step"] in (at, at + 1) and len(dump["indices"]) == 8
    good &= max(steps, default=0) == at - at % 2
    tally.add("not finite", 1, int(good))
    assert good, errors
