"""A written page, read strictly: as XML, of which the report's HTML is a subset."""

import base64
import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image


class Page:
    """index.html as a tree.

    Raises:
      ParseError: a tag is not closed, or a character not escaped.
    """

    def __init__(self, file: Path):
        self.file = file
        self.source = file.read_text()
        self.root = ElementTree.fromstring(self.source)

    def text(self) -> str:
        """What a person reads, with single spaces."""
        body = self.root.find("body")
        return " ".join(" ".join(body.itertext()).split())

    def sections(self) -> list[str]:
        """The headings."""
        return ["".join(heading.itertext()).strip() for heading in self.root.iter("h2")]

    def rows(self, caption: str) -> list[list[str]]:
        """The cells of the table with such a caption."""
        for table in self.root.iter("table"):
            if caption in "".join(table.find("caption").itertext()):
                rows = table.find("tbody").findall("tr")
                return [[" ".join(" ".join(c.itertext()).split()) for c in row] for row in rows]
        raise AssertionError(f"no table {caption!r}")

    def pictures(self) -> list[tuple[str, bytes]]:
        """The alternative text and the PNG file of every picture, in its light form."""
        return [(image.get("alt"), _data(image.get("src"))) for image in self.root.iter("img")]

    def dark_pictures(self) -> list[bytes]:
        return [_data(source.get("srcset")) for source in self.root.iter("source")]


def picture_of(element: ElementTree.Element) -> tuple[str, bytes]:
    """The alternative text and the PNG file of the first picture inside `element`."""
    image = element.find(".//img")
    return image.get("alt"), _data(image.get("src"))


def pixels(png: bytes) -> np.ndarray:
    """uint8 [h, w, 4]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _data(address: str) -> bytes:
    kind, _, encoded = address.partition(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(encoded, validate=True)
