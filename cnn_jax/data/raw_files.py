"""MNIST and its relatives, CIFAR-10 and CIFAR-100 from the files that their authors publish.

TFDS's own builders of these six datasets need TensorFlow to open the files and to encode the
images. Here Python's standard library opens the files and Pillow encodes the images. TFDS does the
rest: names, versions, features, keys (which set the order of the examples), and written files.
"""

import contextlib
import functools
import gzip
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from PIL import Image

from cnn_jax.data import download

# Folders with the same files as TFDS's own addresses. A file from any host must have the size and
# the SHA-256 that TFDS recorded.
MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",),
    "fashion_mnist": (
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    "kmnist": ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    "emnist": ("https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/",),
    "cifar10": (
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/",
    ),
    "cifar100": ("https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/",),
}
# It has sent only 55 to 80 kB/s since June 2026 (pytorch/vision#9536), so it is asked last.
SLOW_HOST = "www.cs.toronto.edu"
PIXELS = 28 * 28

Example = tuple[int, dict[str, Any]]


def is_known(builder: Any) -> bool:
    """Whether `builder` is TFDS's own builder of one of the six datasets."""
    return builder.name in MIRRORS and builder.__module__.startswith("tensorflow_datasets.")


def remote_files(builder: Any) -> list[download.RemoteFile]:
    """The files that `builder` needs, with TFDS's recorded sizes and checksums."""
    files = []
    for url, info in builder.url_infos.items():
        urls = [url, *(folder + info.filename for folder in MIRRORS[builder.name])]
        urls.sort(key=lambda address: SLOW_HOST in address)  # stable: keeps the order of the others
        size, sha256 = int(info.size), info.checksum
        files.append(download.RemoteFile(info.filename, size, sha256, tuple(urls)))
    return files


def missing(builder: Any, downloads: Path) -> list[download.RemoteFile]:
    """The needed files that are not in `downloads` yet."""
    found = _found(builder, downloads)
    return [file for file in remote_files(builder) if file.name not in found]


@contextlib.contextmanager
def source(builder: Any, downloads: Path) -> Iterator[None]:
    """Downloads missing files; inside the context, `builder` prepares the dataset from the files.

    Raises:
      DataError: as `download.fetch`.
    """
    fetched = download.fetch(missing(builder, downloads), downloads / builder.name)
    paths = _found(builder, downloads) | {path.name: path for path in fetched}
    with download.bar(rich.progress.MofNCompleteColumn()) as shown:
        # TFDS calls this method, which each dataset defines, to get the splits.
        builder._split_generators = functools.partial(_split_generators, builder, paths, shown)
        yield


def _found(builder: Any, downloads: Path) -> dict[str, Path]:
    """Complete files in `downloads`, from this program, from TFDS or put there by hand."""
    folders = [downloads / builder.name, downloads / "manual", downloads]
    there = [path for folder in folders for path in sorted(folder.glob("*"))]
    files = remote_files(builder)
    return {file.name: path for file in files for path in there if file.is_at(path)}


def _split_generators(
    builder: Any, paths: dict[str, Path], shown: rich.progress.Progress, dl_manager: Any
) -> dict[str, Iterator[Example]]:
    read = _read_cifar if builder.name.startswith("cifar") else _read_mnist
    return {split: read(builder, paths, shown, split) for split in ("train", "test")}


def _read_mnist(
    builder: Any, paths: dict[str, Path], shown: rich.progress.Progress, split: str
) -> Iterator[Example]:
    """Keys and examples from two gzipped idx files: a header, then one unsigned byte per value."""
    prefix, count = ("train" if split == "train" else "t10k"), -1
    with contextlib.ExitStack() as stack:

        def open_idx(kind: str) -> gzip.GzipFile:
            name = f"{prefix}-{kind}-ubyte.gz"
            return stack.enter_context(gzip.open(archive.open(name) if archive else paths[name]))

        archive = None
        if builder.name == "emnist":
            config = builder.builder_config
            # The files of the letters hold more examples than TFDS uses.
            count = config.train_examples if split == "train" else config.test_examples
            prefix = f"gzip/emnist-{config.name}-{split}"
            archive = stack.enter_context(zipfile.ZipFile(paths["gzip.zip"]))
        images, labels = open_idx("images-idx3"), open_idx("labels-idx1")
        images.read(16)
        labels.read(8)
        for key, label in shown.track(list(enumerate(labels.read(count))), description=split):
            image = Image.frombytes("L", (28, 28), images.read(PIXELS))
            yield key, {"image": image, "label": label}


def _read_cifar(
    builder: Any, paths: dict[str, Path], shown: rich.progress.Progress, split: str
) -> Iterator[Example]:
    """Keys and examples from records: one or two labels, then 3,072 bytes, one plane per colour."""
    about = builder._cifar_info
    with tarfile.open(next(iter(paths.values()))) as archive:

        def read(name: str) -> bytes:
            stream = archive.extractfile(about.prefix + name)
            assert stream is not None, "it is a file, not a folder"
            return stream.read()

        for feature, name in zip(about.label_keys, about.label_files, strict=True):
            names = read(name).decode().splitlines()
            builder.info.features[feature].names = [line for line in names if line]
        files = about.train_files if split == "train" else about.test_files
        data = np.frombuffer(b"".join(map(read, files)), np.uint8)
    records = data.reshape(-1, len(about.label_keys) + 3072)
    labels, planes = np.split(records, [len(about.label_keys)], axis=1)
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for key in shown.track(range(len(records)), description=split):
        example = dict(zip(about.label_keys, map(int, labels[key]), strict=True))
        image = Image.fromarray(np.ascontiguousarray(images[key]))
        yield key, example | {"id": f"{split}_{key:05d}", "image": image}
