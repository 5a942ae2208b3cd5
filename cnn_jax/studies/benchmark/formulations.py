"""./launch.sh benchmark --formulations: each convolution of the networks in every formulation.

Each pass of a convolution is a program of its own here, so the figures leave out what a formulation
costs or saves its neighbours in a training step. `benchmark` has to confirm a change of the rule.
"""

import datetime
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from cnn_jax import models
from cnn_jax.common import cpu
from cnn_jax.common.errors import WorkdirError
from cnn_jax.common.files import written
from cnn_jax.config.experiment import RESULTS
from cnn_jax.ops import conv
from cnn_jax.ops.formulations import FORMULATIONS, Geometry, applies
from cnn_jax.ops.rule import formulations_for
from cnn_jax.studies import markdown
from cnn_jax.studies.benchmark.formulations_plot import Pass, chart
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.studies.benchmark.run import check
from cnn_jax.train import parallel
from cnn_jax.train.workdir import prepare

PASSES = ("forward", "image_gradient", "kernel_gradient")
# Those that serve some of the passes only; a program of one pass makes "xla_apart" of "xla".
_PASSES_OF = {
    "xla": ("forward", "image_gradient"),
    "xla_apart": ("kernel_gradient",),
    "dense_columns": ("image_gradient",),
    "fourier_patches": ("image_gradient",),
}
# A choice of the rule is off if another formulation is faster by more than this factor.
_OFF = 1.1


def geometries(network: str) -> list[Geometry]:
    """The convolutions of a network of the benchmark, in its order."""
    found = []

    def record(
        call: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if isinstance(module, nn.Conv) and context.method_name == "__call__":
            (image,) = args
            size, strides = (
                np.broadcast_to(n or 1, 2) for n in (module.kernel_size, module.strides)
            )
            kernel = jax.ShapeDtypeStruct((*size, image.shape[-1], module.features), image.dtype)
            padding = nn.linear.canonicalize_padding(module.padding, 2)
            found.append(conv.geometry(image, kernel, strides.tolist(), padding))
        return call(*args, **kwargs)

    spec = NETWORKS[network]
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), np.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(getattr(models, spec.model)().init, jax.random.key(0), image)
    return found


def candidates(g: Geometry, name: str) -> list[str]:
    """The formulations that can compute a pass, without those that are slow to compile."""

    def serves(each: str) -> bool:
        large = each in ("offsets", "patches") and math.prod(g.kernel) > 49
        return applies(each, g) and name in _PASSES_OF.get(each, PASSES) and not large

    return [each for each in FORMULATIONS if serves(each)]


def measure(
    g: Geometry, name: str, batch_size: int, rounds: int, seconds: float
) -> dict[str, float]:
    """GFLOP/s of the direct algorithm in one pass, by formulation: medians of interleaved rounds."""
    image = (batch_size, *g.image, g.in_channels)
    kernel = (*g.kernel, g.in_channels, g.out_channels)
    out = (batch_size, *g.out, g.out_channels)
    given = {"forward": (image, kernel), "image_gradient": (out, kernel)}.get(name, (out, image))
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=shape), np.float32) for shape in given]
    programs = {}
    for each in candidates(g, name):
        convolution = functools.partial(FORMULATIONS[each], g)
        programs[each] = parallel.jit(functools.partial(conv.compute, name, convolution, g))
        programs[each](*arrays).block_until_ready()  # compiles it
    rates: dict[str, list[float]] = {each: [] for each in programs}
    for _ in range(rounds):
        for each, program in programs.items():
            calls, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < seconds or not calls:
                program(*arrays).block_until_ready()
                calls += 1
            rates[each].append(calls / took)
    flops = 2 * math.prod(out) * math.prod(kernel[:3]) / 1e9
    return {each: statistics.median(rate) * flops for each, rate in rates.items()}


def compare(
    networks: list[str],
    batch_size: int,
    rounds: int,
    seconds: float,
    write: bool,
    output: Path | None = None,
) -> None:
    """Measures every pass, and prints a line of each that says whether the rule's choice is off.

    Args:
      networks: whose convolutions; of all networks if empty.
      batch_size: images a pass.
      rounds: how often each formulation is measured, in turn.
      seconds: how long each time.
      write: puts the table into RESULTS.md.
      output: a PNG file of the figures to write.

    Raises:
      ConfigError: an unknown network, or `seconds` is not greater than 0.
      WorkdirError: a file or its folder cannot be written.
    """
    check(networks, seconds)
    if output:
        prepare(output.parent)  # fail now rather than after minutes
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    passes = []
    for g in dict.fromkeys(g for network in networks or NETWORKS for g in geometries(network)):
        # No network computes the gradient of its input.
        for name in PASSES if g.in_channels > 4 else ("forward", "kernel_gradient"):
            figures = measure(g, name, batch_size, rounds, seconds)
            passes.append(Pass(_layer(g), name, getattr(formulations_for(g), name), figures))
            console.print("  ".join(_row(passes[-1])), soft_wrap=True)
    rows = [_row(each) for each in passes]
    off = sum(bool(row[3]) for row in rows)
    summary = f"The rule is more than {_OFF - 1:.0%} off in {off} of {len(rows)} passes."
    console.print(summary)
    if output:
        with written(output, WorkdirError):
            output.write_bytes(chart(passes).light)
        console.print(f"written to {output}")
    if write:
        _put_into(RESULTS / "RESULTS.md", rows, summary, batch_size, rounds, seconds)
        console.print(f"written to {RESULTS / 'RESULTS.md'}")


def _put_into(
    path: Path, rows: list[list[str]], summary: str, batch_size: int, rounds: int, seconds: float
) -> None:
    """Replaces the section of this processor and batch size, or adds it at the end."""
    text = [
        f"## Formulations of convolutions on {cpu.description()}, batch {batch_size}",
        "",
        f"`./launch.sh benchmark --formulations --batch_size={batch_size} --rounds={rounds} "
        f"--seconds={seconds:g} --write` on {datetime.date.today()}; jax {jax.__version__}, "
        "float32. GFLOP/s of the direct algorithm. Each pass is a program of its own, so a "
        f"formulation's cost to its neighbours is left out. {summary}",
        "",
        markdown.markdown_table(["layer", "pass", "the rule's", "faster", "others"], rows),
    ]
    mark = f"formulations {cpu.description()} batch {batch_size}"
    markdown.put_section(path, mark, "\n".join(text))


def _layer(g: Geometry) -> str:
    (height, width), (kh, kw) = g.image, g.kernel
    kernel, stride = (str(kh) if kh == kw else f"{kh}x{kw}"), g.strides[0]
    text = f"{height}x{width} {g.in_channels}->{g.out_channels} k{kernel}"
    return text + (f" s{stride}" if stride > 1 else "") + (" p" if any(map(any, g.pads)) else "")


def _row(measured: Pass) -> list[str]:
    """The cells: layer, pass, the rule's choice, one that is faster by far or nothing, all others."""
    layer, name, chosen, figures = measured
    best = max(figures, key=figures.__getitem__)
    faster = best if figures[best] > _OFF * figures[chosen] else None
    others = sorted(figures.keys() - {chosen, faster}, key=figures.__getitem__, reverse=True)

    def cell(*names: str | None) -> str:
        return ", ".join(f"{each} {figures[each]:,.0f}" for each in names if each)

    return [layer, name, cell(chosen), cell(faster), cell(*others)]
