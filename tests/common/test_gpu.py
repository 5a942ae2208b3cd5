"""A GPU that nvidia-smi shows and JAX does not use is told of, with the reason."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cnn_jax.common import gpu

USED = "from cnn_jax.train import parallel; print(parallel.make_mesh().size)"


@pytest.fixture
def tell(tmp_path: Path):
    """Calls tell_unused in a process of its own in which nvidia-smi prints these words."""

    def tell(smi: str = "echo 'NVIDIA H100, 580.65.06'", code: str = USED, **environment) -> str:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{smi}\n")
        path.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | environment
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return tell


def test_a_gpu_without_cuda_is_told_of_in_one_line(tell):
    (line,) = tell().splitlines()
    assert line.startswith("warning: nvidia-smi shows NVIDIA H100 (driver 580.65.06), but JAX ")
    assert "JAX is installed without CUDA; ./launch.sh setup adds it" in line


@pytest.mark.parametrize(
    ("smi", "environment"),
    [
        ("echo 'NVIDIA H100, 580.65.06'", {"JAX_PLATFORMS": "cpu"}),
        ("echo 'NVIDIA H100, 580.65.06'", {"CUDA_VISIBLE_DEVICES": ""}),
        ("echo 'NVIDIA H100, 580.65.06'", {"CUDA_VISIBLE_DEVICES": "-1"}),
        ("echo 'No devices were found'; exit 6", {}),
        ("exit 0", {}),
    ],
)
def test_nothing_is_told_where_the_cpu_is_chosen_or_there_is_no_gpu(tell, smi, environment):
    assert tell(smi, **environment) == ""


@pytest.mark.parametrize(
    ("there", "error", "reason"),
    [
        (False, None, "{file} does not exist; a container must be started with its GPUs"),
        (True, "Backend 'cuda' failed to initialize:\n no\ncard.", "failed to initialize: no card"),
        (True, None, "JAX prefers the CPU"),
    ],
)
def test_reasons_with_cuda_installed(tmp_path, monkeypatch, there, error, reason):
    file = tmp_path / "nvidia0"
    if there:
        file.touch()

    def devices(backend):
        assert backend == "cuda"
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(gpu, "DEVICE_FILES", (str(file),))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(jax, "devices", devices)
    assert gpu._reason().endswith(reason.format(file=file))
