"""Small data that a network can learn, and commands run as processes of their own."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from cnn_jax.data.examples import InMemory

REPOSITORY = Path(__file__).parent.parent
CLASS_NAMES = tuple("abcdefghij")


def make_examples(count: int, shape: tuple[int, int, int] = (28, 28, 1), seed: int = 0) -> InMemory:
    """Noise with a bright square whose place is the label: learnable in a few steps."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 64, (count, *shape), dtype=np.uint8)
    label = (np.arange(count) % 10).astype(np.int32)
    random.shuffle(label)
    for i, k in enumerate(label):
        row, column = 4 + 8 * (k // 4), 2 + 6 * (k % 4)
        image[i, row : row + 6, column : column + 5] += 150
    return InMemory(image, label, CLASS_NAMES)


def prepare_tiny_squares(data_dir: Path, file_format: str = "array_record", shift: int = 0) -> None:
    """Writes `make_examples` as a TFDS dataset named tiny_squares, as TFDS itself would.

    `shift` is added to each label.
    """
    import tensorflow_datasets as tfds

    class TinySquares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASS_NAMES),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(160, 0),
                "test": self._generate_examples(48, 1),
            }

        def _generate_examples(self, count, seed):
            examples = make_examples(count, seed=seed)
            for i in range(count):
                encoded = io.BytesIO()
                Image.fromarray(examples.image[i, :, :, 0]).save(encoded, "PNG")
                encoded.seek(0)
                yield i, {"image": encoded, "label": int(examples.label[i] + shift) % 10}

    TinySquares(data_dir=str(data_dir), file_format=file_format).download_and_prepare()


def png_file(
    width: int,
    height: int,
    rows: bytes,
    depth: int = 8,
    kind: int = 0,
    interlaced: int = 0,
    **chunks,
) -> bytes:
    """A PNG file made by hand, also of what Pillow does not write, or of less than it claims.

    Args:
      width: in pixels.
      height: in pixels.
      rows: the pixels, each row behind a byte 0, which is its filter.
      depth: bits a channel.
      kind: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
      interlaced: 1 if `rows` are those of the seven passes.
      **chunks: more of them, by name.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    more = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def run_command(*arguments: str, **environment: str):
    """`python -m cnn_jax.main ARGUMENTS` as a process of its own, on one device."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "cnn_jax.main", *map(str, arguments)],
        cwd=environment.get("CWD", REPOSITORY),
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
    )


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """What `code` prints in a process of its own; its warnings are errors too."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
