"""Six public datasets, prepared from files in their formats without importing TensorFlow."""

import functools
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cnn_jax.common.errors import DataError
from cnn_jax.config import DataConfig
from cnn_jax.data import download, raw_files, tfds_builder
from cnn_jax.data.sources import load_examples
from tests.data.raw import EXAMPLES, LETTERS, NAMES, PREPARE, make_raw, write_raw
from tests.tiny import run_python


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with the six datasets, and what their records hold as NAME-SPLIT.npz."""
    folder = tmp_path_factory.mktemp("raw")
    for name in NAMES:
        write_raw(name, folder / "raw" / name.partition("/")[0])
    run_python(PREPARE, folder / "raw", folder / "tfds", "ours")
    return folder / "tfds"


def in_tfds_order(folder: Path, split: str, count: int) -> list[int]:
    """The order into which TFDS itself brings examples whose keys are 0, 1, 2, ..."""

    class Numbers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"number": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: ((i, {"number": i}) for i in range(count))}

        def _generate_examples(self):
            raise NotImplementedError

    with tfds_builder.quiet():
        builder = Numbers(data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
        return [int(example["number"]) for example in builder.as_data_source(split)]


@pytest.mark.parametrize("split", EXAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_records_are_the_files_examples_in_tfds_order(
    prepared: Path, tmp_path: Path, name: str, split: str
):
    count = LETTERS[split] if name == "emnist/letters" else EXAMPLES[split]
    order = in_tfds_order(tmp_path, split, count)
    assert sorted(order) == list(range(count))
    assert order != sorted(order)
    expected = {key: values[order] for key, values in make_raw(name, split).items()}
    expected["image"] = expected["image"].squeeze(-1) if "mnist" in name else expected["image"]
    if name.startswith("cifar"):
        expected["id"] = np.array([f"{split}_{i:05d}".encode() for i in order])
    with np.load(prepared / f"{name.partition('/')[0]}-{split}.npz") as found:
        assert set(found) == set(expected)
        for key, values in expected.items():
            np.testing.assert_array_equal(found[key], values)


def test_tfds_and_training_read_what_was_prepared(prepared: Path):
    builder = tfds.builder("cifar100", data_dir=str(prepared))
    assert builder.is_prepared()
    assert builder.info.features["label"].names == [f"class_{i}" for i in range(100)]
    assert builder.info.features["coarse_label"].names == [f"class_{i}" for i in range(20)]
    info = json.loads((prepared / "cifar100/3.0.2/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    assert info["moduleName"] == "tensorflow_datasets.image_classification.cifar"
    examples = load_examples(DataConfig("cifar100"), "test", str(prepared))
    with np.load(prepared / "cifar100-test.npz") as records:
        np.testing.assert_array_equal(examples.image, records["image"])
        np.testing.assert_array_equal(examples.label, records["label"])


@pytest.mark.parametrize(
    ("name", "hosts", "file", "size", "sha256"),
    [
        # Sizes and sums as the files' users publish them elsewhere.
        (
            "mnist",
            ["storage.googleapis.com", "ossci-datasets.s3.amazonaws.com"],
            "train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "kmnist",
            ["codh.rois.ac.jp", "codh.rois.ac.jp"],
            "train-images-idx3-ubyte.gz",
            18_165_135,
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        ),
        (
            "cifar10",
            [
                "storage.googleapis.com",
                "mindspore-website.obs.cn-north-4.myhuaweicloud.com",
                "www.cs.toronto.edu",
            ],
            "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ],
)
def test_tfds_checksums_and_the_order_of_hosts(
    tmp_path: Path, name: str, hosts: list[str], file: str, size: int, sha256: str
):
    files = raw_files.remote_files(tfds_builder.open_builder(name, str(tmp_path)))
    (found,) = (each for each in files if each.name == file)
    assert (found.size, found.sha256) == (size, sha256)
    assert [url.split("/")[2] for url in found.urls] == hosts
    assert all(url.endswith("/" + file) for url in found.urls)


@pytest.mark.parametrize("name", NAMES)
def test_only_tfds_own_six_are_known(tmp_path: Path, name: str):
    builder = tfds_builder.open_builder(name, str(tmp_path))
    assert raw_files.is_known(builder)
    assert len(raw_files.remote_files(builder)) == (4 if name.endswith("mnist") else 1)
    other = type("Mnist", (type(builder),), {"__module__": "elsewhere"}, skip_registration=True)
    assert not raw_files.is_known(other(data_dir=str(tmp_path)))


@pytest.fixture
def mnist_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves MNIST's files on loopback in place of its hosts; the list holds what was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(f"{self.command} {self.path}")

    paths = write_raw("mnist", tmp_path / "served")
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        files = [
            download.RemoteFile(
                path.name,
                path.stat().st_size,
                hashlib.sha256(path.read_bytes()).hexdigest(),
                (f"http://127.0.0.1:{server.server_port}/{path.name}",),
            )
            for path in paths
        ]
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("CNN_JAX_CACHE", "off")
        monkeypatch.setattr(raw_files, "remote_files", lambda builder: files)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def load_mnist(folder: Path) -> list[bytes]:
    """The training images, in the order of their bytes."""
    examples = load_examples(DataConfig("mnist"), "train", str(folder), download=True)
    return sorted(map(bytes, examples.image))


def test_download_keeps_the_files_and_asks_for_what_is_missing(
    mnist_host: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
):
    folder = tmp_path / "tfds"
    expected = sorted(map(bytes, make_raw("mnist", "train")["image"]))
    assert load_mnist(folder) == expected
    assert sum(line.startswith("GET") for line in mnist_host) == 4
    # Neither TFDS's bars nor anything else but a line for each file.
    printed = capfd.readouterr()
    lines = f"{printed.out}\n{printed.err}".split("\n")
    assert [line for line in filter(None, lines) if not line.startswith("fetching ")] == []
    # Prepared again from the files that were kept, wherever in downloads/ they lie.
    shutil.rmtree(folder / "mnist")
    mnist_host.clear()
    kept = folder / "downloads/mnist"
    (folder / "downloads/manual").mkdir()
    (kept / "train-labels-idx1-ubyte.gz").rename(folder / "downloads/manual/of another name")
    (kept / "t10k-labels-idx1-ubyte.gz").rename(folder / "downloads/t10k-labels-idx1-ubyte.gz")
    assert load_mnist(folder) == expected
    assert mnist_host == []
    # A file that changed is none of them.
    shutil.rmtree(folder / "mnist")
    path = kept / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert load_mnist(folder) == expected
    assert [line.split("/")[-1] for line in mnist_host if line.startswith("GET")] == [path.name]


def test_folder_that_cannot_be_written(mnist_host: list[str], tmp_path: Path):
    (tmp_path / "tfds").mkdir()
    (tmp_path / "tfds" / "downloads").touch()
    with pytest.raises(DataError, match=r"^data.name=mnist: cannot be prepared in data_dir="):
        load_mnist(tmp_path / "tfds")
