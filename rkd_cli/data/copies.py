"""Duplicate image files, which leak training images into the evaluation split or contradict the classes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from rkd_cli.data.members import image_size, joined, open_image
from rkd_cli.data.splits import ImageSet, relative_names
from rkd_cli.data.walk import some

_END = 4096  # bytes at the end, where compressed images of one size differ


def find_copies(paths: Sequence[Path]) -> list[list[int]]:
    """Sorted groups of positions in ``paths`` whose files have equal bytes.

    Compares sizes, then the last bytes, then BLAKE2b digests. Empty and unreadable files are ignored.
    """
    groups: list[list[int]] = [[*range(len(paths))]]
    keys: tuple[Callable[[Path], object], ...] = (image_size, _end, _digest)
    for key in keys:
        groups = [same for group in groups for same in _grouped(group, paths, key) if len(same) > 1]
    return sorted(groups)


def copy_notes(train: ImageSet, evaluation: ImageSet, root: Path) -> list[str]:
    """Notes about duplicates in a data set at ``root``, with counts and the first names."""
    paths, labels = joined([train.paths, evaluation.paths]), (train.labels or ()) + (evaluation.labels or ())
    seen: list[str] = []  # evaluation images that are also training images
    torn: list[str] = []  # images in two classes
    twice: list[str] = []  # duplicate evaluation images of one class
    for group in find_copies(paths):
        names = dict(zip(group, relative_names([paths[at] for at in group], root), strict=True))
        parts = [at for at in group if at < len(train)], [at for at in group if at >= len(train)]
        if all(parts):
            seen += [f"{names[at]} is {names[parts[0][0]]}" for at in parts[1]]
        for part in parts if labels else ():
            other = next((at for at in part if labels[at] != labels[part[0]]), None)
            if other is not None:
                torn.append(f"{names[part[0]]} and {names[other]}")
        # a copy in a query's own camera is no answer
        if labels and evaluation.cameras is None and len(parts[1]) > 1 and len({labels[at] for at in parts[1]}) == 1:
            twice += [names[at] for at in parts[1]]
    notes = (
        (seen, "evaluation images are copies of training images", "Remove them."),
        (torn, "images are in two classes", "Keep each in one."),
        (twice, "evaluation images have a copy in their class, which every query finds", "Keep one of each."),
    )
    return [f"{root}: {len(found):,} {what} ({some(found)}). {remedy}" for found, what, remedy in notes if found]


def _grouped(group: Iterable[int], paths: Sequence[Path], key: Callable[[Path], object]) -> list[list[int]]:
    found: dict[object, list[int]] = defaultdict(list)
    for at in group:
        try:
            value = key(paths[at])
        except OSError:  # missing or unreadable: decoding reports it
            continue
        if value:
            found[value].append(at)
    return [*found.values()]


def _end(path: Path) -> bytes:
    with open_image(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
        return file.read()


def _digest(path: Path) -> bytes:
    with open_image(path) as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).digest()
