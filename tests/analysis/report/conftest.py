"""Small trained runs and their reports."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnn_jax.analysis import plotting
from cnn_jax.analysis.report import page, run_data
from cnn_jax.config import Config, DataConfig
from cnn_jax.data.splits import Splits
from cnn_jax.models import LeNet, StridedCNN
from cnn_jax.train import loop
from tests.tiny import make_examples


@pytest.fixture(scope="module", autouse=True)
def _few_pixels() -> Iterator[None]:
    """Draws faster; only the command's own test draws as finely as people see it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "DPI", 100)
        yield


@pytest.fixture(scope="session")
def lenet(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """The workdir of LeNet after two epochs, with validation; its 48 test images are tiny_squares'."""
    workdir = tmp_path_factory.mktemp("runs") / "lenet"
    config = Config(
        model=LeNet(),
        data=DataConfig("tiny_squares", validation_examples=30),
        epochs=2,
        batch_size=16,
        eval_batch_size=20,  # 48 is no multiple of it
        learning_rate=5e-4,
        devices=1,
    )
    splits = Splits(splits.train, make_examples(30, seed=2), splits.test)
    loop.train(config, workdir, "fashion_mnist/lenet", splits=splits)
    return workdir


@pytest.fixture(scope="session")
def strided(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """The workdir of the strided network after one epoch, without validation."""
    workdir = tmp_path_factory.mktemp("runs") / "strided"
    config = Config(
        model=StridedCNN(),
        data=DataConfig("tiny_squares"),
        epochs=1,
        batch_size=32,
        eval_batch_size=48,
        devices=1,
    )
    loop.train(config, workdir, "fashion_mnist/strided", splits=splits)
    return workdir


@pytest.fixture(scope="session")
def lenet_page(lenet: Path, tfds_dir: Path) -> Path:
    """The report of `lenet`."""
    return page.report([lenet], data_dir=str(tfds_dir))


@pytest.fixture(scope="session")
def strided_page(strided: Path, tfds_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `strided`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("reports") / "strided"
    return page.report([strided], data_dir=str(tfds_dir), output=folder)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src="x" onerror="alert(1)">',
    "$\\frac{",
    "{{ 7 * 7 }}",
    "&amp;",
    "\u30c8\u30c3\u30d7\u30b9",
    "a very long name " * 8,
    "x" * 90,
    "line\nbreak",
    "\u202eright to left'",
)


@pytest.fixture(scope="session")
def hostile_pages(
    lenet: Path, strided: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A report and a comparison of runs whose classes and experiment are called HOSTILE."""
    folder = tmp_path_factory.mktemp("a_folder_of_a_long_name_without_any_space_in_it_at_all")
    for original in (lenet, strided):
        shutil.copytree(original, folder / original.name)
        file = folder / original.name / "config.json"
        changed = {"class_names": HOSTILE, "experiment": HOSTILE[0]}
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    test = dataclasses.replace(make_examples(48, seed=1), class_names=HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data.sources, "load_examples", lambda *_: test)
        one = page.report([folder / "lenet"])
        return one, page.report([folder / "lenet", folder / "strided"])


@pytest.fixture(scope="session")
def comparison_page(
    lenet: Path, strided: Path, tfds_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The comparison of both."""
    folder = tmp_path_factory.mktemp("reports") / "both"
    return page.report([lenet, strided], data_dir=str(tfds_dir), output=folder)
