"""The images of a split, holding classes out of one, and recognizing classes that a network was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rkd_cli.data.decode import AS_VIEWED, Decoding
from rkd_cli.errors import DataError
from rkd_cli.events import Progress, Reporter, silent
from rkd_cli.schemas import Fit

_AT_LEAST = 2  # classes of a split: among the images of one class every neighbor is right
_PHOTOS = 20  # of a split without labels: among eleven all others are anybody's ten nearest
_SAMPLE = 1 << 16  # bytes of an image file that tell it from others of its size
_REPORTED = 1000  # files between two reports
_NAMED = 3  # how many classes a note names


@dataclass(frozen=True)
class ImageSet:
    """The images of one split: ``labels[i]`` is the position in ``classes`` of the class of ``paths[i]``.

    Args:
        paths: where the images are.
        labels: of each image; None for photos without.
        classes: their names.
        name: of the split.
        decoding: how its files become squares.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    name: Literal["train", "val", "eval"] = "train"
    decoding: Decoding = AS_VIEWED

    def __len__(self) -> int:
        return len(self.paths)

    def without(self, damaged: Collection[Path]) -> ImageSet:
        """The others; classes keep their labels.

        Raises:
            DataError: none is left.
        """
        kept = self._where(lambda index: self.paths[index] not in damaged)
        if not kept:
            raise DataError(f"{self.paths[0].parent}: all {len(self)} images of the split are damaged")
        return kept

    def decoded(self, max_pixels: int, fit: Fit = "square") -> ImageSet:
        """The same, decoded with these settings; images of a published data set stay as its protocol has them."""
        return replace(self, decoding=replace(self.decoding, max_pixels=max_pixels, fit=fit))

    def without_labels(self) -> ImageSet:
        """The same as photos of which nothing is known."""
        return replace(self, labels=None, classes=())

    def _where(self, keep: Callable[[int], bool]) -> ImageSet:
        kept = [index for index in range(len(self)) if keep(index)]
        labels = None if self.labels is None else tuple(self.labels[index] for index in kept)
        return replace(self, paths=tuple(self.paths[index] for index in kept), labels=labels)


def hold_out(train: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The training split without the last fifth of its classes (two at least), and those, as the split ``val``.

    Raises:
        DataError: too few classes with images for that, or no labels.
    """
    labels = train.labels or ()
    there = sorted(set(labels))  # damaged images that are left out can leave a class without any
    held = max(_AT_LEAST, len(there) // 5)
    if len(there) < _AT_LEAST + held:
        raise DataError(
            f"--select-on val: holds {_AT_LEAST} or more of the training classes out and trains on {_AT_LEAST} or "
            f"more, and {len(there)} have images: use --select-on eval"
        )
    first = there[-held]
    kept, val = train._where(lambda index: labels[index] < first), train._where(lambda index: labels[index] >= first)
    return (
        replace(kept, classes=train.classes[:first]),
        replace(
            val, labels=tuple(label - first for label in val.labels or ()), classes=train.classes[first:], name="val"
        ),
    )


def hold_out_photos(images: ImageSet, root: Path, name: Literal["val", "eval"] = "val") -> tuple[ImageSet, ImageSet]:
    """A set without labels but for a tenth of it, and that tenth (some 20 photos at least), as the split ``name``.

    A digest of its path below ``root`` says where a photo belongs. So photos that are added or removed move none of the
    others (one of them each, at most, where a tenth is less than 20), and what a network was trained on is not called
    unseen later; each folder has its share in both parts. Near-duplicates, which lie side by side, may fall apart: keep
    them together with folders ``train`` and ``eval``.

    Raises:
        DataError: too few photos.
    """
    if len(images) < 2 * _PHOTOS:
        raise DataError(
            f"{root}: {len(images)} photos to hold a tenth out of, {_PHOTOS} at least; {2 * _PHOTOS} are needed: add "
            + ("some" if name == "eval" else "some, or use --select-on eval")
        )
    digests = [
        hashlib.blake2b(f"{name} {path.relative_to(root).as_posix()}".encode(errors="surrogateescape"), digest_size=8)
        for path in images.paths
    ]
    values = [int.from_bytes(digest.digest()) for digest in digests]
    bound = max(1 << 64, 10 * (sorted(values)[_PHOTOS - 1] + 1))
    kept, held = images._where(lambda i: 10 * values[i] >= bound), images._where(lambda i: 10 * values[i] < bound)
    return kept, replace(held, name=name)


def seen_classes(train: ImageSet) -> tuple[str, ...]:
    """What a checkpoint keeps of each training class, in some 30 characters, for ``overlap``.

    The name, which stays when images are added, moved or encoded anew; and of the class's largest image file the size
    and a digest, which stay when the class is renamed. (The largest: small ones are empty, or the same placeholder in
    many classes.) Where the images lie does not count.
    """
    largest: dict[int, tuple[int, Path]] = {}
    for path, label in zip(train.paths, train.labels or (), strict=False):
        largest[label] = max(largest.get(label, (0, path)), (_size(path), path))
    return tuple(
        f"{_digest(name.encode())}-{_sample(largest[label][1]) if label in largest else ''}"
        for label, name in enumerate(train.classes)
    )


def overlap(seen: Collection[str], images: ImageSet) -> list[str]:
    """The names of those classes of ``images`` that ``seen``, of ``seen_classes``, has by their name or an image."""
    names, samples = {entry.partition("-")[0] for entry in seen}, {entry.partition("-")[2] for entry in seen} - {""}
    sizes = {sample.partition("-")[0] for sample in samples}
    known = {label for label, name in enumerate(images.classes) if _digest(name.encode()) in names}
    for path, label in zip(images.paths, images.labels or (), strict=False):
        # only files of a size that was seen are opened
        if label not in known and str(_size(path)) in sizes and _sample(path) in samples:
            known.add(label)
    return [images.classes[label] for label in sorted(known)]


def seen_note(who: str, classes: Sequence[str], split: str) -> str:
    """That a network knows classes which are to be unseen ones.

    Args:
        who: the network.
        classes: what ``overlap`` found.
        split: that they are of, eval or val.
    """
    named = ", ".join(classes[:_NAMED]) + (", ..." if len(classes) > _NAMED else "")
    which = "evaluation" if split == "eval" else "held-out"
    return f"{who} was trained on {len(classes)} of the {which} classes ({named}): for it they are not unseen"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone: whoever decodes it will say so
        return 0


def content_digest(paths: Sequence[Path], report: Reporter = silent) -> str:
    """Of image files in their order: the size, the first and the last 64 KiB of each, wherever they lie.

    Args:
        paths: of the files; one that cannot be read counts as empty.
        report: is told how far it is, of thousands.
    """
    found = hashlib.sha256()
    for number, path in enumerate(paths, 1):
        found.update(f"{_sample(path, with_end=True)}\n".encode())
        if number % _REPORTED == 0:
            report(Progress("Reading images", number, len(paths)))
    return found.hexdigest()


def _sample(path: Path, with_end: bool = False) -> str:
    """Size and digest of an image file, by its beginning or by both ends; nothing where it is empty or unreadable."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(_SAMPLE)
            if with_end and size > _SAMPLE:
                file.seek(max(_SAMPLE, size - _SAMPLE))
                data += file.read(_SAMPLE)
    except OSError:
        data = b""
    return f"{size}-{_digest(data)}" if data else ""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
