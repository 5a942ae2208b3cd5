"""The accuracy section of RESULTS.md, built from the records: no figure is written by hand."""

import dataclasses
import functools
import logging
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import scipy.stats

from cnn_jax.common.errors import ConfigError
from cnn_jax.config.experiment import load
from cnn_jax.config.serialize import is_of
from cnn_jax.studies import markdown
from cnn_jax.studies.reproduce import plan, records
from cnn_jax.studies.reproduce.records import Record

log = logging.getLogger(__name__)

MARK = "reproduce"
NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the runs of one experiment measured, after their last epoch.

    Attributes:
      runs: their records, at least one, sorted by seed.
    """

    runs: tuple[Record, ...]

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def device(self) -> str:
        """The device of the first run."""
        return self.runs[0].run["device"]

    @property
    def by_device(self) -> list["Figures"]:
        """The figures of each device alone: times on different devices cannot be compared."""
        devices = dict.fromkeys(run.run["device"] for run in self.runs)
        return [
            Figures(tuple(run for run in self.runs if run.run["device"] == device))
            for device in devices
        ]

    @property
    def parameters(self) -> int:
        return self.runs[0].run["parameters"]

    @property
    def train(self) -> float:
        """Mean training accuracy, measured during the last epoch while the weights change."""
        return statistics.fmean(run.metrics[-1]["train_accuracy"] for run in self.runs)

    @property
    def tests(self) -> list[float]:
        """Test accuracy of each run."""
        return [run.evaluation["accuracy"] for run in self.runs]

    @property
    def test(self) -> float:
        """Mean test accuracy."""
        return statistics.fmean(self.tests)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the test accuracy; None for a single run."""
        return statistics.stdev(self.tests) if self.n > 1 else None

    @property
    def epochs(self) -> int:
        return self.runs[0].metrics[-1]["epoch"]

    @property
    def epoch_seconds(self) -> float:
        """Median over all epochs."""
        return self._median("epoch_seconds")

    @property
    def rate(self) -> float:
        """Training images a second, median over all epochs."""
        return self._median("images_per_second")

    @property
    def training_seconds(self) -> float:
        """Mean over the runs, without compilation and evaluation."""
        return statistics.fmean(run.run["training_seconds"] for run in self.runs)

    @property
    def petaflop(self) -> float:
        """PFLOP of one run's training."""
        return statistics.fmean(run.run["training_flops"] for run in self.runs) / 1e15

    def _median(self, name: str) -> float:
        return statistics.median(line[name] for run in self.runs for line in run.metrics)


def rebuild(output: Path, rows: Sequence[plan.Row] = plan.ROWS) -> None:
    """Rewrites the accuracy section of OUTPUT/RESULTS.md; other sections stay as they are.

    Args:
      output: the folder of RESULTS.md and records/.
      rows: of the tables; rows outside the plan are shown with the embedded dataset.

    Raises:
      WorkdirError: a record is damaged, or the file cannot be written.
    """
    markdown.put_section(output / "RESULTS.md", MARK, render(output / "records", rows), first=True)


def render(folder: Path, rows: Sequence[plan.Row] = plan.ROWS) -> str:
    """The section in Markdown, from the records in `folder`."""
    runs = {row.experiment: read_all(folder, row.experiment) for row in rows}
    every = [record for found in runs.values() for record in found]
    devices = list(dict.fromkeys(record.run["device"] for record in every))
    versions = {
        name: sorted({record.run["versions"][name] for record in every})
        for name in ("python", "jax", "flax", "optax")
    }
    template = _environment().get_template("results.md.j2")
    text = template.render(
        lecture=[row for row in rows if row in plan.LECTURE],
        better=[row for row in rows if row in plan.BETTER],
        records=[row for row in rows if row in plan.RECORDS],
        others=[row for row in rows if row not in (*plan.LECTURE, *plan.BETTER, *plan.RECORDS)],
        of={name: Figures(tuple(found)) for name, found in runs.items() if found},
        rows={row.experiment: row for row in rows},
        devices=devices,
        versions=versions,
        against=against,
        difference=difference,
        certainty=certainty,
        order=order,
        not_run=NOT_RUN,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


@functools.cache  # the template must not change during a run of hours
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnn_jax.studies.reproduce"),
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "accuracy": accuracy,
        "spread": lambda figures: markdown.spread(figures.tests),
        "seeds": lambda figures: seeds(run.seed for run in figures.runs),
        "short": short,
    }
    return environment


def read_all(folder: Path, experiment: str) -> list[Record]:
    """The records of an experiment that match its current configuration, sorted by seed.

    Raises:
      WorkdirError: one is damaged.
    """
    found = []
    for path in records.folder(folder, experiment, 0).parent.glob("seed_*"):
        if record := records.read(path):
            found.append(record)
    found.sort(key=lambda record: record.seed)
    current = []
    for record in found:
        where = f"{experiment}, seed {record.seed}"
        try:
            config = load(experiment, [f"seed={record.seed}"])
        except ConfigError as error:
            log.warning("warning: the record of %s is left out: %s", where, error)
            continue
        if is_of(record.config["config"], config):
            current.append(record)
            if record.run.get("dirty"):
                log.warning(
                    "warning: the record of %s was made with code that was not committed", where
                )
        else:
            log.warning(
                "warning: the record of %s is left out: the experiment was changed since", where
            )
    return current


# ------------------------------------------------------------------------- figures as words


def accuracy(share: float | None) -> str:
    """0.89731 -> "0.8973"."""
    return "-" if share is None else f"{share:.4f}"


def seeds(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def short(number: float) -> str:
    """Three digits: 0.0015211 -> "0.00152", 2345.6 -> "2,346"."""
    if number >= 100 or number == 0:
        return f"{number:,.0f}"
    return f"{number:.{2 - math.floor(math.log10(number))}f}"


def against(share: float, other: float) -> str:
    """ "0.34 points above": compares two accuracies as they are printed."""
    points = 100 * (round(share, 4) - round(other, 4))
    if abs(points) < 0.005:
        return "equal to"
    return f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"


def difference(figures: Figures, other: Figures) -> str:
    """`against` for the mean test accuracies of two experiments."""
    return against(figures.test, other.test)


def chance(figures: Figures, other: Figures) -> float | None:
    """The p-value of Welch's t-test for the difference of two mean test accuracies.

    None if either has a single run, which gives no variance.
    """
    if figures.n < 2 or other.n < 2:
        return None
    if not (figures.deviation or other.deviation):
        return float(figures.test == other.test)
    return float(scipy.stats.ttest_ind(figures.tests, other.tests, equal_var=False).pvalue)


def certainty(figures: Figures, other: Figures) -> str:
    """Says whether the difference of two means could be chance."""
    probability = chance(figures, other)
    if probability is None:
        return "single runs differ by chance, so this is no proof"
    return f"Welch's t-test: p {'= ' + short(probability) if probability >= 0.001 else '< 0.001'}"


def order(below: Figures, above: Figures) -> str:
    """Says whether the first is below the second, as in the lecture."""
    probability = chance(below, above)
    if probability is None or probability >= 0.05:
        return "too little to tell which is better"
    return f"{'the' if below.test < above.test else 'not the'} lecture's order"
