"""benchmark --device_check: what only an accelerator can show, in eight minutes at most.

Each part runs in its own process with a time limit. A part that fails, crashes its driver or runs
out of time does not stop the others; what it found until then is kept. This process itself opens no
device, so that each part has the whole memory.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cnn_jax.common.errors import WorkdirError
from cnn_jax.common.files import written
from cnn_jax.studies.benchmark.contenders import REPOSITORY
from cnn_jax.train.workdir import prepare, write_json

# Part -> seconds it may take: 475 together.
LIMITS = {
    "agreement": 100,
    "equal_bits": 60,
    "speedrun": 100,
    "speed": 120,
    "resident": 45,
    "seeds": 50,
}


def check(output: Path, tiny: bool, data_dir: str | None) -> int:
    """Runs all parts, prints a line for each, and writes device_check.json after each.

    Args:
      output: the folder for it, and for what each part printed, PART.log.
      tiny: LeNet alone, a few steps and the embedded dataset: this tries the script itself.
      data_dir: where TFDS prepared CIFAR-10.

    Returns:
      0, or 1 if a part failed or ran out of time.

    Raises:
      WorkdirError: the folder cannot be written.
    """
    prepare(output)
    report = {}
    for part, limit in LIMITS.items():
        report[part] = found = _run(part, limit, output, tiny, data_dir)
        with written(f"output={output}", WorkdirError):
            write_json(output / "device_check.json", report)
        text = found["findings"][-1].get("summary", "") if found["findings"] else ""
        print(f"{part}: {found['status']} in {found['seconds']:.0f} s. {text}".strip(), flush=True)
    print(f"written to {output / 'device_check.json'}")
    return int(any(found["status"] != "passed" for found in report.values()))


def _run(part: str, limit: float, output: Path, tiny: bool, data_dir: str | None) -> dict:
    """Status, seconds and findings of one part."""
    findings = output / f"{part}.jsonl"
    findings.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "cnn_jax.studies.benchmark.device_parts"]
    command += [part, str(findings.absolute()), "tiny" if tiny else "whole", data_dir or ""]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.monotonic()
    with (
        (output / f"{part}.log").open("w") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the part that this process is gone
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a limit ends the processes that the part started, too
        ) as process,
    ):
        try:
            code = process.wait(limit)
            status = f"failed with exit code {code}" if code else "passed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = findings.read_text().splitlines() if findings.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    return {"status": status, "seconds": time.monotonic() - began, "findings": found}
