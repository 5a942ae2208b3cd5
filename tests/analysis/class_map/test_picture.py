"""What is drawn where: read from the axes, and from the pixels."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from cnn_jax.analysis import plotting
from cnn_jax.analysis.class_map.picture import FOUND, MISSED, SEEN, Boxes, draw
from cnn_jax.models.receptive_field import Field

NAMES = tuple("abcdefghij")
FIELD = Field((4, 5), (12, 12), (4, 4), (-2, -2))


@pytest.fixture
def drawn(monkeypatch):
    """draw(...) -> the picture, and the figure that it was made of."""
    figures = []

    class Kept(plotting.FigureCanvasAgg):
        def __init__(self, figure):
            figures.append(figure)
            super().__init__(figure)

    monkeypatch.setattr(plotting, "FigureCanvasAgg", Kept)
    return lambda *args: (draw(*args), figures[-1])


def probabilities(winner, strength=0.6, classes=10):
    """A class map with these winners."""
    winner = np.array(winner)
    class_map = np.full((*winner.shape, classes), (1 - strength) / (classes - 1), np.float32)
    np.put_along_axis(class_map, winner[..., None], strength, -1)
    return class_map


def boxes_of(axes):
    """(colour, top, left, height, width) of each rectangle, in pixels of the image."""
    return [
        (to_hex(p.get_edgecolor()), p.get_y() + 0.5, p.get_x() + 0.5, p.get_height(), p.get_width())
        for p in axes.patches
    ]


def test_each_score_is_drawn_in_the_middle_of_its_window(drawn):
    image = np.zeros((20, 24, 1), np.uint8)
    _, figure = drawn(image, probabilities(np.arange(20).reshape(4, 5) % 10), FIELD, NAMES)
    for axes in figure.axes[1:3]:
        left, right, bottom, top = axes.images[0].get_extent()
        # Its window begins at -2 and is 12 wide; the middle 4 of them are 2 .. 5.
        assert (left + 0.5, top + 0.5) == (2, 2)
        assert (right - left, bottom - top) == (5 * 4, 4 * 4)
        assert axes.get_xlim() == (-0.5, 23.5)
        assert axes.get_ylim() == (19.5, -0.5)


def test_the_winner_has_its_colour_and_the_sure_ones_are_strong(drawn):
    class_map = probabilities([[0, 1, 2], [9, 8, 7]], 0.99)
    class_map[1] = probabilities([[9, 8, 7]], 0.2)[0]
    picture, figure = drawn(np.zeros((20, 30, 3), np.uint8), class_map, None, NAMES)
    colours = figure.axes[1].images[0].get_array()
    named = {patch.get_label(): patch.get_facecolor()[:3] for patch in legend(figure)}
    assert [*named] == [*NAMES]
    for (i, j), winner in np.ndenumerate(class_map.argmax(-1)):
        full = 1 - np.array(named[NAMES[winner]])  # how far from white
        share = (1 - np.asarray(colours[i, j])) / np.where(full > 0.05, full, np.nan)
        assert np.nanmin(share) == pytest.approx(np.nanmax(share))
        assert (np.nanmax(share) > 0.95) == (i == 0)
        assert (np.nanmax(share) < 0.4) == (i == 1)
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), class_map.max(-1))
    assert picture.mode == "RGB"


def legend(figure):
    return figure.legends[0].get_patches()


def test_the_window_of_the_surest_score_inside_is_shown(drawn):
    class_map = probabilities(np.zeros((4, 5), int), 0.5)
    class_map[0, 0] = probabilities([[0]], 0.9)[0, 0]  # surer, but its window leaves the image
    class_map[2, 3] = probabilities([[0]], 0.8)[0, 0]
    _, figure = drawn(np.zeros((20, 24, 1), np.uint8), class_map, FIELD, NAMES)
    assert boxes_of(figure.axes[0]) == [(SEEN, -2 + 2 * 4, -2 + 3 * 4, 12, 12)]
    assert boxes_of(figure.axes[1]) == [(SEEN, 10, 14, 4, 4)]
    assert "the 12 x 12 pixels that one score sees" in figure.axes[0].get_xlabel()


def test_an_image_smaller_than_every_window(drawn):
    field = Field((1, 2), (40, 40), (4, 4), (-6, -6))
    picture, figure = drawn(np.zeros((28, 32, 1), np.uint8), probabilities([[3, 4]]), field, NAMES)
    assert boxes_of(figure.axes[0]) == [(SEEN, -6, -6, 40, 40)]
    assert np.asarray(picture).std() > 10


def test_without_a_field_the_map_covers_the_image(drawn):
    _, figure = drawn(np.zeros((30, 20, 3), np.uint8), probabilities([[0, 1]]), None, NAMES)
    assert boxes_of(figure.axes[0]) == []
    colours = figure.axes[1].images[0]
    # One class to the left, the other to the right, all of the image between them.
    left, right, bottom, top = colours.get_extent()
    assert (left, right, bottom, top) == (-0.5, 19.5, 29.5, -0.5)


def test_known_places(drawn):
    boxes = Boxes(
        np.array([[1, 2], [9, 11]]), (8, 7), np.array([[0, 1], [2, 3]]), np.array([False, True])
    )
    _, figure = drawn(
        np.zeros((20, 24, 1), np.uint8), probabilities(np.zeros((4, 5), int)), FIELD, NAMES, boxes
    )
    missed, found, seen = boxes_of(figure.axes[0])
    assert missed == (MISSED, 1, 2, 8, 7)
    assert found == (FOUND, 9, 11, 8, 7)
    assert seen == (SEEN, *FIELD.origin(2, 3), 12, 12)  # of what was found
    assert "1 of 2 images found" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("classes", [1, 2, 20, 21, 200])
def test_any_number_of_classes(drawn, classes):
    names = [f"class {i} " + "x" * i for i in range(classes)]
    class_map = np.full((3, 3, classes), 1 / classes, np.float32)
    class_map[1, 1, classes - 1] += 0.5
    picture, figure = drawn(np.zeros((20, 20, 1), np.uint8), class_map, None, names)
    labels = [patch.get_label() for patch in legend(figure)]
    assert labels == (
        [plotting.clip(name, 24) for name in names]
        if classes <= 20
        else [plotting.clip(names[i], 24) for i in (0, classes - 1)]
    )
    assert max(map(len, labels)) <= 24
    assert picture.width < 4000


def test_hostile_names_and_wide_images(drawn):
    names = ("$\\frac{", "_hidden", "<b>", "\u30c8\u30c3\u30d7", "", "%s", "{0}", "h", "i", "j")
    picture, figure = drawn(
        np.zeros((20, 200, 4), np.uint8), probabilities([[0, 1, 2]]), None, names
    )
    assert len(legend(figure)) == 10
    tops = [axes.get_position().y0 for axes in figure.axes[:3]]
    assert tops == sorted(tops, reverse=True)
    assert len(set(tops)) == 3
    assert picture.width > 600
