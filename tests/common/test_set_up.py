"""What JAX is installed for, by what nvidia-smi prints; test_launch.py holds the rest."""

import pytest

from cnn_jax.common import set_up


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Makes an nvidia-smi that prints these two, a line for each GPU."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(driver: str, capability: str) -> None:
        lines = f"*=driver_version) echo '{driver}' ;; *=compute_cap) echo '{capability}' ;;"
        path = tmp_path / "nvidia-smi"
        path.write_text(f'#!/bin/sh\ncase "$1" in {lines} esac\n')
        path.chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("asked", "driver", "capability", "platform", "why"),
    [
        ("", "580.65.06", "9.0", "cuda13", "driver 580.65.06 is 580 or newer"),
        ("", "1000.1", "10.0", "cuda13", "driver 1000.1 is 580 or newer"),
        ("", "580.65.06", "12.0\n7.0", "cuda12", "compute capability 7.0 is below 7.5"),
        ("", "1000.1\n580.9", "9.0", "cuda13", "driver 580.9 is 580 or newer"),
        ("", "579.1", "9.0", "cuda12", "driver 579.1 is older than 580"),
        ("", "525.60.13", "Not a valid field", "cuda12", "older than 580"),
        ("", "470.82.01", "9.0", "cpu", "driver 470.82.01 is older than 525"),
        ("", "No devices were found", "", "cpu", "nvidia-smi finds no GPU"),
        ("", "", "", "cpu", "nvidia-smi finds no GPU"),
        ("cuda", "580.65.06", "9.0", "cuda13", "is 580 or newer"),
        ("cuda", "470.82.01", "9.0", "cuda12", "older than 580"),
        ("cuda", "", "", "cuda12", "nvidia-smi finds no GPU; more drivers run CUDA 12"),
        ("cuda12", "580.65.06", "9.0", "cuda12", "as CNN_JAX_PLATFORM says"),
        ("cuda13", "", "", "cuda13", "as CNN_JAX_PLATFORM says"),
        ("tpu", "580.65.06", "9.0", "tpu", "as CNN_JAX_PLATFORM says"),
        ("cpu", "580.65.06", "9.0", "cpu", "as CNN_JAX_PLATFORM says"),
    ],
)
def test_what_jax_is_installed_for(smi, asked, driver, capability, platform, why):
    smi(driver, capability)
    chosen, reason = set_up.choose_platform(asked)
    assert chosen == platform
    assert why in reason


@pytest.mark.parametrize(
    ("asked", "before", "platform"),
    [
        ("", "cpu", "cpu"),
        ("cuda", "cuda12", "cuda12"),
        ("cuda", "cpu", "cuda13"),
        ("tpu", "cpu", "tpu"),
        ("", "nonsense", "cuda13"),
    ],
)
def test_the_platform_before_stays_if_it_is_as_asked(smi, asked, before, platform):
    smi("580.65.06", "9.0")
    assert set_up.choose_platform(asked, before)[0] == platform


def test_a_tpu_is_taken_where_there_is_no_gpu(smi, monkeypatch):
    monkeypatch.setattr(set_up, "has_tpu", lambda: True)
    smi("", "")
    assert set_up.choose_platform("") == ("tpu", "there is a PCI device of Google's")
    smi("580.65.06", "9.0")
    assert set_up.choose_platform("")[0] == "cuda13"
