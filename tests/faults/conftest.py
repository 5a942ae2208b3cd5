"""Counts faults by kind, and what became of the runs; ../conftest.py prints the sums."""

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
