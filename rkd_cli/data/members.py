"""Images inside other files: members of tar and zip archives, rows of parquet files and of Hugging Face data sets.

Such an image has a path below its container: ``photos-000.tar/cat/a.jpg``, ``train.parquet/12``,
``hf:ORG/NAME/train/12``, and ``given:DIGEST/train/12`` in a data set that Python code gave (``given``). It is read from
its place in the container, and nothing is unpacked. A member that cannot be read raises an OSError.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image

from rkd_cli.data.archive import BLOCK, DAMAGED
from rkd_cli.data.walk import is_hidden, is_image
from rkd_cli.errors import DataError, first_line

HUB = "hf:"  # the start of the name of a Hugging Face data set
GIVEN = "given:"  # the same for one that Python code gave
SUFFIXES = (".tar", ".zip", ".parquet")
_INSIDE = re.compile(r"\.(tar|zip|parquet)[\\/]", re.IGNORECASE)
_MOST = 1 << 29  # bytes of a member; more than any photo has
_LABEL_MOST = 1 << 20  # bytes of a label file
_SPAN = np.dtype([("at", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<i2")])
_STORED, _DEFLATED, _ENCRYPTED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, -1
_LOCAL = 30  # bytes of the header before the name of a zip member
_no_places = partial(np.empty, 0, np.int64)
_LABELS = ("label", "labels", "class")  # columns, and keys of a .json file


@dataclass
class _Names(Sequence[str]):
    """Names of members, without an object for each: a million take 20 MB instead of 80."""

    text: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, name: str) -> None:
        self.text += name.encode(errors="surrogateescape")
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: Any) -> Any:
        start = self.ends[place - 1] if place else 0
        return self.text[start : self.ends[place]].decode(errors="surrogateescape")


@dataclass(frozen=True)
class Listing:
    """The images in a container, in its order.

    Args:
        names: of the images; numbers of rows in a table.
        labels: (N,) int32 indices in ``classes``, -1 without a label.
        classes: labels in the order in which they occur.
        spans: (N,) of ``_SPAN``, the places in an archive.
        keys: (N,) uint64, sorted digests of the names in an archive.
        order: (N,) int32, the index of the image of each key.
    """

    names: Sequence[str] | range
    labels: np.ndarray
    classes: tuple[str, ...]
    spans: np.ndarray = field(default_factory=_no_places)
    keys: np.ndarray = field(default_factory=_no_places)
    order: np.ndarray = field(default_factory=_no_places)

    def find(self, name: str) -> Any:
        """The place of a member in the archive."""
        at = int(np.searchsorted(self.keys, np.uint64(_key(name))))
        if at == len(self.keys) or self.names[self.order[at]] != name:
            raise FileNotFoundError(name)
        return self.spans[self.order[at]]


class Table(Protocol):
    """Images by number."""

    def listing(self) -> Listing:
        """The images."""
        ...

    def read(self, row: int) -> Path | BytesIO | Image.Image:
        """An image, or its file; an OSError if it cannot be read."""
        ...

    def data(self, row: int) -> bytes:
        """What differs if an image does: the bytes of its file, or a digest of its pixels."""
        ...


GIVEN_TABLES: dict[Path, Mapping[str, Table]] = {}  # {name: {split: table}} while a run of Python code lasts


@dataclass(frozen=True, eq=False)
class MemberPaths(Sequence[Path]):
    """Paths of images in containers, made when asked for: a million take 8 MB instead of 400.

    Args:
        containers: paths.
        names: of the images in each container.
        places: (N, 2) int32, the container and the index in its names of each image.
    """

    containers: tuple[Path, ...]
    names: tuple[Sequence[str] | range, ...]
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> MemberPaths: ...
    def __getitem__(self, index: int | slice) -> Path | MemberPaths:
        if isinstance(index, slice):
            return MemberPaths(self.containers, self.names, self.places[index])
        container, place = self.places[index].tolist()
        return Path(self.containers[container], str(self.names[container][place]))


def take(paths: Sequence[Path], chosen: Sequence[int] | np.ndarray) -> Sequence[Path]:
    """The paths with the indices ``chosen``."""
    if isinstance(paths, MemberPaths):
        return MemberPaths(paths.containers, paths.names, paths.places[np.asarray(chosen, np.int64)])
    return tuple(paths[index] for index in chosen)


def joined(of: Iterable[Sequence[Path]]) -> Sequence[Path]:
    """The paths of the splits of a data set."""
    parts = list(of)
    first = parts[0]
    if isinstance(first, MemberPaths):
        places = [part.places for part in parts if isinstance(part, MemberPaths)]
        return MemberPaths(first.containers, first.names, np.concatenate(places))
    return [path for part in parts for path in part]


def is_hub(path: Path) -> bool:
    """Whether a path is that of a Hugging Face data set or a given one, or of an image in one."""
    return path.parts[:1] != () and path.parts[0].startswith((HUB, GIVEN))


def is_there(path: Path) -> bool:
    """Whether an image file, or the container of a member, exists."""
    return is_hub(path) or path.exists() or _located(path) is not None


def source(path: Path) -> Path | BytesIO | Image.Image:
    """The image file, the data of a member, or a given image."""
    found = _located(path)
    if not found:
        return path
    container, name = found
    return _table(container).read(int(name)) if _is_table(container) else BytesIO(_read(container, name))


def open_image(path: Path) -> BufferedReader | BytesIO:
    """The bytes of an image file or member; of a given image, those of a digest."""
    found = _located(path)
    if not found:
        return path.open("rb")
    container, name = found
    return BytesIO(_table(container).data(int(name)) if _is_table(container) else _read(container, name))


def image_size(path: Path) -> int:
    """The size of an image file or member in bytes."""
    found = _located(path)
    if not found:
        return path.stat().st_size
    container, name = found
    if _is_table(container):
        return len(_table(container).data(int(name)))
    return int(list_members(container).find(name)["size"])


def image_facts(path: Path) -> str:
    """Facts that change if an image file is written, replaced or swapped; for a member, those of its container."""
    found, inner = _located(path), ""
    if found:
        path, name = found
        inner = f" {name}" if _is_table(path) else f" {list_members(path).find(name)}"
    stat = _stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}{inner}"


def list_members(container: Path) -> Listing:
    """The images in a container, listed once in each process.

    Raises:
        DataError: it is damaged, or the package that reads it is missing.
    """
    try:
        stat = _stat(container)
        return _listed(container, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{container}: cannot be read ({error.strerror or error}).") from None


def hub_splits(root: Path) -> list[str]:
    """The names of the splits of a Hugging Face data set, or of a given one."""
    return list(GIVEN_TABLES.get(root) or _hub(root))


@cache
def _listed(container: Path, size: int, changed: int) -> Listing:
    if _is_table(container):
        return _table(container).listing()
    return (_list_tar if container.suffix.lower() == ".tar" else _list_zip)(container)


def _located(path: Path) -> tuple[Path, str] | None:
    """The container and the name of a member; None for an image file."""
    if is_hub(path):
        return path.parent, path.name
    if _INSIDE.search(str(path)):
        for container in path.parents:
            if container.suffix.lower() in SUFFIXES and container.is_file():
                return container, path.relative_to(container).as_posix()
    return None


def _is_table(container: Path) -> bool:
    return container.suffix.lower() == ".parquet" or is_hub(container)


def _stat(container: Path) -> os.stat_result:
    if container.parent in GIVEN_TABLES:
        return os.stat_result((0,) * 10)  # the name has a digest of the content
    if is_hub(container):  # the file of the cache
        return Path(_hub(container.parent)[container.name].cache_files[0]["filename"]).stat()
    return container.stat()


def _read(container: Path, name: str) -> bytes:
    place = list_members(container).find(name)
    at, packed, size, crc, method = place.tolist()
    if method not in (_STORED, _DEFLATED):
        raise OSError("encrypted" if method == _ENCRYPTED else f"compressed by method {method}; only deflate is read")
    if max(packed, size) > _MOST:
        raise OSError(f"{max(packed, size):,} bytes, more than the {_MOST:,} of a member that are read")
    with container.open("rb") as file:
        if container.suffix.lower() == ".zip":
            file.seek(at)
            header = file.read(_LOCAL)
            if len(header) < _LOCAL or header[:4] != b"PK\3\4":
                raise OSError("no zip header at its place")
            at += _LOCAL + sum(struct.unpack("<HH", header[-4:]))
        file.seek(at)
        data = file.read(packed)
    if method == _DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise OSError(f"damaged: {error}") from None
    if len(data) != size or (crc and zlib.crc32(data) != crc):
        raise OSError("damaged: another length or checksum than the archive states")
    return data


class _Found:
    """The images of an archive, collected in its order."""

    def __init__(self, container: Path) -> None:
        self.container, self.names, self.labels = container, _Names(), array("i")
        self.spans, self.keys = array("q"), array("Q")
        self.classes: dict[str, int] = {}

    def add(self, name: str, at: int, packed: int, size: int, crc: int = 0, method: int = _STORED) -> None:
        self.names.add(name)
        self.keys.append(_key(name))
        self.spans.extend((at, packed, size, crc, method))
        self.labels.append(-1)

    def label(self, since: int, label: str) -> None:
        """Label the images from number ``since`` on."""
        number = self.classes.setdefault(label, len(self.classes))
        for place in range(since, len(self.labels)):
            self.labels[place] = number

    def listing(self) -> Listing:
        columns = np.frombuffer(self.spans, np.int64).reshape(-1, 5).T
        spans = np.rec.fromarrays(list(columns), dtype=_SPAN)
        keys = np.asarray(self.keys, np.uint64)
        order = keys.argsort(kind="stable")
        if twice := np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist():
            name = self.names[int(order[twice[0]])]
            raise DataError(f"{self.container}: contains {name} twice. Pack its images under different names.")
        labels = np.asarray(self.labels, np.int32)
        return Listing(self.names, labels, tuple(self.classes), spans, keys[order], order.astype(np.int32))


def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())


def _inner(name: str) -> str:
    """The name of a member without parts that lead elsewhere, as unpackers leave them out; empty for hidden files."""
    *folders, file = [part for part in name.split("/") if part not in ("", ".", "..")] or [""]
    hidden = any(is_hidden(folder, True) for folder in folders) or is_hidden(file, False)
    return "" if hidden else "/".join([*folders, file])


def _list_tar(container: Path) -> Listing:
    """The images of a tar archive; a .cls or .json file labels those of the same name up to its first dot beside it."""
    found, sample, since, label = _Found(container), "", 0, None
    try:
        with container.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while info := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # a million take a gigabyte
                name = _inner(info.name) if info.isreg() and not info.issparse() else ""
                start = name.rfind("/") + 1
                stem, _, ending = name[start:].partition(".")
                if name[:start] + stem != sample:
                    sample, since, label = name[:start] + stem, len(found.names), None
                if is_image(name):
                    found.add(name, info.offset_data, info.size, info.size)
                elif ending in ("cls", "json") and info.size <= _LABEL_MOST:
                    file.seek(info.offset_data)
                    label = _label_of(f"{container}/{name}", ending, file.read(info.size)) or label
                if label is not None:
                    found.label(since, label)
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile stops at a damaged header
                raise tarfile.ReadError(f"the end is missing after {len(found.names):,} images")
    except DAMAGED as error:
        raise DataError(
            f"{container}: not a whole tar archive ({first_line(error)}). Decompress it if it is compressed, or copy "
            "it again."
        ) from None
    return found.listing()


def _label_of(name: str, ending: str, data: bytes) -> str | None:
    """The label in a .cls or .json file; None if a .json file has none."""
    try:
        text = data.decode().strip()
        value = json.loads(text) if ending == "json" else int(text)
    except ValueError as error:
        raise DataError(f"{name}: no label can be read ({first_line(error)}). Correct it.") from None
    if isinstance(value, dict):
        value = next((value[key] for key in _LABELS if key in value), None)
    return str(value) if isinstance(value, str | int) else None


def _list_zip(container: Path) -> Listing:
    found = _Found(container)
    try:
        with zipfile.ZipFile(container) as archive:
            for info in archive.infolist():
                name = _inner(info.filename)
                if is_image(name) and not info.is_dir():
                    method = _ENCRYPTED if info.flag_bits & 1 else info.compress_type
                    found.add(name, info.header_offset, info.compress_size, info.file_size, info.CRC, method)
    except (zipfile.BadZipFile, *DAMAGED) as error:
        raise DataError(f"{container}: not a whole zip archive ({first_line(error)}). Copy it again.") from None
    return found.listing()


def _datasets(root: Path) -> Any:
    """The package ``datasets``, without its progress bars."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{root}: needs the package datasets. Run `pip install datasets`.") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


@cache
def _hub(root: Path) -> dict[str, Any]:
    """{split: table} of ``hf:NAME``, ``hf:ORG/NAME`` or ``hf:ORG/NAME/CONFIG``."""
    if str(root).startswith(GIVEN):
        raise DataError(f"{root}: is a data set that Python code gave to a run. Name the images with --data.")
    datasets, (org, *name) = _datasets(root), root.as_posix().removeprefix(HUB).split("/")
    try:
        return dict(datasets.load_dataset("/".join([org, *name[:1]]), *name[1:2]))
    except Exception as error:  # of many packages
        raise DataError(
            f"{root}: cannot be loaded by datasets ({first_line(error)}). Download it first, or correct the name."
        ) from None


def _table(container: Path) -> Table:
    return given[container.name] if (given := GIVEN_TABLES.get(container.parent)) else _opened(container)


@cache
def _opened(container: Path) -> Table:
    """The memory-mapped table of a parquet file or a split."""
    datasets = _datasets(container)
    if is_hub(container):
        return ArrowTable(_hub(container.parent)[container.name], container)
    try:
        table = datasets.Dataset.from_parquet(str(container))
    except Exception as error:  # of many packages
        reason = first_line(error.__cause__ or error)
        raise DataError(f"{container}: not a parquet file that can be read ({reason}). Copy it again.") from None
    return ArrowTable(table, container)


class ArrowTable:
    """A ``datasets.Dataset``; ``name`` is for errors."""

    def __init__(self, table: Any, name: object) -> None:
        datasets = importlib.import_module("datasets")
        images = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
        images += [column for column, kind in table.features.items() if isinstance(kind, dict) and "bytes" in kind]
        if not images:
            raise DataError(f"{name}: has no column of images (it has {', '.join(table.column_names)}).")
        self.table, self.column = table, images[0]

    def read(self, row: int) -> Path | BytesIO:
        """See ``Table``."""
        value = self.table.data.column(self.column)[row].as_py() or {}
        data = value.get("bytes")
        if data is None and not value.get("path"):
            raise OSError("the row has no image")
        return BytesIO(data) if data is not None else Path(value["path"])

    def data(self, row: int) -> bytes:
        """See ``Table``."""
        found = self.read(row)
        return found.read_bytes() if isinstance(found, Path) else found.getvalue()

    def listing(self) -> Listing:
        """See ``Table``."""
        kinds = self.table.features
        named = [name for name in _LABELS if name in kinds] or [
            n for n, kind in kinds.items() if hasattr(kind, "names")
        ]
        labels: list[str | None] = [None] * len(self.table)
        if named:
            names = getattr(kinds[named[0]], "names", None)
            for row, value in enumerate(self.table.data.column(named[0]).to_pylist()):
                if value is not None and value != -1:  # -1: without a label, as in hidden test splits
                    labels[row] = names[value] if names and isinstance(value, int) else str(value)
        return listing_of(labels)


def listing_of(labels: Sequence[str | None]) -> Listing:
    """The images of a table, from the label of each."""
    classes: dict[str, int] = {}
    numbers = [-1 if label is None else classes.setdefault(label, len(classes)) for label in labels]
    return Listing(range(len(labels)), np.asarray(numbers, np.int32), tuple(classes))
