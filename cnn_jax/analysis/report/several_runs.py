"""The content of the page that compares several runs."""

import logging
from typing import Any

from cnn_jax.analysis.plotting import Chart
from cnn_jax.analysis.report import comparison, formatting, run_data
from cnn_jax.analysis.report.run_data import Facts

log = logging.getLogger(__name__)


def content(runs: list[Facts]) -> tuple[dict[str, Any], list[Chart]]:
    """The values for comparison.html.j2, and the pictures among them."""
    names = run_data.unique_names(runs)
    order = sorted(range(len(runs)), key=lambda i: -runs[i].result.accuracy)
    shown = {
        "classes": None,
        "accuracy": comparison.curves(runs, names, "accuracy"),
        "loss": comparison.curves(runs, names, "loss"),
        "parameters": comparison.accuracy_against(
            runs, names, "parameters", lambda run: run.summary.parameters
        ),
        "flops": comparison.accuracy_against(
            runs, names, "FLOPs an image", lambda run: run.summary.flops
        ),
        "seconds": comparison.accuracy_against(
            runs, names, "seconds of training", lambda run: run.seconds
        ),
    }
    if len({(run.run.data.name, run.run.class_names) for run in runs}) == 1:
        shown["classes"] = comparison.classes([runs[i] for i in order], [names[i] for i in order])
    differing = different_data(runs, names)
    for line in differing:
        log.warning("warning: %s", line)
    values = dict(
        **shown,
        differing=differing,
        title=f"{formatting.plural(len(runs), 'network')} compared",
        rows=[(names[i], runs[i]) for i in order],
    )
    return values, [chart for chart in shown.values() if chart]


def different_data(runs: list[Facts], names: list[str]) -> list[str]:
    """A sentence for each difference in the runs' data, which also changes their accuracies."""
    choices = {
        "evaluated on": lambda data: f"{data.name}/{data.test_split}",
        "trained on": lambda data: f"{data.name}/{data.train_split}",
        "images held out for validation": lambda data: f"{data.validation_examples:,}",
    }
    lines = []
    for what, chosen in choices.items():
        by_value: dict[str, list[str]] = {}
        for run, name in zip(runs, names, strict=True):
            by_value.setdefault(chosen(run.run.data), []).append(name)
        if len(by_value) > 1:
            shown = "; ".join(f"{value} ({', '.join(of)})" for value, of in by_value.items())
            lines.append(f"the runs differ in their data: {what}: {shown}")
    return lines
