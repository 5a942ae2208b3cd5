"""Finds the images of a user's own dataset: in folders of classes, or in the rows of a table."""

import collections
import csv
import io
import itertools
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cnn_jax.common import decode, files
from cnn_jax.common.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
# The columns of a table, by the names that others use.
COLUMNS = {
    "file": ("file", "image", "filename", "file_name", "path", "filepath", "image_path"),
    "label": ("label", "class", "category"),
    "split": ("split",),
}


class ImageFile(NamedTuple):
    """An image of a dataset.

    Attributes:
      file: its path, relative to the dataset's folder.
      class_name: as text that can be printed.
      split: train, test or validation; empty if the dataset has no splits.
      size: in bytes; -1 if the file cannot be read.
      modified: its time, in nanoseconds.
    """

    file: str
    class_name: str
    split: str
    size: int
    modified: int


class Listing(NamedTuple):
    """The images of a dataset, and what a user should know about them, a line each."""

    images: list[ImageFile]
    remarks: list[str]


def find(name: str) -> tuple[str, Listing]:
    """The folder that the files of a dataset are relative to, and its images.

    Args:
      name: a folder, or a .csv, .tsv or .jsonl file.

    Raises:
      DataError: it does not exist, cannot be read, or has no labelled image.
    """
    if os.path.isdir(name):
        return name, _from_folder(name)
    if not os.path.isfile(name):
        raise DataError(f"data.name={name}: no such folder or file")
    return os.path.dirname(name), _from_table(name)


# ----------------------------------------------------------------------------------- folders


def _from_folder(root: str) -> Listing:
    """The images below `root`, as CLASS/... or SPLIT/CLASS/..., in the order of their names."""
    found = _Walk(root)
    tops = {parts[0] for parts in found.images if len(parts) > 1}
    with_classes = {parts[0] for parts in found.images if len(parts) > 2}
    splits = {top for top in tops & with_classes if top.lower() in SPLITS}
    _check_tops(root, tops, splits)
    depth = 1 if splits else 0  # of the part that names the class
    images, outside = [], []
    for parts, status in found.images.items():
        if len(parts) < depth + 2 or (splits and parts[0] not in splits):
            outside.append(parts)
            continue
        split = SPLITS[parts[0].lower()] if splits else ""
        images.append(_image(os.path.join(*parts), parts[depth], split, status))
    if not images:
        raise DataError(
            f"data.name={root}: no image in a folder of its class; write {root}/CLASS/IMAGE or "
            f"{root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE"
        )
    named = {
        _class_name(parts[depth])
        for parts in found.folders
        if len(parts) == depth + 1 and (not splits or parts[0] in splits)
    }
    return Listing(images, [*found.remarks(outside), *_remarks(images, named)])


class _Walk:
    """All files and folders below a folder, without hidden ones; links are followed, loops are not.

    Attributes:
      images: by the parts of their paths: size in bytes and time of the last change.
      folders: the parts of their paths.
    """

    def __init__(self, root: str):
        self.root = root
        self.images: dict[tuple[str, ...], os.stat_result | None] = {}
        self.folders: list[tuple[str, ...]] = []
        self.others: collections.Counter[str] = collections.Counter()
        self.loops: list[str] = []
        status = os.stat(root)
        self._visit((), {(status.st_dev, status.st_ino)})

    def _visit(self, parts: tuple[str, ...], above: set[tuple[int, int]]) -> None:
        try:
            with os.scandir(os.path.join(self.root, *parts)) as entries:
                inside = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            folder = os.path.join(self.root, *parts)
            raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
        for entry in inside:
            if files.is_left_out(entry.name):
                continue
            path = (*parts, entry.name)
            try:
                status = entry.stat()
            except OSError:  # a link to nothing, or to itself
                status = None
            if status and entry.is_dir():
                own = (status.st_dev, status.st_ino)
                if own in above:
                    self.loops.append(os.path.join(*path))
                    continue
                self.folders.append(path)
                self._visit(path, above | {own})
            elif os.path.splitext(entry.name)[1].lower() in decode.suffixes():
                self.images[path] = status
            else:
                self.others[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1

    def remarks(self, outside: list[tuple[str, ...]]) -> Iterator[str]:
        """What was left out, a line each."""
        if outside:
            first = files.printable(os.path.join(*outside[0]))
            yield f"left out, images in no folder of a class: {len(outside)} (first: {first})"
        if self.others:
            counts = self.others.most_common(5)
            kinds = ", ".join(f"{n} {files.printable(kind)}" for kind, n in counts)
            yield f"left out, files that by their names are no images: {kinds}"
        if self.loops:
            yield f"not followed, links to a folder above them: {files.printable(self.loops[0])}"


def _check_tops(root: str, tops: set[str], splits: set[str]) -> None:
    """Refuses folders whose meaning is not clear.

    Args:
      root: the dataset.
      tops: the folders in it that hold images.
      splits: those of them that are splits.
    """
    if splits and (others := sorted(top for top in tops - splits if top.lower() not in SPLITS)):
        raise DataError(
            f"data.name={root}: holds the splits {_names(splits)} beside {_names(others)}; a dataset "
            "has either folders of splits or folders of classes"
        )
    if not splits and tops and all(top.lower() in SPLITS for top in tops):
        raise DataError(
            f"data.name={root}: {_names(tops)} holds images, but no folder for each class; write "
            f"{root}/{min(tops)}/CLASS/IMAGE"
        )
    by_split = collections.defaultdict(list)
    for top in sorted(splits):
        by_split[SPLITS[top.lower()]].append(top)
    for split, same in by_split.items():
        if len(same) > 1:
            raise DataError(
                f"data.name={root}: {_names(same)} are both the {split} split; join the two folders"
            )


def _remarks(images: list[ImageFile], named: set[str]) -> Iterator[str]:
    """Empty classes, and files that differ in their ending alone."""
    if empty := sorted(named - {image.class_name for image in images}):
        yield f"left out, classes whose folders hold no image: {_names(empty)}"
    stems = collections.Counter(os.path.splitext(image.file)[0] for image in images)
    if several := [stem for stem, count in stems.items() if count > 1]:
        yield (
            f"images whose names differ in their ending alone, all taken: {len(several)} "
            f"(first: {files.printable(several[0])})"
        )


# ------------------------------------------------------------------------------------ tables


def _from_table(path: str) -> Listing:
    """The images that the rows of a table name, in their order."""
    root, images, missing = os.path.dirname(path), [], []
    seen: dict[str, int] = {}
    for line, row in _rows(path):
        file = _spelled(root, row["file"])
        place = f"{path}: line {line}"
        if not file or not row["label"]:
            raise DataError(f"{place}: has no {'label' if file else 'file'}")
        split = SPLITS.get(row["split"].lower()) if row["split"] is not None else ""
        if split is None:
            allowed = ", ".join(SPLITS)
            raise DataError(f"{place}: split {row['split']!r}: must be one of {allowed}")
        if (first := seen.setdefault(os.path.normpath(file), line)) != line:
            raise DataError(f"{place}: {file} stands in line {first} already; keep one of the two")
        try:
            status = os.stat(os.path.join(root, file))
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            reason = getattr(error, "strerror", None) or error
            missing.append(f"{place}: {file}: {reason}")
            continue
        images.append(_image(file, row["label"], split, status))
    if missing:
        more = f" (and {len(missing) - 1} more like it)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}{more}; paths are relative to the table's folder")
    if not images:
        raise DataError(f"{path}: names no image")
    return Listing(images, [])


def _spelled(root: str, file: str) -> str:
    """A path as this system spells it, where the table was written on Windows."""
    own = file.replace("\\", "/")
    return file if own == file or os.path.exists(os.path.join(root, file)) else own


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of a line, and its "file", "label" and "split" (None if there is no such column)."""
    text = _text(path)
    kind = _json_lines if path.lower().endswith(".jsonl") else _separated
    columns: dict[str, str | None] = {}
    for line, row in kind(path, text):
        if not columns:
            columns = _columns(path, list(row))
        yield (
            line,
            {
                name: None if column is None else _plain(row.get(column))
                for name, column in columns.items()
            },
        )


def _plain(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _text(path: str) -> str:
    """The table's text. Bytes that are not UTF-8 stay as they are in the names of files."""
    try:
        content = Path(path).read_bytes()
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return content.decode("utf-16")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text ({error.reason})") from None
    return content.decode("utf-8-sig", errors="surrogateescape")


def _separated(path: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV or TSV file; the separator is the one that its first line has most of."""
    head = text.lstrip().partition("\n")[0]
    separator = max((",", ";", "\t"), key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        header: list[str] = []
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                _columns(path, header)
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}: line {reader.line_num}: {len(row)} columns, the first line has "
                    f"{len(header)}"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None


def _json_lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except ValueError as error:
            raise DataError(f"{path}: line {line}: is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise DataError(f'{path}: line {line}: must be as {{"file": "a.jpg", "label": "cat"}}')
        yield line, value


def _columns(path: str, names: list[str]) -> dict[str, str | None]:
    """The columns with the file, the label and the split.

    Raises:
      DataError: there is no such column, or more than one.
    """
    chosen: dict[str, str | None] = {}
    for what, known in COLUMNS.items():
        fitting = [name for name in names if name.lower() in known]
        if len(fitting) > 1 or (not fitting and what != "split"):
            problem = f"{_names(fitting)} may all be" if fitting else "none of them is"
            shown = ", ".join(itertools.islice(names, 10))
            raise DataError(
                f"{path}: has the columns {shown}; {problem} the {what}, which is named "
                f"{' or '.join(known)} in the first line"
            )
        chosen[what] = fitting[0] if fitting else None
    return chosen


# ------------------------------------------------------------------------------------ shared


def _image(file: str, class_name: str, split: str, status: os.stat_result | None) -> ImageFile:
    size, modified = (status.st_size, status.st_mtime_ns) if status else (-1, 0)
    return ImageFile(file, _class_name(class_name), split, size, modified)


def _class_name(name: str) -> str:
    """A class as text: composed (macOS decomposes umlauts in the names of folders), printable."""
    return unicodedata.normalize("NFC", files.printable(name))


def _names(names: Any) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return ", ".join(map(files.printable, shown[:5])) + more
