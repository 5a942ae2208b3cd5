"""Runs tasks as jobs of SLURM, through submitit, and waits for them.

Submitit writes the batch files, submits them as one array, and queues a job again before its time
limit.
Whether a job has ended is asked of squeue: submitit asks sacct, which many clusters have not set up.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cnn_jax.common import extras
from cnn_jax.common.errors import ConfigError, Preempted, WorkdirError
from cnn_jax.common.files import written
from cnn_jax.studies.subprocesses import PACKAGE, CommandFailed, Processes
from cnn_jax.studies.task import Failure, Task
from cnn_jax.train.workdir import write_json

log = logging.getLogger(__name__)

# The signal before the time limit, at which a training run saves and ends.
_SIGNAL, _SECONDS_TO_SAVE = "USR1", 120
_MOST_TIMEOUTS = 100  # then a job is not queued again
_LONGEST_PAUSE = 10.0  # seconds between two questions to SLURM
_OWN = {"array", "error", "job-name", "nodes", "ntasks", "open-mode", "output", "requeue", "signal"}
_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a job asks for.

    Attributes:
      text: as given.
      partition: None for the cluster's default.
      time: the limit, in minutes.
      gpus: for each job; None for none.
      cpus: for each job; None for the cluster's default.
      others: more options of sbatch, by name.
    """

    text: str = ""
    partition: str | None = None
    time: int = 240
    gpus: int | None = None
    cpus: int | None = None
    others: dict[str, str | bool] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Options":
        """Reads "partition=gpu time=120 gpus=1 cpus=8 exclude=n1,n2 exclusive".

        Raises:
          ConfigError: an option is invalid.
        """
        found: dict[str, str | bool] = {}
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--slurm={text}: {error}") from None
        for word in words:
            name, equals, value = word.lstrip("-").partition("=")
            if name in _OWN:
                raise ConfigError(f"--slurm={word}: cannot be set, as this command sets it itself")
            needs_value = equals or name in ("partition", "time", "gpus", "cpus")
            if not re.fullmatch(r"[a-z][a-z-]+", name) or (needs_value and not value):
                raise ConfigError(
                    f"--slurm={word}: must be option=value, separated by spaces, with sbatch's long "
                    "names; time is in minutes, gpus and cpus are numbers"
                )
            if name in found:
                raise ConfigError(f"--slurm={word}: {name} is given twice")
            found[name] = value if equals else True
        numbers = {}
        for name in {"time", "gpus", "cpus"} & found.keys():
            given = found.pop(name)
            if not re.fullmatch("[1-9][0-9]*", str(given), re.ASCII):
                unit = "minutes" if name == "time" else "a number"
                raise ConfigError(f"--slurm={name}={given}: must be {unit}, at least 1")
            numbers[name] = int(given)
        partition = str(found.pop("partition")) if "partition" in found else None
        return cls(text, partition, **numbers, others=found)


def run(
    tasks: Sequence[Task], folder: Path, options: Options, most: int | None
) -> Iterator[tuple[Task, Failure | None]]:
    """Submits the tasks that are not in SLURM's queue yet, waits for all, and logs how far they are.

    Args:
      tasks: their works and arguments are pickled.
      folder: for the jobs' files and logs; all nodes must have it mounted.
      options: of each job.
      most: how many run at once; None for as many as SLURM starts.

    Yields:
      Each task when its job has ended, with the reason and the log if it failed.

    Raises:
      ConfigError: submitit or SLURM's programs are missing, or sbatch refuses the options.
      Preempted: a signal asked to stop; the jobs go on, and the same call waits for them again.
    """
    extras.need("submitit", "--launcher=slurm", "slurm")
    for program in _PROGRAMS:
        if not shutil.which(program):
            raise ConfigError(
                f"--launcher=slurm: this machine has no {program}; start the command where SLURM's "
                "commands are"
            )
    if not tasks:
        return
    folder = folder.resolve()
    with written(folder, WorkdirError):
        folder.mkdir(parents=True, exist_ok=True)
    with Processes() as processes:
        jobs = _known(tasks, folder)
        if new := [task for task in tasks if task not in jobs]:
            jobs |= _submit(new, folder, options, most)
            with written(folder, WorkdirError):
                write_json(folder / "jobs.json", {_key(task): jobs[task] for task in jobs})
        try:
            yield from _wait(jobs, folder, processes.pause)
        except Preempted as error:
            numbers = " ".join(sorted({job.partition("_")[0] for job in jobs.values()}))
            raise Preempted(
                "stopped waiting; the jobs go on. The same command waits for them again and collects "
                f"what they found; scancel {numbers} ends them",
                error.exit_code,
            ) from None


def _key(task: Task) -> str:
    """Is another for another task: the name of its file, too."""
    return hashlib.sha256(repr((task.name, task.arguments)).encode()).hexdigest()[:16]


def _known(tasks: Sequence[Task], folder: Path) -> dict[Task, str]:
    """The tasks that an earlier call submitted, with the numbers of their jobs, if these go on."""
    try:
        noted = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    queued = _queued()
    if queued is None:
        raise ConfigError("--launcher=slurm: squeue does not answer; try again later")
    jobs = {task: noted[_key(task)] for task in tasks if noted.get(_key(task)) in queued}
    for task, job in jobs.items():
        log.info("%s: is job %s already", task.label, job)
    return jobs


def _submit(
    tasks: Sequence[Task], folder: Path, options: Options, most: int | None
) -> dict[Task, str]:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = _SIGNAL  # read at the import
    import submitit

    for task in tasks:
        (folder / f"{_key(task)}.json").unlink(missing_ok=True)
    cpus = [f"--cpus-per-task={options.cpus}"] if options.cpus else []
    executor = submitit.SlurmExecutor(folder, max_num_timeout=_MOST_TIMEOUTS)
    executor.update_parameters(
        job_name="cnn_jax",
        partition=options.partition,
        time=options.time,
        gpus_per_node=options.gpus,
        cpus_per_task=options.cpus,
        srun_args=cpus,  # since 22.05, a step does not take it from its job
        signal_delay_s=_SECONDS_TO_SAVE,
        array_parallelism=most or len(tasks),
        stderr_to_stdout=True,
        setup=[
            f"export SUBMITIT_PREEMPT_SIGNAL={_SIGNAL}",
            f"export PYTHONPATH={shlex.quote(str(PACKAGE.parent))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
        additional_parameters={"requeue": True, **options.others},
    )
    try:
        # Submitit prints what sbatch prints, which the error below has too.
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(Job(task, folder / f"{_key(task)}.json")) for task in tasks]
    except submitit.core.utils.FailedJobError as error:  # what sbatch printed
        reason = "; ".join(re.sub("sbatch: (error: )?", "", str(error)).splitlines())
        raise ConfigError(f"--slurm={options.text}: sbatch refuses it ({reason})") from None
    log.info(
        "%d job%s submitted, as %s", len(jobs), "s" * (len(jobs) > 1), jobs[0].job_id.split("_")[0]
    )
    return {task: job.job_id for task, job in zip(tasks, jobs, strict=True)}


class Job:
    """What runs in a job: a task. Its outcome is a file, which the waiting command reads."""

    def __init__(self, task: Task, outcome: Path):
        self._task, self._outcome = task, outcome
        self._processes: Processes | None = None  # in the job; it cannot be pickled

    def __call__(self) -> None:
        # Without handlers of signals: submitit has installed its own. The commands get the signals too.
        processes = self._processes = Processes()
        try:
            failure = self._task.fails(processes.run)
        except Preempted as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from error
        code = failure.exit_code if failure else 0
        write_json(self._outcome, {"exit_code": code, "problem": str(failure or "")})
        if code:
            print(f"error: {failure}", file=sys.stderr)
            raise SystemExit(code)  # so that SLURM shows the job as failed

    def checkpoint(self) -> object:
        """Is called by submitit's handler of the signal, before it queues the job again."""
        import submitit

        if self._processes:
            self._processes.wait()  # its command saves
        return submitit.helpers.DelayedSubmission(Job(self._task, self._outcome))


def _queued() -> dict[str, str] | None:
    """The state of each job of the user that has not ended; None if SLURM does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        return None
    rows = (line.split("|", 2) for line in answer.stdout.splitlines())
    return {
        job: state.lower() + (f" ({reason})" if state == "PENDING" else "")
        for job, state, reason in rows
    }


def _wait(
    jobs: dict[Task, str], folder: Path, pause: Callable[[float], None]
) -> Iterator[tuple[Task, Failure | None]]:
    """Yields the tasks as their jobs end; logs how many are in which state when that changes."""
    left, absent, shown, began = dict(jobs), set(), "", time.monotonic()
    while left:
        queued = _queued()
        for task, job in list(left.items()):
            outcome = folder / f"{_key(task)}.json"
            if outcome.exists() or (queued is not None and job not in queued and task in absent):
                del left[task]
                yield task, _failure(outcome, folder / f"{job}_0_log.out")
            elif queued is not None and job not in queued:
                absent.add(task)  # the file may come a moment later than the job ends
            else:
                absent.discard(task)
        states = collections.Counter((queued or {}).get(job, "ending") for job in left.values())
        now = ", ".join(f"{count} {state}" for state, count in states.items())
        if left and now != shown:
            log.info("%d of %d jobs ended; %s", len(jobs) - len(left), len(jobs), now)
        shown = now
        if left:
            pause(min(_LONGEST_PAUSE, 1 + (time.monotonic() - began) / 20))


def _failure(outcome: Path, printed: Path) -> Failure | None:
    try:
        found = json.loads(outcome.read_text(encoding="utf-8"))
        code, problem = found["exit_code"], found["problem"]
    except (OSError, ValueError):
        code, problem = 1, _last_error(printed)
    return CommandFailed(f"{problem}; its log is {printed}", code) if code else None


def _last_error(printed: Path) -> str:
    """What a log says of a job that could not write its outcome."""
    try:
        lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "the job has ended without a log"
    # SLURM's own daemon knows best: a cancelled job, the time limit, the memory.
    found = [line for line in lines if line.startswith("slurmstepd") and "error: " in line]
    found = found or [line for line in lines if "error: " in line]
    return found[-1].rpartition("error: ")[2].strip("* ") if found else "the job was ended"
