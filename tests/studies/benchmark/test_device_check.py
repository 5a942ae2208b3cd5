"""The check of an accelerator runs whole on a CPU, and outlives the failure of a part."""

import json
import sys

import numpy as np
import pytest

from cnn_jax.studies.benchmark import device_check, device_parts


@pytest.mark.faults
def test_it_runs_whole_with_a_tiny_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert device_check.check(tmp_path, tiny=True, data_dir=None) == 0
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert list(report) == list(device_check.LIMITS)
    first = report["agreement"]["findings"][0]
    assert first["network"] == "lenet"
    assert first["gradient"] == first["loss"] == 0  # the CPU against itself
    assert report["equal_bits"]["findings"][0]["exit_code"] == -9
    assert report["equal_bits"]["findings"][1]["kill_and_resume"]
    assert report["speed"]["findings"][0]["rate"] > 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown[:-1]] == list(report)


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    script = tmp_path / "part"
    script.write_text(
        "#!/bin/sh\n"
        'echo \'{"summary": "half"}\' >> $5\n'
        "case $4 in agreement) kill -SEGV $$;; speed) sleep 60;; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(device_check, "LIMITS", {"agreement": 9, "speed": 0.5, "speedrun": 9})
    assert device_check.check(tmp_path, tiny=True, data_dir=None) == 1
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert [part["status"] for part in report.values()] == [
        "failed with exit code -11",
        "stopped after 0.5 s",
        "passed",
    ]
    assert report["speed"]["findings"] == [{"summary": "half"}]


def test_the_difference_is_relative_to_the_reference():
    assert device_parts.difference(np.float32([3.0, 5.0]), np.float32([3.0, 4.0])) == 0.2
