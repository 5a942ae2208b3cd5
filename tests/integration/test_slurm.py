"""experiments/clusters/train.sbatch, and sweep and reproduce with --launcher=slurm, on a real SLURM.

This file starts it, with two nodes on this host. Needs Debian's packages slurm-wlm and munge, and
submitit for --launcher. ./launch.sh test -mslurm; about five minutes.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cnn_jax.train import workdir as workdirs
from cnn_jax.train.checkpoint import Checkpoints
from tests.faults import runs
from tests.tiny import REPOSITORY

PROGRAMS = ("slurmctld", "slurmd", "munged")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed"),
]
SCRIPT = REPOSITORY / "experiments/clusters/train.sbatch"
# A job that is queued again waits for cred_expire.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2
"""


class Slurm:
    """A controller and two nodes, as processes of this one."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        probes = [socket.create_server(("", 0)) for _ in range(4)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        user, host = os.environ.get("USER") or "root", socket.gethostname().partition(".")[0]
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        text = CONFIGURATION.format(host=host, user=user, folder=folder, ports=ports)
        (folder / "slurm.conf").write_text(text)
        program = f"{sys.executable} -P -m cnn_jax.main"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "CNN_JAX": program,
            "PYTHONPATH": str(REPOSITORY),
            "XLA_FLAGS": "",
            # JAX would meet at the first node by its name, which the hosts file does not have.
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{ports[3]}",
        }

    def start(self) -> None:
        folder = self.folder
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self._start("munged", "-F", "--force", f"--socket={folder}/munge.socket", *files)
        self.wait(lambda: (folder / "munge.socket").exists())
        self._start("slurmctld", "-D")
        for node in ("n0", "n1"):
            self.start_node(node)
        self.wait(lambda: self("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"])

    def __call__(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        ).stdout

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "a") as log:
            self.daemons[command[-1]] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log
            )

    def start_node(self, node: str) -> None:
        (self.folder / f"spool_{node}").mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL for a node's daemon and the tasks of its steps, as if it lost power."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        own = f"SLURM_CONF={self.folder}/slurm.conf"
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                text = environ.read_bytes()
                # Another worker of pytest may have a SLURM of its own.
                if all(f"{word}\0".encode() in text for word in (f"SLURMD_NODENAME={node}", own)):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue

    def wait(self, condition, seconds: float = 150) -> None:
        give_up, pause = time.monotonic() + seconds, threading.Event()
        while not condition():
            assert time.monotonic() < give_up, self("squeue", "-a") + self("sinfo")
            pause.wait(0.1)

    def submit(self, *arguments: str) -> str:
        answer = self("sbatch", "--parsable", f"--output={self.folder}/%A_%a.out", *arguments)
        assert answer.strip().isdecimal(), answer
        return answer.strip()

    def state(self, job: str) -> set[str]:
        return set(re.findall(r"JobState=(\w+)", self("scontrol", "show", "job", job)))

    def finished(self, job: str, seconds: float = 240) -> str:
        """What a job has printed, once all of it is over."""
        running = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"}
        self.wait(lambda: not self.state(job) & running, seconds)
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{job}_*.out")))

    def stop(self) -> None:
        self("scancel", "--full", f"--user={os.environ.get('USER') or 'root'}")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(30)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tfds_dir):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(runs.EXPERIMENT)
    return [str(path), f"--data_dir={tfds_dir}", "--set=heartbeat_seconds=5"]


def train(slurm, flags, workdir, *options, epochs=2):
    experiment, *rest = flags
    return slurm.submit(
        *options, str(SCRIPT), experiment, str(workdir), *rest, f"--set=epochs={epochs}"
    )


def assert_complete(slurm, job, workdir, epochs, output):
    assert slurm.state(job) == {"COMPLETED"}, output
    assert [line["epoch"] for line in workdirs.metrics(workdir)] == [*range(1, epochs + 1)]
    assert "test accuracy" in output


def test_two_nodes_are_found_and_train_together(slurm, flags, tmp_path):
    job = train(slurm, flags, tmp_path / "run", "--nodes=2")
    output = slurm.finished(job)
    assert_complete(slurm, job, tmp_path / "run", 2, output)
    for process in range(2):
        assert (
            f"found SLURM job {job}: this is process {process} of 2, coordinator 127.0.0.1:"
            in output
        )
    assert output.count("2 processes, 1 local and 2 global devices (cpu)") == 1


def test_an_array_trains_a_run_for_each_seed(slurm, flags, tmp_path):
    job = train(slurm, flags, tmp_path / "runs", "--array=0-1")
    output = slurm.finished(job)
    for seed in range(2):
        workdir = tmp_path / f"runs/seed_{seed}"
        assert_complete(slurm, job, workdir, 2, output)
        assert json.loads((workdir / "config.json").read_text())["config"]["seed"] == seed
    assert "found SLURM" not in output


@pytest.mark.parametrize("how", ["signal", "preemption", "node"])
def test_a_job_that_is_disturbed_is_queued_again_and_goes_on(slurm, flags, tmp_path, how):
    workdir, epochs = tmp_path / "run", 40
    job = train(slurm, flags, workdir, "--nodes=2", epochs=epochs)
    slurm.wait(runs.has_saved(workdir, 6))
    if how == "signal":  # what --signal sends before the time limit
        slurm("scancel", "--signal=USR1", job)
    elif how == "preemption":
        other = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
        slurm.finished(other)
        assert slurm.state(other) == {"COMPLETED"}
    else:
        slurm.kill_node("n1")
        slurm.wait(lambda: slurm.state(job) != {"RUNNING"})
        slurm.start_node("n1")
    output = slurm.finished(job)
    assert_complete(slurm, job, workdir, epochs, output)
    assert re.search(r"resumed from step [1-9]", output)
    if how == "node":
        assert "error: process 1 of the 2 processes of this run has ended" in output
    else:
        assert "error: stopped by a signal after step" in output
        assert "and saved" in output
    assert Checkpoints(workdir).newest().step == 16 * epochs


# ------------------------------------------------------------------------- sweep and reproduce

submitit = pytest.mark.skipif(
    not importlib.util.find_spec("submitit"), reason="submitit: not installed"
)


@pytest.fixture
def start(slurm, flags):
    """Starts a command that hands its runs to SLURM, as a process of its own."""

    def start(command, *arguments, experiment=flags[0]):
        words = [command, *arguments, "--launcher=slurm", flags[1]]
        words += [f"--experiment={experiment}"] if command == "sweep" else []
        environment = slurm.environment | {"SUBMITIT_PREEMPT_SIGNAL": "USR2"}  # not the user's
        return runs.start(*words, **environment)

    return start


def jobs(slurm, folder):
    """The jobs of a study by the number that SLURM gave them, with their states."""
    noted = json.loads((folder / "slurm/jobs.json").read_text())
    return {job: slurm.state(job) for job in noted.values()}


@submitit
def test_a_sweep_waits_for_its_jobs_and_names_the_log_of_one_that_failed(slurm, start, tmp_path):
    options = "--set=batch_size=8,7000", "--seeds=1", "--slurm=time=10 cpus=1", "--set=epochs=1"
    code, output, errors = runs.finish(start("sweep", *options, f"--workdir={tmp_path}"))
    assert code == 2, errors
    report = json.loads((tmp_path / "sweep.json").read_text())
    good, bad = (setting["runs"][0] for setting in report["settings"])
    assert (good["problem"], good["last_epoch"]["epoch"]) == (None, 1)
    assert "batch_size=7000" in bad["problem"]
    log = Path(bad["problem"].rpartition("its log is ")[2])
    assert "batch_size=7000" in log.read_text()
    assert "best" in output
    assert re.search(r"\d of 2 jobs ended; \d (running|pending)", errors)
    # The same command again collects what there is, and submits only what is missing.
    code, _, errors = runs.finish(start("sweep", *options, f"--workdir={tmp_path}"))
    assert code == 2
    assert "1 job submitted" in errors


@submitit
def test_reproduce_records_what_its_jobs_trained(slurm, start, tmp_path):
    options = "--only=quickstart", "--seeds=1", f"--output={tmp_path}/out", "--parallel=1"
    code, _, errors = runs.finish(start("reproduce", *options, f"--workdir={tmp_path}"))
    assert code == 0, errors
    record = json.loads((tmp_path / "out/records/quickstart/seed_0/run.json").read_text())
    assert record["wall_seconds"] > 0
    assert "| quickstart" in (tmp_path / "out/RESULTS.md").read_text()


@submitit
@pytest.mark.parametrize("how", ["limit", "preemption", "interrupt"])
def test_a_sweep_that_is_disturbed_goes_on(slurm, start, tmp_path, how):
    epochs = 40
    folder = tmp_path / f"epochs={epochs}/seed_0"
    options = f"--set=epochs={epochs}", "--seeds=1", f"--workdir={tmp_path}"
    waiting = start("sweep", *options)
    slurm.wait(runs.has_saved(folder, 6))
    (job,) = jobs(slurm, tmp_path)
    if how == "limit":  # the signal that SLURM sends before the time limit
        slurm("scancel", "--signal=USR1", job)
    elif how == "preemption":
        other = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
        slurm.finished(other)
        assert slurm.state(other) == {"COMPLETED"}
    else:
        waiting.send_signal(signal.SIGINT)
        code, _, errors = runs.finish(waiting)
        assert code == 130
        assert f"scancel {job} ends them" in errors
        assert slurm.state(job) == {"RUNNING"}
        waiting = start("sweep", *options)
    code, _, errors = runs.finish(waiting)
    log = (tmp_path / f"slurm/{job}_0_log.out").read_text()
    assert code == 0, errors + log
    assert list(jobs(slurm, tmp_path)) == [job]
    assert ("resumed from step" in log) == (how != "interrupt"), log
    assert Checkpoints(folder).newest().step == 16 * epochs
    assert [line["epoch"] for line in workdirs.metrics(folder)] == [*range(1, epochs + 1)]


@submitit
def test_a_job_that_is_cancelled_is_told_with_its_log(slurm, start, tmp_path):
    waiting = start("sweep", "--set=epochs=400", "--seeds=1", f"--workdir={tmp_path}")
    slurm.wait(runs.has_saved(tmp_path / "epochs=400/seed_0", 2))
    (job,) = jobs(slurm, tmp_path)
    slurm("scancel", job)
    code, _, errors = runs.finish(waiting)
    assert code == 1
    told = rf"error: epochs=400, seed 0: .*CANCELLED.*; its log is \S+/{job}_0_log.out"
    assert re.search(told, errors)


@submitit
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("time=1:00", "--slurm=time=1:00: must be minutes, at least 1"),
        ("gpus=none", "--slurm=gpus=none: must be a number, at least 1"),
        ("array=0-3", "--slurm=array=0-3: cannot be set, as this command sets it itself"),
        ("partition=nowhere", "--slurm=partition=nowhere: sbatch refuses it (.*invalid partition"),
        ("colour=red", "--slurm=colour=red: sbatch refuses it (.*unrecognized option"),
    ],
)
def test_bad_options_are_one_line(slurm, start, tmp_path, options, line):
    process = start("sweep", "--seeds=1", f"--slurm={options}", f"--workdir={tmp_path}")
    code, output, errors = runs.finish(process)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert re.search(re.escape(line).replace(r"\.\*", ".*"), errors.splitlines()[-1]), errors
