"""What `benchmark --formulations` measured, as one picture."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cnn_jax.analysis import plotting

# By colour. What is drawn under one name are variants of one algorithm.
_FAMILIES = ("xla", "rows", "offsets", "patches", "winograd", "fourier", "dense")


class Pass(NamedTuple):
    """One pass of one convolution.

    Attributes:
      layer: as "28x28 32->64 k3 s2 p": image, channels, kernel, strides, and p for padding.
      name: of the pass, as in ops/conv.py.
      chosen: the rule's formulation.
      figures: GFLOP/s of the direct algorithm by formulation.
    """

    layer: str
    name: str
    chosen: str
    figures: dict[str, float]


def chart(passes: Sequence[Pass]) -> plotting.Chart:
    """A panel for each pass; a line for each layer, with a dot for each formulation.

    Args:
      passes: in the order of the layers.
    """
    layers = list(dict.fromkeys(each.layer for each in passes))
    names = list(dict.fromkeys(each.name for each in passes))

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            axes.set_title(name.replace("_", " "), fontsize=8)
            axes.grid(axis="both")
            for each in passes:
                if each.name == name:
                    _dots(axes, theme, layers.index(each.layer), each)
            axes.set_xlim(left=0)
            axes.set_xlabel("GFLOP/s")
        panels[0].set_yticks(range(len(layers)), layers, fontsize=6.5)
        panels[0].invert_yaxis()
        for color, family in zip(theme.series, _FAMILIES, strict=False):
            panels[0].plot([], [], "o", color=color, markersize=4, label=family)
        figure.legend(ncols=len(_FAMILIES), loc="outside lower center")

    alt = "Speed of each formulation of each convolution; the rule's choices are filled."
    return plotting.draw("formulations", alt, 1.2 + 0.13 * len(layers), paint, width=7.2)


def _dots(axes: Axes, theme: plotting.Theme, place: int, measured: Pass) -> None:
    for formulation, figure in measured.figures.items():
        family = formulation.split("_")[0]
        color = theme.series[_FAMILIES.index(family)]
        own = formulation == measured.chosen
        axes.plot(
            figure,
            place,
            "o",
            color=color,
            markersize=5 if own else 3,
            fillstyle="full" if own else "none",
            markeredgewidth=0.7,
            zorder=3 if own else 2,
        )
