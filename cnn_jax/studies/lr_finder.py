"""Finds a learning rate: a short training in which it rises exponentially (arXiv 1506.01186)."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cnn_jax.analysis import plotting
from cnn_jax.common import files
from cnn_jax.common.errors import ConfigError, NotFiniteError
from cnn_jax.config import Config
from cnn_jax.config.validate import validate
from cnn_jax.data import loader, statistics
from cnn_jax.data.examples import Examples
from cnn_jax.data.splits import check_splits, load_splits
from cnn_jax.train import optim, parallel, pretrained, start

LOWEST, HIGHEST = 1e-6, 10.0
LEAST_STEPS, MOST_STEPS = 100, 1000
FEWEST = 10  # losses, below which there is no curve to read


@dataclasses.dataclass(frozen=True)
class Found:
    """The losses of a rising learning rate.

    Attributes:
      rates: float64 [steps done], the rate of each step.
      losses: float64 [steps done], before each step.
      smooth: float64 [steps done], centred means of the losses.
      steepest: the rate at which `smooth` falls fastest over the logarithm of the rate.
      lowest: the rate at which it is lowest.
    """

    rates: np.ndarray
    losses: np.ndarray
    smooth: np.ndarray
    steepest: float
    lowest: float

    @property
    def rate(self) -> float:
        """The suggestion: the geometric mean of the two, a rule of thumb."""
        return math.sqrt(self.steepest * self.lowest)


def find(
    config: Config,
    steps: int | None,
    data_dir: str | None,
    download: bool,
    init_from: str | None,
    output: Path,
) -> Found:
    """Trains with a rate from LOWEST to HIGHEST, reads the losses, and writes a picture of them.

    Ends early where the loss is four times its lowest, or not finite.

    Args:
      config: the run whose rate is sought; its own rate and schedule are not used.
      steps: of the whole rise; None: an epoch, within LEAST_STEPS and MOST_STEPS.
      data_dir: the folder of the dataset.
      download: downloads the dataset if it is not prepared.
      init_from: as in `loop.train`.
      output: a PNG file.

    Raises:
      NotFiniteError: the loss is not finite from the start on.
      The errors of `loop.train`.
    """
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output={output}: must end in .png")
    config = validate(optim.with_constant_rate(config))
    files.check_folder(output.parent)
    source = pretrained.find(init_from)
    splits = load_splits(config, data_dir, download)
    config = statistics.in_numbers(config, splits.train)
    check_splits(config, splits)
    epoch = len(splits.train) // config.batch_size
    rates = np.geomspace(LOWEST, HIGHEST, steps or min(max(epoch, LEAST_STEPS), MOST_STEPS))
    losses = train(config, rates, splits.train, source)
    if len(losses) < FEWEST:
        raise NotFiniteError(
            f"the loss is not finite after {len(losses)} steps, at a rate of {rates[len(losses)]:.2g}; "
            "look at the data and the model"
        )
    found = read(rates[: len(losses)], np.array(losses))
    with files.writing(output.parent):
        output.write_bytes(picture(found).light)
    return found


def train(
    config: Config, rates: np.ndarray, examples: Examples, source: pretrained.Source | None
) -> list[float]:
    """The loss before each step with the rate `rates[step]`, until it is four times its lowest."""
    mesh = parallel.make_mesh(config.devices)
    parallel.check_divides(mesh, config.batch_size)
    # Not a lookup in an array: a factory may call its schedule with any number.
    rise = optax.exponential_decay(rates[0], 1, float(rates[1] / rates[0]))
    optimizer = optim.make_optimizer(config, len(rates), rise)
    state = start.first_state(config, optimizer, examples, mesh, source)
    step = start.compiled_step(config, optimizer, examples, mesh, state)
    losses: list[float] = []
    for batch in itertools.islice(_batches(config, examples), len(rates)):
        state, loss = step(state, parallel.shard(batch, mesh))
        losses.append(float(loss))
        recent = losses[-FEWEST:]
        if not math.isfinite(losses[-1]):
            return losses[:-1]
        if len(losses) > 2 * FEWEST and np.mean(recent) > 4 * min(losses):
            break
    return losses


def _batches(config: Config, examples: Examples) -> Iterator[dict[str, np.ndarray]]:
    order = loader.make_order(config, examples)
    for epoch in itertools.count():
        yield from loader.training_batches(examples, order(epoch), config.batch_size, epoch=epoch)


def read(rates: np.ndarray, losses: np.ndarray) -> Found:
    """Smooths the losses and finds the steepest fall before their lowest point."""
    half = max(1, len(losses) // 25)
    smooth = losses
    for _ in range(2):  # a box twice: a triangle, with less ripple
        padded = np.pad(smooth, half, mode="edge")
        smooth = np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")
    lowest = max(int(np.argmin(smooth)), 1)
    slope = np.gradient(smooth, np.log(rates))
    steepest = int(np.argmin(slope[: lowest + 1]))
    return Found(rates, losses, smooth, float(rates[steepest]), float(rates[lowest]))


def picture(found: Found) -> plotting.Chart:
    """The losses and their mean by rate, with the suggestion marked."""

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.plot(found.rates, found.losses, color=theme.rule, linewidth=0.8, label="each step")
        axes.plot(found.rates, found.smooth, color=theme.series[0], label="smoothed")
        span = (found.steepest, found.lowest)
        axes.axvspan(*span, color=theme.series[0], alpha=0.12, label="steepest to lowest")
        axes.axvline(
            found.rate, color=theme.series[1], linestyle="--", label=f"suggestion: {found.rate:.1e}"
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        low, high = found.smooth.min(), found.smooth[: max(len(found.smooth) // 2, 1)].max()
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    alt = (
        f"Training loss by learning rate: it falls fastest near {found.steepest:.2g} and is lowest "
        f"near {found.lowest:.2g}."
    )
    return plotting.draw("lr_finder", alt, 2.6, paint)
