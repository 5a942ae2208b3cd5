"""Small files in the formats in which the authors of MNIST, EMNIST and CIFAR publish theirs."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np

EXAMPLES = {"train": 50, "test": 20}
# The letters' files hold more than TFDS takes.
LETTERS = {"train": 40, "test": 15}
NAMES = ("mnist", "fashion_mnist", "kmnist", "emnist/letters", "cifar10", "cifar100")


def make_raw(name: str, split: str) -> dict[str, np.ndarray]:
    """Images uint8 [n, H, W, C] and labels uint8 [n] in the order of the files; noise."""
    random = np.random.default_rng([NAMES.index(name), split == "test"])
    count = EXAMPLES[split]
    shape = (32, 32, 3) if name.startswith("cifar") else (28, 28, 1)
    features = {
        "image": random.integers(0, 256, (count, *shape), np.uint8),
        "label": random.integers(0, 100 if name == "cifar100" else 10, count, np.uint8),
    }
    if name == "cifar100":
        features["coarse_label"] = random.integers(0, 20, count, np.uint8)
    return features


def idx(array: np.ndarray) -> bytes:
    """http://yann.lecun.com/exdb/mnist: type and rank, the shape, the values."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes(), 1)


def write_raw(name: str, folder: Path) -> list[Path]:
    """Writes the dataset's files, named as TFDS knows them; returns their paths."""
    folder.mkdir(parents=True)
    raw = {split: make_raw(name, split) for split in EXAMPLES}
    if name.startswith("cifar"):
        return [_write_cifar(name, raw, folder)]
    files = {}
    for split, published in (("train", "train"), ("test", "t10k")):
        prefix = f"gzip/emnist-letters-{split}" if name == "emnist/letters" else published
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(raw[split]["image"][:, :, :, 0])
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(raw[split]["label"])
    if name == "emnist/letters":
        with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
        return [folder / "gzip.zip"]
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return [folder / file for file in files]


def _write_cifar(name: str, raw: dict[str, dict[str, np.ndarray]], folder: Path) -> Path:
    """https://www.cs.toronto.edu/~kriz/cifar.html: labels, then a plane a colour."""
    records = {
        split: [
            bytes(
                [*([values["coarse_label"][i]] if name == "cifar100" else []), values["label"][i]]
            )
            + values["image"][i].transpose(2, 0, 1).tobytes()
            for i in range(EXAMPLES[split])
        ]
        for split, values in raw.items()
    }
    if name == "cifar10":
        prefix, files = "cifar-10-batches-bin", {"test_batch.bin": records["test"]}
        files |= {
            f"data_batch_{i + 1}.bin": records["train"][10 * i : 10 * i + 10] for i in range(5)
        }
        labels = {"batches.meta.txt": 10}
    else:
        prefix = "cifar-100-binary"
        files = {"train.bin": records["train"], "test.bin": records["test"]}
        labels = {"fine_label_names.txt": 100, "coarse_label_names.txt": 20}
    contents = {file: b"".join(rows) for file, rows in files.items()}
    for file, count in labels.items():
        contents[file] = "".join(f"class_{i}\n" for i in range(count)).encode() + b"\n"
    path = folder / f"{prefix.removesuffix('-batches-bin').removesuffix('-binary')}-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for file, content in contents.items():
            member = tarfile.TarInfo(f"{prefix}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# Prepares each of NAMES in data_dir argv[2] from the files in argv[1]/NAME and saves what its
# records hold: as TFDS's own builders do it, if argv[3] is "official".
PREPARE = """
import gzip, hashlib, io, shutil, sys, tempfile
from pathlib import Path
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.image_classification import mnist
from tensorflow_datasets.proto import tf_example_pb2
from cnn_jax.data import download, raw_files, tfds_builder
from tests.data.raw import EXAMPLES, LETTERS, NAMES

raw, data_dir, official = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "official"
for config in mnist.EMNIST.BUILDER_CONFIGS:
    config.train_examples, config.test_examples = LETTERS["train"], LETTERS["test"]
mnist._TRAIN_EXAMPLES, mnist._TEST_EXAMPLES = EXAMPLES["train"], EXAMPLES["test"]

def local_files(builder):
    for path in sorted((raw / builder.name).iterdir()):
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        yield download.RemoteFile(path.name, len(content), sha256, ("http://127.0.0.1:9/",))

def unpack(source):
    if isinstance(source, dict):
        return {key: unpack(value) for key, value in source.items()}
    path = Path(source)
    if not path.exists():
        path = raw / builder.name / path.name
    out = Path(tempfile.mkdtemp())
    if path.suffix == ".gz" and not path.name.endswith(".tar.gz"):
        (out / "file").write_bytes(gzip.decompress(path.read_bytes()))
        return str(out / "file")
    shutil.unpack_archive(path, out)
    return str(out)

raw_files.remote_files = lambda builder: list(local_files(builder))
tfds.download.DownloadManager.download_and_extract = lambda self, source: unpack(source)
tfds.download.DownloadManager.extract = lambda self, source: unpack(source)
for name in NAMES:
    builder = tfds.builder(name, data_dir=data_dir)
    if official:
        builder.download_and_prepare(file_format="array_record")
    else:
        shutil.copytree(raw / builder.name, Path(data_dir, "downloads", builder.name))
        tfds_builder.prepare(name, data_dir, download=True)
    builder = tfds.builder(name, data_dir=data_dir)
    for split, info in builder.info.splits.items():
        values = {}
        for shard in info.file_instructions:
            for record in ArrayRecordReader(shard.filename).read_all():
                for key, value in tf_example_pb2.Example.FromString(record).features.feature.items():
                    (value,) = value.bytes_list.value or value.int64_list.value
                    if key == "image":
                        value = np.asarray(Image.open(io.BytesIO(value)))
                    values.setdefault(key, []).append(value)
        np.savez(Path(data_dir, f"{builder.name}-{split}.npz"), **values)
assert official == ("tensorflow" in sys.modules)
"""
