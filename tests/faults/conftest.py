"""A last line for each kind of fault: how many were tried, and what became of the runs."""

import collections

import pytest


class Tally:
    """Counts faults by kind; a run that ends as if undisturbed has survived."""

    def __init__(self, record_property):
        self._record = record_property

    def add(self, kind: str, tried: int, survived: int) -> None:
        self._record("faults", [kind, tried, survived])


@pytest.fixture
def tally(record_property) -> Tally:
    return Tally(record_property)


def pytest_terminal_summary(terminalreporter):
    """Under pytest-xdist too: what a test records comes with its report."""
    totals = collections.defaultdict(lambda: [0, 0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "faults" and report.when == "call":
                    kind, tried, survived = value
                    totals[kind][0] += tried
                    totals[kind][1] += survived
    for kind, (tried, survived) in totals.items():
        terminalreporter.write_line(
            f"{kind}: faults tried {tried}, survived {survived}, lost {tried - survived}"
        )
