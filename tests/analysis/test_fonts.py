"""Names in any script in pictures, with the fonts that there are."""

import shutil

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from cnn_jax.analysis import fonts, plotting

TROUSERS = "\u88e4\u5b50"  # in Chinese, which matplotlib's fonts do not have


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch):
    """DejaVu Sans, as on a machine without others."""
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    found = {fonts.FIRST: FT2Font(f"{folder}/DejaVuSans.ttf")}
    monkeypatch.setattr(fonts, "_fonts", lambda: found)
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", list)
    for cached in (fonts.font_of, fonts._add_new, fonts._warn):
        cached.cache_clear()
    yield found
    for cached in (fonts.font_of, fonts._add_new, fonts._warn):
        cached.cache_clear()


def test_what_no_font_has_is_written_in_numbers_with_one_warning(caplog):
    assert fonts.drawable("Überhemd Жук") == "Überhemd Жук"
    assert caplog.messages == []
    assert fonts.drawable(f"a {TROUSERS}") == r"a \u88e4\u5b50"
    assert plotting.clip(f"{TROUSERS}\n{TROUSERS}", 14) == r"\u88e4\u5b50 …"
    (line,) = caplog.messages
    assert "no installed font has all characters" in line


def test_a_font_that_has_the_character_is_used(own_fonts, caplog):
    def drawn(name):
        figure = Figure(figsize=(2, 1), dpi=80)
        axes = figure.add_axes((0.5, 0.1, 0.4, 0.8))
        axes.set_yticks([0.5], [fonts.drawable(name)])
        return plotting.pixels(figure), axes.get_yticklabels()[0].get_fontfamily()

    segment = "\u2313"  # DejaVu Sans has it in its monospaced version alone
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    own_fonts["DejaVu Sans Mono"] = FT2Font(f"{folder}/DejaVuSansMono.ttf")
    with matplotlib.style.context("default"):
        image, families = drawn(f"a{segment}")
        plain, without = drawn("ab")
    assert families == [*without, "DejaVu Sans Mono"]
    assert caplog.messages == []
    assert not np.array_equal(image, plain)


def test_a_font_that_was_installed_after_matplotlib_made_its_list(monkeypatch, tmp_path, caplog):
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    installed = shutil.copy(f"{folder}/DejaVuSansMono.ttf", tmp_path)
    listed = [entry for entry in font_manager.fontManager.ttflist if entry.name == fonts.FIRST]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [installed])
    assert fonts.font_of("\u2313") == "DejaVu Sans Mono"
    assert caplog.messages == []


def test_the_width_of_a_name():
    assert fonts.columns("ab") == 2
    assert fonts.columns(TROUSERS) == 4
