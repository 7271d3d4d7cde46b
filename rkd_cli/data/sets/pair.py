"""Queries from one folder or list, and their gallery from another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rkd_cli.data.sets.folder import class_images
from rkd_cli.data.sets.listing import Listed, image_set, without_answer
from rkd_cli.data.sets.lists import JUNK, is_list, note_junk, read_list
from rkd_cli.data.splits import ImageSet, Role
from rkd_cli.data.walk import note_left_out, walk
from rkd_cli.errors import DataError
from rkd_cli.events import Reporter, silent

_ROLES: tuple[Role, Role] = ("query", "gallery")


def load_pair(query: Path, gallery: Path, report: Reporter = silent) -> ImageSet:
    """The queries of ``query`` and the gallery of ``gallery``: folders of class folders, or lists of any splits.

    Of a list with roles, only images of the role are used. An image in both is not its own answer.

    Raises:
        DataError: nothing to read, no labels, cameras in one of them alone, or no label in common.
    """
    asked, answers = (
        {image.path.absolute(): image for image in _read(root, role, report)}
        for root, role in zip((query, gallery), _ROLES, strict=True)
    )
    first, second = (next(iter(part.values())) for part in (asked, answers))
    if (first.camera is None) != (second.camera is None):
        with_one, without = (gallery, query) if first.camera is None else (query, gallery)
        raise DataError(f"{without}: has no cameras, but {with_one} has. Name both with the column camera, or neither.")
    for path in asked.keys() & answers.keys():
        if asked[path]._replace(role=None, line=0) != answers[path]._replace(role=None, line=0, path=asked[path].path):
            raise DataError(f"{path}: differs in label, camera or box between {query} and {gallery}. Correct one.")
    listed = [image._replace(role="both" if path in answers else "query") for path, image in asked.items()]
    listed += [image._replace(role="gallery") for path, image in answers.items() if path not in asked]
    images = image_set(listed)
    if len(without_answer(images)) == len(asked):
        raise DataError(
            f"--query {query}: no query has an image of its label in --gallery {gallery}, for example {first.label!r}, "
            f"which holds {second.label!r}. Use the same class names in both."
        )
    return images


def _read(root: Path, role: Role, report: Reporter) -> Iterator[Listed]:
    if is_list(root):
        _, members = read_list(root, report)
        found = [image for part in members.values() for image in part if image.role in (None, "both", role)]
        if found and found[0].label is None:
            raise DataError(f"{root}: has no column label, so no answer is right. Add it.")
    elif root.is_dir():
        tree = walk(root)
        note_left_out(root, report, tree)
        found = [Listed(path, name) for name, paths in class_images(tree).items() for path in paths]
    else:
        raise DataError(f"--{role} {root}: no such folder or list of images.")
    valid = [image for image in found if image.label != JUNK]
    note_junk(root, len(found) - len(valid), report)
    if not valid:
        raise DataError(f"--{role} {root}: holds no {role} images in class folders, or in the lines of a list.")
    yield from valid
