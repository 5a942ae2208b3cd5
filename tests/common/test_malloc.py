"""Memory freed by the process is its own for good: counted by the kernel, in a process of its own."""

import ctypes
import os
import subprocess
import sys

import pytest

from cnn_jax.studies.subprocesses import PACKAGE

# 64 MiB are written, freed, and written again; printed is how many pages the kernel had to supply.
TWICE = """
import ctypes, resource
from cnn_jax.common import malloc as memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def write():
    block = libc.malloc(2**26)
    libc.memset(block, 1, 2**26)
    libc.free(block)

memory.keep_freed()
write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# The same of a program of JAX, whose product of 77 MB is a temporary.
COMPUTED = """
import resource
import jax, jax.numpy as jnp
from cnn_jax.common import malloc as memory

memory.keep_freed()
memory.compute_in_calling_thread()
x = jnp.ones((4400, 8))
compute = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)
counts = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    compute(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))  # of the first calls, some still make the heap larger
"""


def pages(script: str = TWICE, **tuning: str) -> int:
    names = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env | {"PYTHONPATH": str(PACKAGE.parent)} | tuning,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc's allocator is tuned"
)


@needs_glibc
def test_freed_memory_is_used_again_without_the_kernel():
    assert pages() < 16


@needs_glibc
def test_a_program_computes_in_the_memory_of_the_call_before():
    assert pages(COMPUTED) < 4400**2 * 4 / 2**12 / 10  # a tenth of the temporary's pages


@needs_glibc
@pytest.mark.parametrize(
    "tuning",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
    ids=["MALLOC_", "GLIBC_TUNABLES"],
)
def test_an_allocator_tuned_by_the_user_is_left_alone(tuning):
    assert pages(**tuning) >= 16  # 32 huge pages at the least


def test_another_allocator_is_left_alone(monkeypatch):
    from cnn_jax.common import malloc

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    malloc.keep_freed()
