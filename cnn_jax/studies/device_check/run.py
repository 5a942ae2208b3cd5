"""benchmark --device_check: what only an accelerator can show, in eight minutes at most.

Each part runs in its own process with a time limit. A part that fails, crashes its driver or runs
out of time does not stop the others; what it found until then is kept. This process itself opens no
device, so that each part has the whole memory.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cnn_jax.common.errors import ConfigError, WorkdirError
from cnn_jax.common.files import written
from cnn_jax.config.experiment import RESULTS
from cnn_jax.studies import markdown
from cnn_jax.studies.benchmark.contenders import REPOSITORY
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.studies.device_check import table
from cnn_jax.train.workdir import prepare, write_json, write_text

# Part -> seconds it may take, 475 together. What it leaves, the next one may take too; the first one
# has those less that were needed to ask for the device.
LIMITS = {
    "agreement": 80,
    "equal_bits": 80,
    "speedrun": 100,
    "speed": 130,
    "resident": 40,
    "seeds": 45,
}
_ASKING = 60
_DEVICE = """
import json, jax
found = jax.devices()
about = {"platform": found[0].platform, "kind": found[0].device_kind, "devices": len(found)}
print(json.dumps(about | {"jax": jax.__version__}))
"""


def check(
    output: Path,
    tiny: bool = False,
    data_dir: str | None = None,
    networks: Sequence[str] = (),
    write: bool = False,
) -> int:
    """Runs all parts, prints a line for each, and writes device_check.json and .md after each.

    Args:
      output: the folder for them, and for what each part printed, PART.log.
      tiny: LeNet alone, a few steps and the embedded dataset: this tries the script itself.
      data_dir: where TFDS prepared CIFAR-10.
      networks: of the parts agreement and speed; all by default.
      write: puts the tables into RESULTS.md, and the JSON among the records.

    Returns:
      0, or 1 if a part failed or ran out of time.

    Raises:
      ConfigError: there is no accelerator, or an unknown network is named.
      WorkdirError: the folder cannot be written.
    """
    chosen = _networks(networks, tiny, write)
    began = time.monotonic()
    device = _device(tiny)
    prepare(output)
    report: dict = {"date": f"{datetime.date.today()}", "device": device, "parts": {}}
    print("{kind} ({platform}), {devices} of them, jax {jax}".format(**device), flush=True)
    spare = began - time.monotonic()
    for part, limit in LIMITS.items():
        allowed = limit + spare
        arguments = ["tiny" if tiny else "whole", ",".join(chosen), data_dir or ""]
        report["parts"][part] = found = _run(part, allowed, output, arguments)
        spare = max(0.0, allowed - found["seconds"])
        with written(f"output={output}", WorkdirError):
            write_json(output / "device_check.json", report)
            write_text(output / "device_check.md", table.render(report))
        print(f"{part}: {table.line(found)}", flush=True)
    print(f"written to {output / 'device_check.json'} and device_check.md")
    if write:
        _write(report)
    return int(any(found["status"] != "passed" for found in report["parts"].values()))


def _networks(networks: Sequence[str], tiny: bool, write: bool) -> list[str]:
    if tiny and write:
        raise ConfigError("--write: must not be given with --tiny, which measures nothing of use")
    for name in networks:
        if name not in NETWORKS:
            raise ConfigError(f"--networks={name}: must be among {', '.join(NETWORKS)}")
    return list(networks) or (["lenet"] if tiny else list(NETWORKS))


def _device(tiny: bool) -> dict:
    """Platform, kind and number of JAX's devices, and its version, found by another process."""
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _DEVICE], capture_output=True, text=True, timeout=_ASKING
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"--device_check: JAX has found no device after {_ASKING} s") from None
    if asked.returncode:
        last = asked.stderr.strip().splitlines()[-1:] or [f"exit code {asked.returncode}"]
        raise ConfigError(f"--device_check: JAX cannot start: {last[0]}")
    device = json.loads(asked.stdout.splitlines()[-1])
    if device["platform"] == "cpu" and not tiny and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise ConfigError(
            "--device_check: JAX finds no GPU or TPU here; add --tiny to try the check itself, or set "
            "JAX_PLATFORMS=cpu to run all of it on the CPU"
        )
    return device


def _run(part: str, limit: float, output: Path, arguments: list[str]) -> dict:
    """Status, seconds and findings of one part."""
    findings, logged = output / f"{part}.jsonl", output / f"{part}.log"
    findings.unlink(missing_ok=True)
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "cnn_jax.studies.device_check.parts", part]
    command += [str(findings.absolute()), str(began + limit), *arguments]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (
        logged.open("w") as log,
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
            status = f"stopped after {limit:.0f} s"
        finally:
            _end(process)
    lines = findings.read_text().splitlines() if findings.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    result = {"status": status, "seconds": time.monotonic() - began, "findings": found}
    if status != "passed" and not any("error" in finding for finding in found):
        result["log"] = logged.read_text(errors="replace").strip().splitlines()[-1:]
    return result


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a part: itself, and what it started, which may outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _write(report: dict) -> None:
    kind = report["device"]["kind"]
    path = RESULTS / "records" / "device_check" / f"{kind.replace(' ', '_')}.json"
    with written(path, WorkdirError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    markdown.put_section(RESULTS / "RESULTS.md", f"device_check {kind}", table.render(report))
    print(f"written to {RESULTS / 'RESULTS.md'} and {path}")
