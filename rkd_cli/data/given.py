"""Images and data sets that Python code gives.

``given`` names data sets ``given:DIGEST`` while a run lasts; ``members`` finds their images under that name, in this
process and its forks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from rkd_cli.data.members import GIVEN, GIVEN_TABLES, ArrowTable, Listing, Table, image_size, listing_of
from rkd_cli.errors import DataError, first_line
from rkd_cli.events import Progress, Reporter

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | Pixels | Tensor
_FORMS = "Pass a path, bytes, a binary file, a PIL image, a uint8 array or a uint8 tensor."
_REPORTED = 100  # images between two progress events


def is_one_image(images: object) -> bool:
    """Whether ``images`` is an image, not an iterable of them. Arrays and tensors of four dimensions are several."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim <= 3
    kinds = str, bytes, bytearray, memoryview, os.PathLike, Image.Image
    return isinstance(images, kinds) or hasattr(images, "read")


def image_of(image: object, what: str) -> Path | BytesIO | Image.Image:
    """The path, data or pixels of an image; a DataError for anything else, which ``what`` names.

    Tensors are (3, H, W), (1, H, W) or (H, W); if the first of three dimensions is neither 3 nor 1, (H, W, 3). Arrays
    are (H, W, 3) or (H, W).
    """
    match image:
        case str() | os.PathLike():
            return _path(Path(image))
        case bytes() | bytearray() | memoryview():
            return BytesIO(image)
        case Image.Image():
            return image
        case Tensor():
            pixels = image.detach().cpu()
            if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
                pixels = pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
            if image.dtype == torch.uint8 and _is_picture(pixels.shape):
                return Image.fromarray(pixels.numpy())
            given = f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
            raise DataError(
                f"{what}: is {given}. Tensors must be uint8: (3, H, W) or (H, W, 3) RGB, or (1, H, W) gray."
            )
        case np.ndarray():
            if image.dtype == np.uint8 and _is_picture(image.shape):
                return Image.fromarray(image)
            shape = f"{image.dtype} of shape {image.shape}"
            raise DataError(f"{what}: is {shape}. Arrays must be uint8, (H, W, 3) RGB or (H, W) gray.")
    data = image.read() if hasattr(image, "read") else None
    if not isinstance(data, bytes):
        text = "a text file. Open it with mode 'rb'." if isinstance(data, str) else f"of type {type(image).__name__}."
        raise DataError(f"{what}: is {text} {_FORMS}")
    return BytesIO(data)


def _path(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not an image")
    try:
        image_size(path)  # also of a member of an archive
    except (OSError, ValueError, LookupError):
        raise DataError(f"{path}: no such image") from None
    return path


def _is_picture(shape: Sequence[int]) -> bool:
    return 0 not in shape and len(shape) > 1 and tuple(shape[2:]) in ((), (3,))


class Items:
    """A torch Dataset of images or of pairs (image, label); all are read once, for their labels and digests."""

    def __init__(self, dataset: Any, name: str, report: Reporter) -> None:
        self._dataset, self._name = dataset, name
        try:
            count = len(dataset)
        except TypeError:
            raise DataError(f"{name}: has no length. Pass a path, or a Dataset with __len__ and __getitem__.") from None
        self._labels, self._digests = list[str | None](), list[bytes]()
        classes = getattr(dataset, "classes", None)
        for row in range(count):
            image, label = self._pair(row)
            label = label.item() if isinstance(label, Tensor | np.generic) else label
            if isinstance(classes, list | tuple) and isinstance(label, int) and 0 <= label < len(classes):
                label = classes[label]
            self._labels.append(None if label in (None, -1) else str(label))
            self._digests.append(_digest_of(image))
            _tell(report, row, count)

    def _pair(self, row: int) -> tuple[Path | BytesIO | Image.Image, Any]:
        what = f"{self._name}[{row}]"
        try:
            item = self._dataset[row]
            item = item if isinstance(item, tuple | list) else (item, None)
            image = image_of(item[0], what)
            if isinstance(image, Image.Image):
                image.load()
        except DataError:
            raise
        except Exception as error:  # of other people's code
            raise DataError(f"{what}: cannot be read ({first_line(error)}). Replace or remove it.") from None
        return image, item[1]

    def read(self, row: int) -> Path | BytesIO | Image.Image:
        """See ``Table``."""
        return self._pair(row)[0]

    def data(self, row: int) -> bytes:
        """See ``Table``."""
        return self._digests[row]

    def listing(self) -> Listing:
        """See ``Table``."""
        return listing_of(self._labels)


@contextmanager
def given(images: object, report: Reporter) -> Iterator[Path]:
    """The name under which a run reads a data set, or several in a mapping by split: torch's, or of ``datasets``.

    Raises:
        DataError: it has no length, or an item is no image.
    """
    tables, found = dict[str, Table](), blake2b(digest_size=6)
    for split, dataset in (images if isinstance(images, Mapping) else {"all": images}).items():
        name = "images" if split == "all" else f"images[{split!r}]"
        datasets = sys.modules.get("datasets")
        if datasets and isinstance(dataset, datasets.Dataset):
            # the rows of ``select`` and ``shuffle`` are elsewhere
            table: Table = ArrowTable(dataset.flatten_indices() if dataset._indices is not None else dataset, name)
        else:
            table = Items(dataset, name, report)
        listing = table.listing()
        found.update(str((split, listing.classes, listing.labels.tolist())).encode())
        for row in range(len(listing.names)):
            found.update(table.data(row))
            _tell(report, row, len(listing.names))
        tables[split] = table
    root = Path(f"{GIVEN}{found.hexdigest()}")
    GIVEN_TABLES[root] = tables
    try:
        yield root
    finally:
        del GIVEN_TABLES[root]


def _digest_of(image: Path | BytesIO | Image.Image) -> bytes:
    if isinstance(image, Image.Image):
        facts = image.mode, image.size, image.getpalette(), image.getexif().get(ExifTags.Base.Orientation)
        data = str(facts).encode() + image.tobytes()
    else:
        data = image.read_bytes() if isinstance(image, Path) else image.getvalue()
    return blake2b(data, digest_size=16).digest()


def _tell(report: Reporter, row: int, count: int) -> None:
    if (row + 1) % _REPORTED == 0 or row + 1 == count:
        report(Progress("Reading images", row + 1, count))
