"""A cache of decoded splits: one file for each split, with checksums.

Decoding 60,000 PNG images takes seconds; reading the decoded images takes a tenth of a second. A
file is used only if the dataset's files have not changed since and its content matches its SHA-256
sums; otherwise it is written again. It holds three NumPy arrays, one after another: a description
in JSON, the images, the labels.
"""

import hashlib
import json
import logging
import os
import tempfile
import textwrap
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cnn_jax.common import cache

log = logging.getLogger(__name__)
FORMAT = 2


def fingerprint(path: Path) -> list:
    """Names, sizes and modification times of a file, or of all files below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(p, p.stat()) for p in files if p.exists()]
    return [[str(p.relative_to(path)), s.st_size, s.st_mtime_ns] for p, s in stats]


def read(key: dict, memory_bytes: int) -> dict | None:
    """The arrays "image" and "label" and the "class_names" stored under `key`.

    None if there is no file, or if it was made from other versions of the dataset's files, is
    larger than `memory_bytes`, or is damaged (with a warning).
    """
    if not cache.cache_enabled():
        return None
    path = _path(key)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > memory_bytes:
                return None
            about = json.loads(_read_array(file).tobytes())
            if about["key"] != key:
                return None
            image, label = _read_array(file), _read_array(file)
        class_names = tuple(about["class_names"])
        if _sums(image, label, class_names) != about["sha256"]:
            raise ValueError("checksum mismatch")
        return {"image": image, "label": label, "class_names": class_names}
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy and json raise many types for a damaged file
        reason = textwrap.shorten(str(error), 120, placeholder=" ...")
        log.warning("warning: decoded images in %s are damaged (%s): made again", path, reason)
        return None


def write(key: dict, image: np.ndarray, label: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Stores a split under `key`; only warns if the disk is full or read-only."""
    if not cache.cache_enabled():
        return
    path = _path(key)
    sums = _sums(image, label, class_names)
    about = json.dumps({"key": key, "sha256": sums, "class_names": class_names})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
            with open(Path(scratch, "new"), "wb") as file:
                for array in (np.frombuffer(about.encode(), np.uint8), image, label):
                    np.lib.format.write_array(file, array, allow_pickle=False)
            os.replace(Path(scratch, "new"), path)  # a reader sees the old file or the new one
    except OSError as error:
        log.warning("warning: decoded images could not be kept in %s: %s", path.parent, error)


def _read_array(file: BinaryIO) -> np.ndarray:
    return np.lib.format.read_array(file, allow_pickle=False)


def _path(key: dict) -> Path:
    stable = {name: value for name, value in key.items() if name != "files"}
    digest = hashlib.sha256(json.dumps([FORMAT, stable], sort_keys=True).encode()).hexdigest()[:16]
    dataset = key["dataset"].replace("/", "_").replace(":", "_")
    return cache.cache_dir() / "decoded" / f"{dataset}-{digest}.arrays"


def _sums(image: np.ndarray, label: np.ndarray, class_names: tuple[str, ...]) -> dict[str, str]:
    sums = {"class_names": hashlib.sha256(json.dumps(class_names).encode()).hexdigest()}
    for name, array in (("image", image), ("label", label)):
        # Include type and shape: in another byte order, the same bytes are other labels.
        digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
        sums[name] = digest.hexdigest()
    return sums
