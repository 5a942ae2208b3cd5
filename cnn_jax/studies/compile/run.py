"""The command `compile`: experiments, one after the other, for one topology."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from cnn_jax.common.errors import ConfigError, WorkdirError
from cnn_jax.common.files import written
from cnn_jax.config import experiment
from cnn_jax.data.sources import input_shape
from cnn_jax.studies import markdown
from cnn_jax.studies.compile import table, targets
from cnn_jax.studies.compile.programs import compile_steps

log = logging.getLogger(__name__)


def compile_all(
    experiments: Sequence[str],
    assignments: Sequence[str],
    topology: str,
    input_size: str | None,
    data_dir: str | None,
    dump: Path | None,
    write: bool,
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

    Raises:
      ConfigError: an experiment, the topology or a batch is unsuitable.
      WorkdirError: a file cannot be written.
    """
    configs = [experiment.load(name, assignments) for name in experiments]
    target = targets.find(topology)
    if write and target.rates is None:
        raise ConfigError(f"--write: takes another topology than {topology}, which has no rates")
    rows, texts = [], []
    for name, config in zip(experiments, configs, strict=True):
        if len(experiments) > 1:
            print(name)
        shape = input_shape(config.data, input_size, data_dir)
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
        text = f"Compiled for {topology} with JAX {jax.__version__}, on each device:\n\n"
        markdown.put_section(
            path, f"compile {topology}", text + markdown.markdown_table(table.HEAD, rows)
        )
        print(f"written to {path}")
