"""The comparison of several runs."""

import json
import shutil
from pathlib import Path

import pytest

from cnn_jax.analysis.report import page, run_data
from tests.analysis.report.pages import Page
from tests.tiny import make_examples


def test_the_table_ranks_them(comparison_page: Path, lenet: Path, strided: Path, tfds_dir: Path):
    runs = {path.name: run_data.gather(path, data_dir=str(tfds_dir)) for path in (lenet, strided)}
    ranked = sorted(runs, key=lambda name: -runs[name].result.accuracy)
    rows = Page(comparison_page).rows("most accurate")
    assert [row[0].split()[0] for row in rows] == ranked
    for name, row in zip(ranked, rows, strict=True):
        assert row[1] == f"{100 * runs[name].result.accuracy:.1f} %"
        assert row[2] == {"lenet": "61,706", "strided": "1,588,490"}[name]
        # Two for each multiplication: from the layers' sizes, lecture, section 2.
        assert row[3] == {"lenet": "833 k", "strided": "39.4 M"}[name]
        assert row[4].endswith({"lenet": "2 epochs", "strided": "1 epoch"}[name])


def test_its_charts(comparison_page: Path):
    found = Page(comparison_page)
    names = {path.stem for path in (comparison_page.parent / "pictures").iterdir()}
    assert names == {
        "test-accuracy",
        "test-loss",
        "accuracy-parameters",
        "accuracy-flops",
        "accuracy-seconds",
        "classes",
    }
    assert len(found.pictures()) == len(found.dark_pictures()) == len(names)
    assert all("lenet" in alt or "hardest" in alt for alt, _ in found.pictures())
    assert comparison_page.stat().st_size < 3e6


def test_runs_of_one_experiment_are_told_apart_by_folder(
    lenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_data.sources, "load_examples", lambda *_: make_examples(48, seed=1))
    for name in ("a", "b"):
        shutil.copytree(lenet, tmp_path / name)
    # One without a finished epoch: it has an accuracy, but no curve and no seconds.
    (tmp_path / "b" / "metrics.jsonl").unlink()
    file = page.report([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert file == tmp_path / "comparison" / "index.html"
    rows = Page(file).rows("most accurate")
    assert sorted(row[0].split()[0] for row in rows) == ["a", "b"]
    assert [row[4] for row in rows if row[0].startswith("b")] == ["\u2013 0 epochs"]


def other_data(run: Path, to: Path, **fields: object) -> Path:
    """A copy of a run as if it had been made with other data."""
    shutil.copytree(run, to)
    saved = json.loads((to / "config.json").read_text())
    saved["config"]["data"] |= fields
    (to / "config.json").write_text(json.dumps(saved))
    return to


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"crop_padding": 2}, []),
        (
            {"name": "others"},
            [
                "evaluated on: tiny_squares/test (lenet); others/test (b)",
                "trained on: tiny_squares/train (lenet); others/train (b)",
            ],
        ),
        (
            {"test_split": "train"},
            ["evaluated on: tiny_squares/test (lenet); tiny_squares/train (b)"],
        ),
        (
            {"train_split": "train[:80]"},
            ["trained on: tiny_squares/train (lenet); tiny_squares/train[:80] (b)"],
        ),
        ({"validation_examples": 0}, ["images held out for validation: 30 (lenet); 0 (b)"]),
    ],
    ids=str,
)
def test_runs_on_different_data_are_not_compared_without_a_word(
    lenet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fields: dict,
    said: list[str],
):
    monkeypatch.setattr(run_data.sources, "load_examples", lambda *_: make_examples(48, seed=1))
    other = other_data(lenet, tmp_path / "b", **fields)
    text = Page(page.report([lenet, other], output=tmp_path / "out")).text()
    lines = [f"the runs differ in their data: {line}" for line in said]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"warning: {line}" for line in lines
    ]
    assert text.count("Not like with like") == len(lines)
    assert all(f"Not like with like: {line}." in text for line in lines)
