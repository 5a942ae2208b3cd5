"""Names in any script in pictures: an installed font that has the characters, or their numbers."""

import contextlib
import functools
import logging
import unicodedata
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

log = logging.getLogger(__name__)

# What matplotlib comes with, and draws with where no other font is named.
FIRST = "DejaVu Sans"


def drawable(text: str) -> str:
    r"""`text` with the characters that no installed font has as in "\u88e4", and a warning of them."""
    return "".join(
        c if font_of(c) else c.encode("ascii", "backslashreplace").decode() for c in text
    )


def use_for(figure: Figure) -> None:
    """Adds to the figure's texts the fonts that have the characters which FIRST lacks."""
    texts = figure.findobj(Text)
    needed = sorted({c for text in texts for c in text.get_text()})
    more = [font for font in dict.fromkeys(map(font_of, needed)) if font not in (None, FIRST)]
    for text in texts if more else ():
        text.set_fontfamily([*text.get_fontfamily(), *more])


def columns(text: str) -> int:
    """The width of a text in Latin letters; Chinese, Japanese and Korean ones are two wide."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


@functools.cache
def font_of(character: str) -> str | None:
    """The family of the first font that has the character; None if no font has it."""
    if not character.isprintable():
        return FIRST
    family = _first_with(character)
    if family is None:
        _add_new()
        family = _first_with(character)
    if family is None:
        _warn()
    return family


def _first_with(character: str) -> str | None:
    fonts = _fonts().items()
    return next((family for family, font in fonts if font.get_char_index(ord(character))), None)


@functools.cache
def _add_new() -> None:
    """Adds fonts that were installed after matplotlib made its list, which it keeps for good."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    if new := set(font_manager.findSystemFonts()) - listed:
        for path in new:
            with contextlib.suppress(OSError, RuntimeError):  # a kind of file that it cannot read
                font_manager.fontManager.addfont(path)
        for family, font in _listed().items():
            _fonts().setdefault(family, font)


@functools.cache
def _fonts() -> dict[str, FT2Font]:
    """The fonts to choose from, by family; FIRST before the others."""
    return _listed()


def _listed() -> dict[str, FT2Font]:
    """The upright fonts of matplotlib's list, by family; FIRST before the others.

    The others that matplotlib has are for formulas. They have characters in the places of others.
    """
    own = Path(matplotlib.get_data_path())
    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and (entry.name == FIRST or own not in Path(entry.fname).parents)
    ]
    entries.sort(key=lambda entry: (entry.name != FIRST, entry.name, entry.weight != 400))
    paths: dict[str, str] = {}
    for entry in entries:
        paths.setdefault(entry.name, entry.fname)
    return {name: FT2Font(path) for name, path in paths.items()}


@functools.cache
def _warn() -> None:
    """Once in a process."""
    log.warning(
        "warning: no installed font has all characters of the names that are drawn; those that are "
        r"missing are written as \uXXXX. Install a font of that script, such as Noto Sans CJK"
    )
