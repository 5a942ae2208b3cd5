"""The command `compile`: experiments, one after the other, for one topology."""

import datetime
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

from cnn_jax.common.errors import ConfigError, WorkdirError
from cnn_jax.common.files import written
from cnn_jax.config import experiment
from cnn_jax.data.sources import input_shape
from cnn_jax.studies import markdown
from cnn_jax.studies.compile import scaling, table, targets
from cnn_jax.studies.compile.programs import compile_steps


def compile_all(
    experiments: Sequence[str],
    assignments: Sequence[str],
    topology: str,
    input_size: str | None,
    data_dir: str | None,
    dump: Path | None,
    write: bool,
    scale: bool = False,
) -> None:
    """Compiles and prints the steps of experiments.

    Args:
      experiments: their names or paths.
      assignments: of --set.
      topology: as in `targets.find`.
      input_size: as in `input_shape`.
      data_dir: the folder of the datasets, which need not be prepared.
      dump: a file for the compiled text.
      write: puts the training steps into RESULTS.md.
      scale: prints how the cost of a training step grows with the devices, instead of the rest.

    Raises:
      ConfigError: an experiment, the topology or a batch is unsuitable.
      WorkdirError: a file cannot be written.
    """
    if scale and (write or dump):
        raise ConfigError(f"--scaling: must not be given with --{'write' if write else 'dump'}")
    configs = [experiment.load(name, assignments) for name in experiments]
    target = targets.find(topology)
    if write and target.rates is None:
        raise ConfigError(f"--write: takes another topology than {topology}, which has no rates")
    rows, texts = [], []
    for name, config in zip(experiments, configs, strict=True):
        if len(experiments) > 1:
            print(name)
        shape = input_shape(config.data, input_size, data_dir)
        if scale:
            print("\n\n".join(scaling.tables(config, shape, target)), flush=True)
            continue
        for compiled in compile_steps(config, shape, target):
            print("\n".join(table.lines(compiled, target)), flush=True)
            texts.append(compiled.text)
            if write and compiled.name == "training":
                rows.append(table.cells(name, compiled, target))
    if dump:
        with written(dump, WorkdirError):
            dump.write_text("\n".join(texts), encoding="utf-8")
        print(f"written to {dump}")
    if write:
        path = experiment.RESULTS / "RESULTS.md"
        command = shlex.join(["compile", *experiments, f"--topology={topology}", "--write"])
        command += "".join(f" --set {assignment}" for assignment in assignments)
        markdown.put_section(path, f"compile {topology}", _section(topology, command, rows))
        print(f"written to {path}")


def _section(topology: str, command: str, rows: Sequence[Sequence[str]]) -> str:
    """The training steps as a section of RESULTS.md."""
    return (
        f"## Compiled for {topology}, not measured\n\n"
        f"`./launch.sh {command}` on {datetime.date.today()}\n\n"
        f"JAX {jax.__version__}; the figures are those of one device. Traffic: bytes that kernels read "
        "from and write to its main memory. Bound: what the longest of arithmetic, traffic and "
        "exchange takes at the device's peak rates.\n\n" + markdown.markdown_table(table.HEAD, rows)
    )
