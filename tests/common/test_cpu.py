"""The processor's name is told wherever the program runs, and never more cores than it may use."""

import os
import subprocess
import sys

import pytest

from cnn_jax.common import cpu

SERVER = """processor : 0
model name\t: Example 9000
cpu family\t: 25
model\t\t: 17
flags\t\t: fpu avx2 avx512f

processor : 1
model name\t: Example 9000
flags\t\t: fpu avx2 avx512f
"""
BOARD = "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "_CPUINFO", path)
    monkeypatch.setattr(cpu, "cores", lambda: 2)
    monkeypatch.setattr(cpu.platform, "processor", lambda: "arm")
    return path


def test_a_linux_server_tells_name_family_and_sets(cpuinfo):
    cpuinfo.write_text(SERVER)
    words = "Example 9000 (family 25 model 17; AVX2, AVX-512), 2 cores"
    assert cpu.description() == words
    assert {"avx2", "avx512f"} <= cpu.features()


def test_a_board_without_a_name_and_a_mac_without_the_file_have_one_all_the_same(cpuinfo):
    assert cpu.description() == "arm, 2 cores"
    assert cpu.features() == set()
    assert cpu.identity()
    cpuinfo.write_text(BOARD)
    assert cpu.description() == "arm, 2 cores"
    assert "asimd" in cpu.features()


def test_programs_are_kept_apart_by_instruction_sets(cpuinfo):
    cpuinfo.write_text(SERVER)
    with_avx512 = cpu.identity()
    cpuinfo.write_text(SERVER.replace(" avx512f", ""))
    assert cpu.identity() != with_avx512


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind to cores")
def test_a_process_bound_to_one_core_says_one_core():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from cnn_jax.common import cpu; print(cpu.description())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.endswith(", 1 core\n")
