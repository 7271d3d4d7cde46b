"""A list of images in a file: CSV, TSV, JSON lines or parquet, with the columns of ``_COLUMNS``."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rkd_cli.data.decode import Box
from rkd_cli.data.sets.folder import single_note
from rkd_cli.data.sets.listing import Listed, image_set, missing_files, without_answer
from rkd_cli.data.splits import ImageSet, Role, halves, hold_out_photos
from rkd_cli.data.walk import some
from rkd_cli.errors import DataError, first_line
from rkd_cli.events import Note, Reporter, silent

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_COLUMNS = ("path", "label", "split", "role", "camera", "group", "box")
_ROLES: dict[str, Role] = {"query": "query", "gallery": "gallery", "both": "both"}
JUNK = "-1"  # label of Market-1501 for images that count neither as right nor as wrong
SPLITS: dict[str, Literal["train", "val", "eval"]] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "eval": "eval", "evaluation": "eval", "test": "eval", "testing": "eval",
}  # fmt: skip
_SHOWN = 60  # characters of a value in an error

_Row = tuple[int, Sequence[Any]]  # line, and the values of ``_COLUMNS``; None where the list has no such column


def is_list(root: Path) -> bool:
    """Whether ``--data`` names a list."""
    return root.suffix.lower() in SUFFIXES and not root.is_dir()


def load_list(root: str | Path, report: Reporter = silent) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split of a list.

    ``path`` is absolute or relative to the folder of the list. Without ``label``, the images have no classes. Without
    ``split``, the first half of the sorted classes is the training split; without both, nine tenths of the images are.
    A split ``val`` is that of ``--select-on val``, or without a split ``eval``, the evaluation split. ``role``,
    ``camera`` (or ``group``) and ``box`` are optional.

    Raises:
        DataError: with the line, what the list lacks, names twice or does not describe.
    """
    root = Path(root)
    has_split, members = read_list(root, report)
    sets = {of: image_set(entries) for of, entries in members.items()}
    train, evaluation = make_splits(root, sets if has_split else {"": sets["train"]})
    if train.labels is not None:
        note_classes(root, train, evaluation, report)
        for images in (*train.parts, evaluation):
            _check_answers(root, images, members, report)
    return train, evaluation


def read_list(root: Path, report: Reporter = silent) -> tuple[bool, dict[str, list[Listed]]]:
    """Whether a list has the column ``split``, and its images by split, all train without it."""
    columns, rows = _open(root)
    if not columns:
        raise DataError(f"{root}: is empty, or its first line is. Begin it with the names of its columns.")
    if "path" not in columns:
        raise DataError(f"{root}: has no column path (it has {some(columns)}). Rename the one with the image files.")
    if "camera" in columns and "group" in columns:
        raise DataError(f"{root}: has the columns camera and group, which mean the same. Remove one of them.")
    if ("camera" in columns or "group" in columns or "role" in columns) and "label" not in columns:
        raise DataError(f"{root}: has roles or cameras but no column label, so no answer is right. Add it.")
    if unused := [name for name in columns if name not in _COLUMNS]:
        report(Note(f"{root}: columns that are not used: {some(unused)}"))
    has_label, has_split, has_role, has_box = (name in columns for name in ("label", "split", "role", "box"))
    group = next((name for name in ("camera", "group") if name in columns), None)
    lines: dict[Path, int] = {}
    members: dict[str, list[Listed]] = {}
    folder, junk = root.parent, 0
    for line, (name, label, split, role, camera, other, box) in rows:
        path = folder / _text(root, line, "path", name)
        if path in lines:
            raise DataError(f"{root}, line {line}: {path} is also in line {lines[path]}. Remove one of them.")
        lines[path] = line
        image = Listed(
            path,
            _text(root, line, "label", label) if has_label else None,
            _role(root, line, role) if has_role else None,
            _text(root, line, group, camera if group == "camera" else other) if group else None,
            _box(root, line, box) if has_box else None,
            line,
        )
        of = _split(root, line, split) if has_split else "train"
        if image.label == JUNK and (has_role or group):
            junk += 1
        else:
            members.setdefault(of, []).append(image)
    if not members:
        raise DataError(f"{root}: lists no images.")
    _check_files(root, lines)
    note_junk(root, junk, report)
    return has_split, members


def note_junk(root: Path, count: int, report: Reporter) -> None:
    """Report the number of images that are neither right nor wrong answers, if there are any."""
    if count:
        report(Note(f"{root}: {count:,} images with the label {JUNK} (junk) are left out"))


def make_splits(root: Path, sets: dict[str, ImageSet]) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation split from {split: images}, or from {"": images} without splits.

    Images without splits are divided: the first half of the classes is the training split, or of images without
    classes nine tenths are.
    """
    if "" in sets:
        images = sets[""]
        if images.labels is None:
            return hold_out_photos(images, root, "eval")
        if len(images.classes) < 4:
            raise DataError(
                f"{root}: {len(images.classes)} classes, at least 4 are needed (2 per split), unless it has splits."
            )
        train, evaluation = halves(images)
        return train, replace(evaluation, name="eval")
    if "eval" not in sets and "val" in sets:
        sets["eval"] = sets.pop("val")
    if missing := [of for of in ("train", "eval") if of not in sets]:
        raise DataError(f"{root}: no image has the split {missing[0]}. Add some.")
    val = replace(sets["val"], name="val") if "val" in sets else None
    return replace(sets["train"], val=val), replace(sets["eval"], name="eval")


def _check_answers(root: Path, images: ImageSet, members: dict[str, list[Listed]], report: Reporter) -> None:
    """Raise a DataError if a split with roles or cameras has no query with an answer, and report queries without."""
    if images.roles is None and images.cameras is None:
        return
    lost, queries = without_answer(images), images.facts.queries if images.roles else len(images)
    if lost or not queries:
        line = next((i.line for of in members.values() for i in of if lost and i.path == images.paths[lost[0]]), 1)
        what = f"{len(lost):,} of {queries:,} {images.name} queries have no image of their label in the gallery"
        what += " from another camera" if images.cameras else ""
        if len(lost) == queries and images.name == "eval":
            raise DataError(f"{root}, line {line}: {what}. Correct the columns role and label.")
        report(Note(f"{root}: {what} and are left out, first line {line}"))


def _text(root: Path, line: int, column: str, value: Any) -> str:
    """The text of a value; labels may be numbers."""
    if isinstance(value, float) and value.is_integer():  # pandas turns a column of integers with a hole into floats
        value = int(value)
    text = "" if value is None else str(value).strip()
    if not text or "\0" in text or (isinstance(value, float) and column == "label" and value != value):
        raise DataError(f"{root}, line {line}: no {column}. Fill it, or remove the line.")
    return text


def _split(root: Path, line: int, value: Any) -> str:
    name = "" if value is None else str(value).strip().lower()
    if name not in SPLITS:
        raise DataError(f"{root}, line {line}: unknown split {name[:_SHOWN]!r}. Use train, val or eval.")
    return SPLITS[name]


def _role(root: Path, line: int, value: Any) -> Role:
    name = "" if value is None or value != value else str(value).strip().lower()
    if name and name not in _ROLES:
        raise DataError(f"{root}, line {line}: unknown role {name[:_SHOWN]!r}. Use query, gallery or both.")
    return _ROLES[name or "both"]


def _box(root: Path, line: int, value: Any) -> Box | None:
    """A box from text or numbers; None for the whole image."""
    texts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else str(value or "").split(",")
    if texts in ([""], ["nan"]):
        return None
    try:
        left, top, right, bottom = (round(float(text)) for text in texts)
    except (ValueError, TypeError, OverflowError):
        left = top = right = bottom = -1
    if not (0 <= left < right and 0 <= top < bottom):
        shown = str(value)[:_SHOWN]
        raise DataError(
            f"{root}, line {line}: box {shown!r} is not x1,y1,x2,y2 in pixels with 0 <= x1 < x2, 0 <= y1 < y2."
        )
    return Box(left, top, right, bottom, line)


def _check_files(root: Path, lines: dict[Path, int]) -> None:
    """Raise a DataError unless every path is a file."""
    if missing := missing_files(lines):
        first = missing[0]
        what = "is a folder, not an image file" if first.is_dir() else "no such file"
        more = f" ({len(missing):,} of {len(lines):,} images are missing)" if len(missing) > 1 else ""
        raise DataError(f"{root}, line {lines[first]}: {first}: {what}{more}. Correct or remove the line.")


def note_classes(root: Path, train: ImageSet, evaluation: ImageSet, report: Reporter) -> None:
    """Report classes in both splits, and classes with a single image."""
    if common := sorted(set(train.classes) & set(evaluation.classes)):
        count = f"{len(common):,} of {len(evaluation.classes):,} evaluation classes are training classes too"
        report(Note(f"{root}: {count}: {some(common)}"))
    if note := single_note(train, *([] if evaluation.roles or evaluation.cameras else [evaluation])):
        report(Note(f"{root}: {note}"))


def _open(root: Path) -> tuple[list[str], Iterator[_Row]]:
    """The names of the columns, and the rows."""
    if not root.is_file():
        raise DataError(f"{root}: no such file.")
    suffix = root.suffix.lower()
    read: Callable[[Path], tuple[list[str], Iterator[_Row]]]
    read = {".jsonl": _read_json, ".parquet": _read_parquet}.get(suffix, _read_csv)
    try:
        return read(root)
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}).") from None


def _read_csv(root: Path) -> tuple[list[str], Iterator[_Row]]:
    def lines() -> Iterator[str]:
        try:
            with root.open(encoding="utf-8-sig", newline="") as file:
                yield from file
        except UnicodeDecodeError:
            raise DataError(f"{root}: is not UTF-8 text. Save it as UTF-8.") from None

    with root.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    reader = csv.reader(lines(), delimiter=max(",;\t", key=header.count), strict=True)

    def entries() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise DataError(f"{root}, line {reader.line_num}: not CSV ({error}).") from None

    rows = entries()
    columns = [name.strip() for name in next(rows, [])]
    places = [columns.index(name) if name in columns else None for name in _COLUMNS]

    def values() -> Iterator[_Row]:
        for row in rows:
            if not row:
                continue
            if len(row) != len(columns):
                raise DataError(
                    f"{root}, line {reader.line_num}: {len(row)} values for {len(columns)} columns. Quote a value that "
                    "contains the separator."
                )
            yield reader.line_num, [None if place is None else row[place] for place in places]

    return columns, values()


def _read_json(root: Path) -> tuple[list[str], Iterator[_Row]]:
    """Columns are the keys of all lines; a line without one has no value there."""

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        with root.open("rb") as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    value = json.loads(text)
                except ValueError as error:
                    raise DataError(f"{root}, line {line}: not JSON ({first_line(error)}).") from None
                if not isinstance(value, dict):
                    shown = text.decode(errors="replace").strip()[:_SHOWN]
                    raise DataError(f"{root}, line {line}: expected a JSON object with path, got {shown!r}.")
                yield line, value

    columns = [*dict.fromkeys(key for _, value in objects() for key in value)]
    return columns, ((line, [value.get(name) for name in _COLUMNS]) for line, value in objects())


def _read_parquet(root: Path) -> tuple[list[str], Iterator[_Row]]:
    """Rows count as lines, from 1."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{root}: pyarrow is not installed. Run `pip install pyarrow`, or use CSV.") from None
    try:
        file = parquet.ParquetFile(root)
        columns = file.schema_arrow.names
        table = file.read(columns=[name for name in _COLUMNS if name in columns])
    except Exception as error:  # pyarrow does not document its errors for damaged files
        raise DataError(f"{root}: not a parquet file that can be read ({first_line(error)}).") from None
    found = [table.column(name).to_pylist() if name in columns else [None] * len(table) for name in _COLUMNS]
    return columns, enumerate(zip(*found, strict=True), 1)
