"""The loop of a contender's process. Standard library only: the peers run it in their own environment.

The parent writes a JSON line {"mode": ..., "seconds": ...}, and the worker answers with a JSON line
{"steps": ..., "seconds": ...}. All contenders of a network stay warm; each is measured in turn.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO


def serve(
    modes: dict[str, Callable[[int], None]], only: Sequence[str] = (), **about: object
) -> None:
    """Answers the parent until it closes standard input.

    Args:
      modes: for "train" and others, a function that runs a number of steps and waits for them.
      only: the modes that will be asked for; all by default.
      about: facts to report once, such as versions.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints must not mix with the answers
    compile_seconds = {}
    for mode in only or modes:
        run = modes[mode]
        began = time.perf_counter()
        run(1)
        compile_seconds[mode] = time.perf_counter() - began
        run(2)
    _answer(out, {**about, "compile_seconds": compile_seconds})
    for line in sys.stdin:
        asked = json.loads(line)
        run, steps, began = modes[asked["mode"]], 0, time.perf_counter()
        block = 1
        while (seconds := time.perf_counter() - began) < asked["seconds"]:
            run(block)
            steps += block
            # Wait for the device only every 0.1 s, so that the waits do not distort the time.
            block = max(1, int(0.1 * steps / max(time.perf_counter() - began, 1e-6)))
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _answer(out, {"steps": steps, "seconds": seconds, "peak_memory": peak})


def _answer(out: TextIO, value: dict) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()
