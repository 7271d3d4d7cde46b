"""Splits: their images, the validation split, and detection of classes that a network was trained on."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from rkd_cli.data.decode import AS_DISPLAYED, Decoding
from rkd_cli.data.members import image_size, open_image, take
from rkd_cli.data.walk import some
from rkd_cli.errors import DataError
from rkd_cli.events import Progress, Reporter, SplitFacts, silent
from rkd_cli.metrics import Protocol
from rkd_cli.schemas import Fit

_AT_LEAST = 2  # classes in a split: with one class every neighbor is correct
_PHOTOS = 20  # images in a split without labels: of 11 images, all others are the 10 nearest
_SAMPLE = 1 << 16  # bytes of an image file to compare
_REPORTED = 1000  # files between two progress events

Role = Literal["query", "gallery", "both"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageSet:
    """The images of a split; ``labels[i]`` is the index in ``classes`` of the class of ``paths[i]``.

    Args:
        paths: image files, or members of archives or tables; see ``members``.
        labels: of each image; None without labels.
        classes: names.
        name: of the split.
        decoding: how files become square pixels.
        val: of a training split, the validation split that the data set names.
        roles: of each image in evaluation; None: all are both.
        cameras: the number of each image's camera; a query's label in its own camera is no answer.
    """

    paths: Sequence[Path]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    name: Literal["train", "val", "eval"] = "train"
    decoding: Decoding = AS_DISPLAYED
    val: ImageSet | None = None
    roles: tuple[Role, ...] | None = None
    cameras: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def parts(self) -> list[ImageSet]:
        """The set, then its ``val`` if it has one."""
        return [self, *([self.val] if self.val else [])]

    @property
    def protocol(self) -> Protocol | None:
        """Queries, gallery and cameras; None if each image is a query in all others."""
        if self.roles is None and self.cameras is None:
            return None
        roles = self.roles or ("both",) * len(self)
        queries, gallery = (
            torch.tensor([row for row, role in enumerate(roles) if role != other], dtype=torch.int64)
            for other in ("gallery", "query")
        )
        return Protocol(queries, gallery, None if self.cameras is None else torch.tensor(self.cameras))

    @property
    def facts(self) -> SplitFacts:
        """The size of the split."""
        queries, gallery = (sum(role != other for role in self.roles or ()) for other in ("gallery", "query"))
        return SplitFacts(self.name, len(self), len(self.classes), queries, gallery, len({*(self.cameras or ())}))

    def without(self, damaged: Collection[Path]) -> ImageSet:
        """The set without some images, with the same classes.

        Raises:
            DataError: no image is left.
        """
        others = self._where(lambda index: self.paths[index] not in damaged)
        if not others:
            raise DataError(f"{self.paths[0].parent}: all {len(self)} images of the split are damaged. Replace them.")
        return replace(others, val=self.val and self.val.without(damaged))

    def decoded(self, max_pixels: int, fit: Fit = "square") -> ImageSet:
        """The set with these decoding settings; published data sets keep those of their protocol."""
        val = self.val and self.val.decoded(max_pixels, fit)
        return replace(self, decoding=replace(self.decoding, max_pixels=max_pixels, fit=fit), val=val)

    def without_labels(self) -> ImageSet:
        """The set without labels, classes, roles and cameras."""
        val = self.val and self.val.without_labels()
        return replace(self, labels=None, classes=(), val=val, roles=None, cameras=None)

    def rows(self, chosen: Sequence[int]) -> ImageSet:
        """Some images, in this order, with the same classes."""

        def of(column: tuple[_T, ...] | None) -> tuple[_T, ...] | None:
            return None if column is None else tuple(column[index] for index in chosen)

        paths = take(self.paths, chosen)
        return replace(self, paths=paths, labels=of(self.labels), roles=of(self.roles), cameras=of(self.cameras))

    def _where(self, condition: Callable[[int], bool]) -> ImageSet:
        return self.rows([index for index in range(len(self)) if condition(index)])


def relative_names(paths: Sequence[Path], root: Path) -> list[str]:
    """Names of images: paths relative to ``--data``, or to the folder of a list, with forward slashes.

    Images elsewhere, which only a list may have, keep their whole paths.
    """
    return list(_relative_names(paths, root))


def names_folder(root: Path) -> Path:
    """What ``relative_names`` are relative to."""
    return root.parent if root.is_file() or root.suffix.lower() in (".tar", ".zip") else root


def _relative_names(paths: Sequence[Path], root: Path) -> Iterator[str]:
    folder = names_folder(root)
    for path in paths:
        with suppress(ValueError):  # to ask first takes half as long again
            path = path.relative_to(folder)
        yield path.as_posix()


def hold_out(train: ImageSet, fold: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Split validation classes off the training split.

    Without a fold they are the split ``val`` of the data set, or the last fifth of the classes (at least two). The
    folds 1/N to N/N are disjoint and of neighboring classes, as in "A Metric Learning Reality Check" (Musgrave et al.,
    ECCV 2020).

    Args:
        train: images with labels.
        fold: I/N.
    Returns:
        The remaining training split and the validation split.
    Raises:
        DataError: too few classes with images, or no labels.
    """
    if train.val and fold:
        raise DataError(f"--fold {fold}: the data set names its own validation split. Use --select-on val.")
    if train.val:
        return replace(train, val=None), train.val
    labels = train.labels or ()
    present = sorted(set(labels))  # a class may have lost all its images as damaged
    if fold:
        part, parts = map(int, fold.split("/"))
        start, stop = (len(present) - len(present) * (parts - i) // parts for i in (part - 1, part))
        least, flag, instead = _AT_LEAST * parts, f"--fold {fold}", "Use fewer folds"
    else:
        start, stop = len(present) - max(_AT_LEAST, len(present) // 5), len(present)
        least, flag, instead = 2 * _AT_LEAST, "--select-on val", "Use --select-on eval"
    if len(present) < least:
        raise DataError(
            f"{flag}: needs {least} training classes, {least - _AT_LEAST} to train on and {_AT_LEAST} for validation, "
            f"and {len(present)} have images. {instead}."
        )
    first, last = present[start], [*present, len(train.classes)][stop]
    held = range(first, last)
    rest = train._where(lambda index: labels[index] not in held)
    val = train._where(lambda index: labels[index] in held)
    return (
        replace(
            rest,
            labels=tuple(label - len(held) * (label >= last) for label in rest.labels or ()),
            classes=train.classes[:first] + train.classes[last:],
        ),
        replace(
            val,
            labels=tuple(label - first for label in val.labels or ()),
            classes=train.classes[first:last],
            name="val",
        ),
    )


def hold_out_photos(images: ImageSet, root: Path, name: Literal["val", "eval"] = "val") -> tuple[ImageSet, ImageSet]:
    """Split a tenth of the images (at least about 20) off a set without labels, as the split ``name``.

    A digest of the path relative to ``root`` decides the split of an image. So adding or removing images moves none of
    the others (at most one each, while a tenth is less than 20), and trained images do not become evaluation images
    later. Near-duplicates may end up in different splits; to avoid that, use folders ``train`` and ``eval``.

    Args:
        images: without labels.
        root: as for ``--data``.
        name: of the split to create.
    Returns:
        The remaining images and the new split.
    Raises:
        DataError: too few images.
    """
    if images.val and name == "val":
        return replace(images, val=None), images.val
    if len(images) < 2 * _PHOTOS:
        raise DataError(
            f"{root}: {len(images)} images are too few to split off {_PHOTOS} or more; {2 * _PHOTOS} are needed. "
            + ("Add some." if name == "eval" else "Add some, or use --select-on eval.")
        )
    values = array("Q")
    for image in _relative_names(images.paths, root):
        digest = hashlib.blake2b(f"{name} {image}".encode(errors="surrogateescape"), digest_size=8)
        values.append(int.from_bytes(digest.digest()))
    bound = max(1 << 64, 10 * (int(np.partition(values, _PHOTOS - 1)[_PHOTOS - 1]) + 1))
    rest, split = images._where(lambda i: 10 * values[i] >= bound), images._where(lambda i: 10 * values[i] < bound)
    return rest, replace(split, name=name)


def halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The images of the first half of the classes, and the others."""
    labels, half = images.labels or (), len(images.classes) // 2
    first, second = images._where(lambda i: labels[i] < half), images._where(lambda i: labels[i] >= half)
    shifted = tuple(label - half for label in second.labels or ())
    return replace(first, classes=images.classes[:half]), replace(second, labels=shifted, classes=images.classes[half:])


def seen_classes(train: ImageSet) -> tuple[str, ...]:
    """An identifier of each training class for checkpoints, about 30 characters; see ``overlap``.

    It contains a digest of the name, and size and digest of the class's largest image file, so that a class is
    recognized if either is unchanged. (Small files may be empty, or one placeholder in many classes.)
    """
    largest: dict[int, tuple[int, Path]] = {}
    for path, label in zip(train.paths, train.labels or (), strict=False):
        largest[label] = max(largest.get(label, (0, path)), (_size(path), path))
    return tuple(
        f"{_digest(name.encode())}-{_sample(largest[label][1]) if label in largest else ''}"
        for label, name in enumerate(train.classes)
    )


def overlap(seen: Collection[str], images: ImageSet) -> list[str]:
    """The names of the classes of ``images`` that are in ``seen`` (of ``seen_classes``) by name or by an image."""
    names, samples = {entry.partition("-")[0] for entry in seen}, {entry.partition("-")[2] for entry in seen} - {""}
    sizes = {sample.partition("-")[0] for sample in samples}
    known = {label for label, name in enumerate(images.classes) if _digest(name.encode()) in names}
    for path, label in zip(images.paths, images.labels or (), strict=False):
        # open only files whose size occurs in seen
        if label not in known and str(_size(path)) in sizes and _sample(path) in samples:
            known.add(label)
    return [images.classes[label] for label in sorted(known)]


def seen_note(who: str, classes: Sequence[str], split: str) -> str:
    """The note that the network ``who`` was trained on these classes of the split eval or val."""
    which = "evaluation" if split == "eval" else "validation"
    return f"{who} was trained on {len(classes)} of the {which} classes ({some(classes)}), so its recall is too high"


def _size(path: Path) -> int:
    try:
        return image_size(path)
    except OSError:  # missing: decoding reports it
        return 0


def content_digest(paths: Sequence[Path], report: Reporter = silent) -> str:
    """Digest of image files in order, independent of their folders: size, first and last 64 KiB of each."""
    found = hashlib.sha256()
    for number, path in enumerate(paths, 1):
        found.update(f"{_sample(path, with_end=True)}\n".encode())
        if number % _REPORTED == 0:
            report(Progress("Reading images", number, len(paths)))
    return found.hexdigest()


def _sample(path: Path, with_end: bool = False) -> str:
    """Size and digest of the start (or both ends) of an image file; empty if the file is empty or unreadable."""
    try:
        with open_image(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            data = file.read(_SAMPLE)
            if with_end and size > _SAMPLE:
                file.seek(max(_SAMPLE, size - _SAMPLE))
                data += file.read(_SAMPLE)
    except OSError:
        data = b""
    return f"{size}-{_digest(data)}" if data else ""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
