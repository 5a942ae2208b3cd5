"""What needs TensorFlow: TFRECORD files, and TFDS's own builders as the reference for ours.

TensorFlow stays out of the tests' process; without it, conftest.py deselects this file.
"""

from pathlib import Path

import numpy as np
import pytest

from cnn_jax.config import DataConfig
from cnn_jax.data.sources import load_examples
from tests.data.raw import NAMES, PREPARE, write_raw
from tests.tiny import run_python


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the records of the six datasets hold: ours/NAME-SPLIT.npz and official/NAME-SPLIT.npz."""
    folder = tmp_path_factory.mktemp("both")
    for name in NAMES:
        write_raw(name, folder / "raw" / name.partition("/")[0])
    for who in ("ours", "official"):
        run_python(PREPARE, folder / "raw", folder / who, who)
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", [name.partition("/")[0] for name in NAMES])
def test_records_equal_those_of_tfds_own_builder_one_by_one(both: Path, name: str, split: str):
    file = f"{name}-{split}.npz"
    with np.load(both / "ours" / file) as ours, np.load(both / "official" / file) as official:
        assert set(ours) == set(official) >= {"image", "label"}
        for key in official:
            assert len(official[key]) >= 15
            np.testing.assert_array_equal(ours[key], official[key])


TWIN = """
import sys
from pathlib import Path
import numpy as np
from cnn_jax.config import DataConfig
from cnn_jax.data.sources import load_examples
from cnn_jax.common.errors import DataError
from tests.tiny import prepare_tiny_squares
folder = Path(sys.argv[1])
prepare_tiny_squares(folder, "tfrecord")
data = DataConfig("tiny_squares")
try:
    load_examples(data, "train", str(folder), memory_bytes=1)
except DataError as error:
    print("error:", error)
for split in ("train", "test", "train[20:40]"):
    loaded = load_examples(data, split, str(folder))
    np.savez(folder / f"{split}.npz", image=loaded.image, label=loaded.label)
(shard,) = folder.glob("*/*/*-train.tfrecord-*")
whole = shard.read_bytes()
spoiled = {"flip": whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:], "cut": whole[:-100]}
# The lengths of the first two records lead to the third: a file that ends there is whole.
end = 0
for _ in range(2):
    end += 16 + int.from_bytes(whole[end : end + 8], "little")
for content in [*spoiled.values(), whole[:end], None]:
    shard.unlink()
    if content is not None:
        shard.write_bytes(content)
    try:
        load_examples(data, "train", str(folder))
    except DataError as error:
        print("error:", error)
    if content == spoiled["flip"]:  # what comes before the damage is not touched by it
        print("before:", len(load_examples(data, "train[:5]", str(folder))))
"""


def test_tfrecord_equals_its_array_record_twin(tfds_dir: Path, tmp_path: Path):
    # TensorFlow stays out of this process.
    printed = run_python(TWIN, tmp_path, CNN_JAX_CACHE_DIR=str(tmp_path / "cache"))
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    data = DataConfig("tiny_squares")
    for split in ("train", "test", "train[20:40]"):
        expected = load_examples(data, split, str(tfds_dir))
        with np.load(tmp_path / f"{split}.npz") as twin:
            np.testing.assert_array_equal(twin["image"], expected.image)
            np.testing.assert_array_equal(twin["label"], expected.label)
    assert "before: 5" in printed.splitlines()
    large, flipped, cut, short, absent = lines
    assert "too large for memory" in large
    assert "--download with another --data_dir" in large
    (name,) = {p.name for p in (tfds_dir / "tiny_squares/1.0.0").glob("*-train*")}
    shard = name.replace("array_record", "tfrecord")
    assert f"{shard}: record " in flipped
    assert f"{shard}: record 159: damaged" in cut
    assert f"{shard}: 2 records, 160 by its dataset_info.json" in short
    assert f"{shard}: no such file" in absent
    assert "{{" not in flipped + cut  # TensorFlow's way of naming places
