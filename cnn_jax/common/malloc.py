"""Memory that is freed after one training step is kept for the next."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed() -> None:
    """Tells glibc's allocator to give nothing back to the kernel before the process ends.

    A step's activations are hundreds of megabytes. By default glibc unmaps them after each step, and
    in the next the kernel clears and maps them anew, page by page: a fifth of the processor's time.
    Images/s in training with this over without, batch 32, interleaved, on two Zen 4 cores: conv_stack
    1.5, fully_conv 1.4, max_pool 1.35, same_padding 1.2, others within the noise; on two cores of an
    Intel Xeon (model 167, AVX-512): fully_conv 1.2, same_padding 1.15, cifar 1.0.

    Only glibc's allocator is told, and not where MALLOC_... or GLIBC_TUNABLES have tuned it. A block
    that fits no heap of a thread's own (64 MB) is still mapped for that thread alone, and unmapped.
    One heap for all threads (glibc.malloc.arena_max=1) keeps those too: at batch 2000 the speedrun's
    images/s are 1.1 to 1.6 times as many then, in twice the memory, but LeNet's at batch 32 0.75.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
