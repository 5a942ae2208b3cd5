"""What the comparison of several runs shows."""

from typing import Any

from cnn_jax.analysis.plotting import Chart
from cnn_jax.analysis.report import comparison, formatting, run_data
from cnn_jax.analysis.report.run_data import Facts


def content(runs: list[Facts]) -> tuple[dict[str, Any], list[Chart]]:
    """The values of comparison.html.j2, and the pictures among them."""
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
    values = dict(
        **shown,
        title=f"{formatting.plural(len(runs), 'network')} compared",
        rows=[(names[i], runs[i]) for i in order],
    )
    return values, [chart for chart in shown.values() if chart]
