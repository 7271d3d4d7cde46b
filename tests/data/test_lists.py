"""``--data list.csv``: images, labels and splits from a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rkd_cli.data import ImageSet, find_dataset, hold_out, load_dataset
from rkd_cli.data.splits import relative_names
from rkd_cli.errors import DataError
from rkd_cli.events import Event, Note

Row = tuple[object, ...]
ROWS: list[Row] = [(f"photos/{n}.jpg", n // 2, ("train", "Test", "valid")[n // 2 % 3]) for n in range(12)]


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = [separator.join(map(str, row)) for row in (tuple(columns), *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def write_json(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))


def write_parquet(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({name: list(column) for name, *column in zip(columns, *rows, strict=True)}), path)


WRITE: dict[str, Callable[[Path, Sequence[str], Sequence[Row]], None]] = {
    ".csv": write_csv, ".tsv": write_csv, ".jsonl": write_json, ".parquet": write_parquet,
}  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(60):
        (tmp_path / f"photos/{number}.jpg").touch()
    return tmp_path


def named(images: ImageSet) -> list[tuple[str, str]]:
    assert images.labels is not None
    return [(path.stem, images.classes[label]) for path, label in zip(images.paths, images.labels, strict=True)]


@pytest.mark.parametrize("suffix", WRITE)
def test_splits_and_labels_are_those_of_the_table(photos: Path, suffix: str) -> None:
    path = photos / f"list{suffix}"
    WRITE[suffix](path, ("path", "label", "split"), ROWS)
    assert find_dataset(path) == "list"
    train, evaluation = load_dataset("list", path)
    assert named(train) == [("0", "0"), ("1", "0"), ("6", "3"), ("7", "3")]
    assert named(evaluation) == [("2", "1"), ("3", "1"), ("8", "4"), ("9", "4")]
    rest, val = hold_out(train)
    assert named(val) == [("4", "2"), ("5", "2"), ("10", "5"), ("11", "5")]
    assert (rest.val, rest.paths, val.name, evaluation.name) == (None, train.paths, "val", "eval")
    assert relative_names(train.paths, path) == ["photos/0.jpg", "photos/1.jpg", "photos/6.jpg", "photos/7.jpg"]


def test_keys_that_only_later_lines_have_are_columns(photos: Path) -> None:
    rows: list[dict[str, object]] = [{"path": f"photos/{n}.jpg", "label": n // 2, "split": "train"} for n in range(4)]
    rows += [{"path": f"photos/{n}.jpg", "label": n // 2, "split": "eval", "box": [1, 2, 3, 4]} for n in range(4, 8)]
    rows[5] |= {"role": "query"}
    (photos / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, evaluation = load_dataset("list", photos / "list.jsonl")
    assert (evaluation.roles, len(train.decoding.boxes)) == (("both", "query", "both", "both"), 4)
    del rows[6]["label"]
    (photos / "list.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    with pytest.raises(DataError, match="line 2: no label"):
        load_dataset("list", photos / "list.jsonl")


def test_columns_in_another_order_with_semicolons_and_quotes(photos: Path) -> None:
    (photos / "photos/a;b.jpg").touch()
    rows = [f'train;"{n // 2} ""x""";photos/{n}.jpg' for n in range(3)] + ['train;1 "x";"photos/a;b.jpg"']
    (photos / "list.csv").write_text("split;label;path\r\n" + "\r\n".join([*rows, "val;z;photos/9.jpg", ""]))
    train, evaluation = load_dataset("list", photos / "list.csv")
    assert named(train) == [("0", '0 "x"'), ("1", '0 "x"'), ("2", '1 "x"'), ("a;b", '1 "x"')]
    assert (named(evaluation), train.val) == ([("9", "z")], None)  # no eval: val is what is evaluated


def test_without_splits_the_sorted_classes_are_halved(photos: Path) -> None:
    write_csv(photos / "list.csv", ("path", "label"), [(f"photos/{n}.jpg", 8 + n % 4) for n in range(8)])
    train, evaluation = load_dataset("list", photos / "list.csv")
    assert (train.classes, evaluation.classes) == (("8", "9"), ("10", "11"))
    assert named(train) == [("0", "8"), ("1", "9"), ("4", "8"), ("5", "9")]


def test_without_labels_a_tenth_is_evaluated(photos: Path) -> None:
    write_csv(photos / "list.csv", ("path",), [(photos / f"photos/{n}.jpg",) for n in range(60)])
    train, evaluation = load_dataset("list", photos / "list.csv")
    assert (train.labels, len(train), len(evaluation)) == (None, 40, 20)
    in_folder = load_dataset("images", photos)[1]
    assert set(evaluation.paths) == set(in_folder.paths)


def test_images_may_be_anywhere(photos: Path) -> None:
    (photos / "lists").mkdir()
    rows = [
        ("../photos/0.jpg", "a", "train"),
        (photos / "photos/1.jpg", "a", "train"),
        ("../photos/2.jpg", "b", "eval"),
    ]
    write_csv(photos / "lists/list.csv", ("path", "label", "split"), rows)
    train, _ = load_dataset("list", photos / "lists/list.csv")
    assert all(path.is_file() for path in train.paths)
    assert relative_names(train.paths, photos / "lists/list.csv") == [
        "../photos/0.jpg",
        (photos / "photos/1.jpg").as_posix(),
    ]


def test_what_is_unusual_is_noted(photos: Path) -> None:
    rows = [(f"photos/{n}.jpg", label, split, 1) for n, (label, split) in enumerate(
        [("a", "train"), ("a", "train"), ("b", "train"), ("b", "eval"), ("c", "eval"), ("c", "eval")]
    )]  # fmt: skip
    write_csv(photos / "list.csv", ("path", "label", "split", "author"), rows)
    notes: list[Event] = []
    load_dataset("list", photos / "list.csv", notes.append)
    texts = [note.text.partition(": ")[2] for note in notes if isinstance(note, Note)]
    assert texts == [
        "columns that are not used: author",
        "1 of 2 evaluation classes are training classes too: b",
        "2 of 4 classes have a single image, which forms no pair. Add images, or distil without labels (--no-labels).",
    ]


BAD: dict[str, tuple[tuple[str, ...], list[Row], str]] = {
    "no path": (("file", "label"), [("photos/0.jpg", 1)], r": has no column path \(it has file, label\)"),
    "empty": (("path",), [], ": lists no images"),
    "no file": (("path",), [("photos/0.jpg",), ("no.jpg",)], "line 3: .*no.jpg: no such file. Correct"),
    "folder": (("path",), [("photos",)], "line 2: .*photos: is a folder"),
    "twice": (("path",), [("photos/0.jpg",), ("photos/0.jpg",)], "line 3: .*0.jpg is also in line 2"),
    "split": (("path", "split"), [("photos/0.jpg", "fold1")], "line 2: unknown split 'fold1'"),
    "no split": (("path", "label", "split"), [("photos/0.jpg", 1, "train")], "no image has the split eval"),
    "no label": (("path", "label"), [("photos/0.jpg", 1), ("photos/1.jpg", "")], "line 3: no label"),
    "few classes": (("path", "label"), [("photos/0.jpg", 1), ("photos/1.jpg", 2)], "2 classes, at least 4"),
    "values": (("path", "label"), [("photos/0.jpg", 1, 2)], "line 2: 3 values for 2 columns"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_list_lacks_is_named_with_its_line(photos: Path, what: str) -> None:
    columns, rows, says = BAD[what]
    write_csv(photos / "list.csv", columns, rows)
    with pytest.raises(DataError, match=says) as error:
        load_dataset("list", photos / "list.csv")
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("list.jsonl", b'{"path": "a"}\n{"path":\n', "line 2: not JSON"),
        ("list.jsonl", b"[1]\n", r"line 1: expected a JSON object with path, got '\[1\]'\.$"),
        ("list.csv", b"", "is empty"),
        ("list.jsonl", b"\n", "is empty"),
        ("list.csv", b'path\n"photos/0.jpg\n', "not CSV"),
        ("list.csv", b"path\nphotos/\xff.jpg\n", "is not UTF-8"),
        ("list.parquet", b"path", "not a parquet file"),
        ("list.tsv", None, "no such file"),
        ("list.txt", b"path\n", "is no list of images"),
        ("photos.tgz", b"", "is compressed. Decompress it first"),
        ("photos.tar.gz", b"", "is compressed. Decompress it first"),
    ],
)
def test_damaged_lists_are_refused(photos: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (photos / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_dataset("auto", photos / name)


def test_a_hole_in_a_column_of_numbers_is_no_class(photos: Path) -> None:
    """pandas writes the labels 1 and 2 beside a missing one as 1.0 and 2.0."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, names = photos / "list.parquet", [f"photos/{n}.jpg" for n in range(5)]
    parquet.write_table(arrow.table({"path": names[:4], "label": [1.0, 2.0, 3.0, 4.0]}), path)
    assert load_dataset("list", path)[0].classes == ("1", "2")
    parquet.write_table(arrow.table({"path": names, "label": [1.0, 2.0, 3.0, 4.0, float("nan")]}), path)
    with pytest.raises(DataError, match="line 5: no label"):
        load_dataset("list", path)


def test_a_list_is_what_its_folder_is(tiny_set: Path, tmp_path: Path, rkd: Callable[..., tuple[int, str, str]]) -> None:
    """The same splits through every command, to the same recalls."""
    splits = load_dataset("cub200", tiny_set)
    rows = [
        (path.relative_to(tiny_set), images.classes[label], images.name)
        for images in splits
        for path, label in zip(images.paths, images.labels or (), strict=True)
    ]
    path = tiny_set / "list.csv"
    write_csv(path, ("path", "label", "split"), rows)
    common = ("--workers", "0", "--cache-dir", tmp_path / "cache")
    small = "--base shufflenet_v2_x0_5 --embedding-size 8 --weights none --resize 36 --image-size 32"
    short = "--epochs 1 --iter-per-epoch 1 --batch 8 --num-image-per-class 2 --quiet"
    flags = (*small.split(), *short.split(), *common)
    code, _, err = rkd("train-teacher", "--data", path, "--save-dir", tmp_path / "run", *flags)
    assert code == 0, err
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["dataset"] == "list"
    found = {}
    for data in (path, tiny_set):
        dataset = () if data == path else ("--dataset", "folder", "--data", tiny_set / "images")
        code, out, err = rkd("evaluate", tmp_path / "run", *dataset, *common, "--json", "--quiet")
        assert code == 0, err
        found[data] = json.loads(out) | {"dataset": "", "milliseconds": 0}
    code, out, err = rkd("check-data", "--data", path, "--workers", "0")
    assert (code, out.splitlines()[1]) == (0, "list: 24 images of 4 classes train, 24 images of 4 classes evaluate")
    code, _, err = rkd("embed", tmp_path / "run", "--data", path, "--out", tmp_path / "v.npz", *common, "--quiet")
    assert code == 0, err
    path.unlink()
    assert found[path] == found[tiny_set]
