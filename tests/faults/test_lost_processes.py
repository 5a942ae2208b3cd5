"""One of four processes is killed again and again: nothing is lost. ./launch.sh test --faults."""

import re
import signal
import time

import numpy as np
import pytest

from cnn_jax.train.checkpoint import Checkpoints
from tests.faults import runs
from tests.faults.runs import differences, finish, start_several

pytestmark = pytest.mark.faults
PROCESSES = 4
EXPERIMENT = '''"""LeNet, with a checkpoint after every second step."""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import LeNet


def config() -> Config:
    return Config(LeNet(), DataConfig("tiny_squares"), epochs=8, batch_size=16, eval_batch_size=24,
                  checkpoint_every_steps=2, heartbeat_seconds=5, log_every_steps=5)
'''


@pytest.fixture(scope="session")
def flags(tmp_path_factory, tfds_dir):
    path = tmp_path_factory.mktemp("experiment") / "lenet.py"
    path.write_text(EXPERIMENT)
    return "train", f"--experiment={path}", f"--data_dir={tfds_dir}"


@pytest.fixture(scope="session")
def undisturbed(flags, tmp_path_factory):
    """The workdir of a whole run of four processes."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    for process in start_several(*[(*flags, f"--workdir={workdir}")] * PROCESSES):
        code, _, errors = finish(process)
        assert code == 0, errors
    return workdir


@pytest.mark.parametrize("chain", range(4))
def test_a_random_worker_is_killed_at_a_random_moment(chain, undisturbed, flags, tmp_path, tally):
    """The others end and name it; the same commands go on, to the bits of an undisturbed run."""
    random = np.random.default_rng(chain)
    last = Checkpoints(undisturbed).steps()[-1]
    killed = reached = begun = survived = 0
    try:
        while True:
            workdir = tmp_path / str(begun)
            group = start_several(*[(*flags, f"--workdir={workdir}")] * PROCESSES)
            lost, at_step = int(random.integers(PROCESSES)), random.random() < 0.6
            moment = time.monotonic() + random.uniform(0, 10)
            step = min(reached + random.integers(1, last + 1), last)

            def due(workdir=workdir, at_step=at_step, moment=moment, step=step):
                return runs.has_saved(workdir, step)() if at_step else time.monotonic() > moment

            if killed < 5:
                runs.signal_when(due, group[lost], signal.SIGKILL)
            results = [finish(process) for process in group]
            if {code for code, _, _ in results} == {0}:
                assert differences(workdir, undisturbed) == []
                if killed == 5:
                    break
                begun, reached = begun + 1, 0
                continue
            killed += 1
            others = [result for i, result in enumerate(results) if i != lost]
            for code, _, errors in others:
                assert code in (1, 2), errors
                line = errors.splitlines()[-1]
                assert re.match(rf"error: (process {lost} of the 4 |--coordinator)", line), errors
            newest = Checkpoints(workdir).newest()
            assert (newest.step if newest else 0) >= reached
            reached, survived = newest.step if newest else 0, survived + 1
    finally:
        tally.add("SIGKILL of one of four processes", killed, survived)
