"""The check of an accelerator runs whole on a CPU, and outlives the failure of a part."""

import json
import math
import sys

import numpy as np
import pytest

from cnn_jax import main
from cnn_jax.studies.benchmark.contenders import Contender
from cnn_jax.studies.benchmark.figures import OURS, OURS_BF16, TORCH_BF16
from cnn_jax.studies.device_check import agreement, parts, run, speed, table

CPU = {"platform": "cpu", "kind": "cpu", "devices": 1, "jax": "1.2"}


@pytest.mark.faults
def test_it_runs_whole_with_a_tiny_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert run.check(tmp_path, tiny=True) == 0
    report = json.loads((tmp_path / "device_check.json").read_text())["parts"]
    assert list(report) == list(run.LIMITS)
    highest, default = report["agreement"]["findings"]
    assert highest["network"] == "lenet"
    assert highest["gradient"] == highest["loss"] == 0  # the CPU against itself
    assert default["precision"] == "default"
    assert report["equal_bits"]["findings"][0]["exit_code"] == -9
    assert report["equal_bits"]["findings"][1]["kill_and_resume"]
    assert report["speed"]["findings"][0]["rates"][OURS] > 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown[1:-1]] == list(report)
    assert "| lenet " in (tmp_path / "device_check.md").read_text()


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    script = tmp_path / "part"
    script.write_text(
        "#!/bin/sh\n"
        f"[ $2 = -m ] || {{ echo '{json.dumps(CPU)}'; exit; }}\n"
        'echo \'{"summary": "half"}\' >> $5\n'
        "case $4 in agreement) echo lost >&2; kill -SEGV $$;; speed) exec sleep 60;; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(run, "LIMITS", {"agreement": 0.6, "speed": 0.6, "speedrun": 9})
    assert run.check(tmp_path, tiny=True) == 1
    report = json.loads((tmp_path / "device_check.json").read_text())["parts"]
    assert [part["status"] for part in report.values()] == [
        "failed with exit code -11",
        "stopped after 1 s",  # its own seconds, and those that the first one left
        "passed",
    ]
    assert report["speed"]["findings"] == [{"summary": "half"}]
    shown = capsys.readouterr().out
    assert 'agreement: failed with exit code -11 in 0 s. half. its log ends with "lost"\n' in shown


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--networks=alexnet"], "--networks=alexnet: must be among mlp, conv_stack"),
        (["--tiny", "--write"], "--write: must not be given with --tiny"),
        ([], "--device_check: JAX finds no GPU or TPU here; add --tiny"),
    ],
)
def test_what_it_refuses(tmp_path, monkeypatch, caplog, flags, expected):
    monkeypatch.setattr(run, "_DEVICE", f"print({json.dumps(json.dumps(CPU))})")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert main.main(["benchmark", "--device_check", f"--output={tmp_path}", *flags]) == 2
    assert expected in caplog.messages[-1]


def test_a_driver_that_fails_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run, "_DEVICE", "raise RuntimeError('CUDA_ERROR_NO_DEVICE')")
    assert main.main(["benchmark", "--device_check", f"--output={tmp_path}"]) == 2
    assert caplog.messages[-1].endswith("JAX cannot start: RuntimeError: CUDA_ERROR_NO_DEVICE")


def test_the_difference_is_relative_to_the_reference():
    assert agreement.difference(np.float32([3.0, 5.0]), np.float32([3.0, 4.0])) == 0.2


def test_networks_that_fail_or_differ_are_counted(monkeypatch):
    """Also one that gives no number, which is no agreement."""
    off = [("a", 0.0), ("b", math.nan), ("c", 0.5), ("d", "RuntimeError: full"), ("e", 1e-4)]
    found = [
        (name, "highest", value if isinstance(value, str) else {"loss": value})
        for name, value in off
    ]
    monkeypatch.setattr(agreement, "_differences", lambda networks: iter(found))
    kept = []
    assert not agreement.agreement("abcde", lambda **finding: kept.append(finding))
    assert [finding.get("good") for finding in kept] == [True, False, False, None, True]
    assert kept[3]["error"] == "RuntimeError: full"
    assert (
        "2 of 5 agree with the CPU; largest difference: highest precision inf" in kept[4]["summary"]
    )


def test_a_network_that_raises_is_a_finding():
    (ours, precision, error), *_ = agreement._differences(["alexnet"])
    assert (ours, precision, error) == ("alexnet", "highest", "KeyError: 'alexnet'")


def part_of(folder, ends=math.inf):
    return parts.Part(folder / "part.jsonl", ends, True, ["lenet"], None)


def test_a_finding_that_is_not_a_number_stays_json(tmp_path):
    part_of(tmp_path).found(loss=math.nan, gradient=math.inf, good=False, count=3)
    line = (tmp_path / "part.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "loss": "nan",
        "gradient": "inf",
        "good": False,
        "count": 3,
    }


def test_the_speedrun_begins_no_run_that_the_time_does_not_allow(tmp_path, monkeypatch):
    clock = iter([100.0, 104.0, 104.0, 104.0, 108.0, 108.0, 109.0])
    monkeypatch.setattr(parts.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(parts.environment, "check_devices", lambda: None)
    one = {"seed": 1, "test_accuracy": 0.94, "seconds": 3.0}
    monkeypatch.setattr(parts.speedrun, "runs", lambda *_: iter([one] * 20))
    assert part_of(tmp_path, ends=112.0 + parts.MARGIN).speedrun()
    lines = (tmp_path / "part.jsonl").read_text().splitlines()
    assert len(lines) == 2  # 4 s each; 3 s were left after the second
    assert "(n = 2)" in lines[-1]


def speeds(monkeypatch, answers, seconds_left):
    """The findings of `speed` on two networks where `measure` answers so."""
    found, asked = [], []
    left = iter(seconds_left)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: "torch")

    def measure(network, batch, names, seconds):
        asked.append((network, batch, tuple(names)))
        return answers.pop(0)

    monkeypatch.setattr(speed, "measure", measure)
    good = speed.speed(["a", "b"], False, lambda **f: found.append(f), lambda: next(left))
    return good, found, asked


def test_rows_are_measured_while_there_is_time(monkeypatch):
    good, found, asked = speeds(
        monkeypatch,
        [({OURS: 1000.0}, {}), ({OURS: 2000.0}, {"torch bf16": "lost"})],
        [80, 50, 50, 20, 20],
    )
    assert good
    assert [row[:2] for row in asked] == [("a", 1024), ("b", 1024)]  # a third may take 30 s
    assert found[1]["errors"] == {"torch bf16": "lost"}
    assert found[1]["summary"].startswith(
        "2 of 4 rows; the last, b at batch 1024, images/s: cnn_jax 2,0"
    )


def test_ours_must_be_measured_and_pytorch_without_cuda_is_asked_once(monkeypatch):
    good, _, asked = speeds(
        monkeypatch,
        [({}, {OURS: "full", TORCH_BF16: "PyTorch finds no GPU for CUDA"})]
        + [({OURS: 1.0}, {})] * 3,
        [50] * 10,
    )
    assert not good
    both = (OURS, OURS_BF16)
    assert [row[2] for row in asked] == [(*both, speed.TORCH, TORCH_BF16), both, both, both]


@pytest.mark.parametrize(
    ("ours", "theirs", "measured"),
    [("gpu", "cuda", True), ("gpu", "cpu", False), ("cpu", "cpu", True), (None, "cpu", False)],
)
def test_pytorch_on_the_cpu_is_not_compared_with_an_accelerator(
    monkeypatch, ours, theirs, measured
):
    class Fake:
        def __init__(self, name, *_):
            device = ours if name == OURS else theirs
            if device is None:
                raise RuntimeError("full")
            self.about, self.rates = {"device": device}, {}

        def measure(self, mode, seconds, batch):
            self.rates.setdefault(mode, []).append(10.0)

        def stop(self):
            return self

    monkeypatch.setattr(speed, "Contender", Fake)
    rates, errors = speed.measure("lenet", 8, [OURS, TORCH_BF16], 0.1)
    assert (TORCH_BF16 in rates) == measured == (TORCH_BF16 not in errors)
    assert (OURS in rates) == (ours is not None)


def test_a_worker_that_hangs_is_killed_and_one_that_tells_much_is_read():
    hangs = [sys.executable, "-c", "import sys; print('so far', file=sys.stderr); sys.stdin.read()"]
    with pytest.raises(RuntimeError, match="x ended with exit code -9: so far"):
        Contender("x", hangs, patience=1.0)
    tells = "import sys; sys.stderr.write('x' * 300_000); print('{}', flush=True); sys.stdin.read()"
    contender = Contender("y", [sys.executable, "-c", tells])
    assert contender.about == {}
    contender.about = {"compile_seconds": 0, "parameters": 0, "version": ""}
    contender.stop()


def test_the_tables():
    findings = {
        "agreement": [
            {"network": "lenet", "precision": "highest", "loss": 1e-7, "gradient": "nan"},
            {"network": "mlp", "precision": "default", "error": "RuntimeError: full"},
        ],
        "speed": [
            {"network": "lenet", "batch": 1024, "rates": {OURS: 3000.0, speed.TORCH: 2000.0}},
            {"network": "mlp", "batch": 1024, "rates": {OURS: 10.0}, "summary": "2 rows"},
        ],
    }
    report = {
        "date": "2026-01-01",
        "device": CPU,
        "parts": {
            name: {"status": "passed", "seconds": 1.4, "findings": found}
            for name, found in findings.items()
        },
    }
    lines = [line.replace(" ", "") for line in table.render(report).splitlines()]
    assert "|speed|passed|1|2rows|" in lines
    assert "|lenet|1.0e-07|nan|-|-|" in lines
    assert "|lenet|1,024|3,000|2,000|**1.50**|" in lines
    assert "|mlp|1,024|10|-|-|" in lines
    assert lines[-1] == "-agreement:mlpdefault:RuntimeError:full"
