"""Numbers for people."""

import pytest

from cnn_jax.analysis.report import formatting


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (850, "850"),
        (0.5218, "0.522"),
        (999.6, "1 k"),
        (1588490, "1.59 M"),
        (39_400_000, "39.4 M"),
        (1e9, "1 G"),
    ],
)
def test_short(number: float, text: str):
    assert formatting.short(number) == text.replace(" ", formatting.SPACE)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.8731, "87.3 %"), (1.0, "100.0 %"), (0.9999, "> 99.9 %"), (0.0, "0.0 %"), (1e-5, "< 0.1 %")],
)
def test_percent(share: float, text: str):
    assert formatting.percent(share) == text.replace(" ", formatting.SPACE)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (754.2, "12 min 34 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds: float, text: str):
    assert formatting.duration(seconds).replace(formatting.SPACE, " ") == text


def test_nothing_is_a_dash():
    assert formatting.percent(None) == formatting.duration(None) == "\u2013"


def test_plurals():
    assert formatting.plural(1, "epoch") == "1 epoch"
    assert formatting.plural(1200, "class") == "1,200 classes"
