"""A restored run in a notebook."""

import dataclasses
import json
from html.parser import HTMLParser

from cnn_jax.models import LeNet
from tests.quick import make_run


class Cells(HTMLParser):
    """The texts of a page, and how many elements of each kind it has."""

    def __init__(self, page: str):
        super().__init__()
        self.texts, self.kinds = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.kinds.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_a_notebook_shows_the_network_the_data_and_the_metrics(tmp_path):
    lines = [
        {"step": 5, "epoch": 1, "train_loss": 0.5, "test_accuracy": 0.25},
        {"step": 7, "epoch": 2, "train_loss": 0.25, "test_accuracy": 0.75, "epoch_seconds": 3.0},
        {"step": 9, "epoch": 3, "train_loss": 0.125, "test_accuracy": 1.0},  # after the checkpoint
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = make_run(tmp_path, LeNet())
    caption, *texts = Cells(run._repr_html_()).texts
    assert caption == f"mine in {tmp_path}"
    assert dict(zip(texts[::2], texts[1::2], strict=True)) == {
        "architecture": "LeNet",
        "parameters": "61,706",
        "dataset": "tiny_squares",
        "images": "28x28x1",
        "classes": "a, b, c, d, e, f, g, h, i, j",
        "checkpoint": "step 7",
        "epoch": "2",
        "train loss": "0.2500",
        "test accuracy": "0.7500",
    }


def test_names_are_text_in_a_notebook(tmp_path):
    names = ("<script>alert(1)</script>", *map(str, range(24)))
    run = dataclasses.replace(make_run(tmp_path, LeNet()), class_names=names, experiment="<b>&")
    page = Cells(run._repr_html_())
    assert page.kinds == {"table", "caption", "tr", "th", "td"}
    assert f"<b>& in {tmp_path}" in "".join(page.texts)
    assert f"{names[0]}, 0, 1, 2, 3" in "".join(page.texts)
    assert "18, ... 25" in "".join(page.texts)
