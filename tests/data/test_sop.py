"""Stanford Online Products: its two lists, and one clear line for each way they can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rkd_cli.data.sets.sop import load_sop
from rkd_cli.errors import DataError

HEADER = "image_id class_id super_class_id path"
TRAIN = [
    "1 1 1 bicycle_final/111085122871_0.JPG",
    "2 1 1 bicycle_final/111085122871_1.JPG",
    "3 2 1 bicycle_final/111265328556_0.JPG",
    "4 7 2 cabinet_final/1 2_0.JPG",
]
TEST = ["5 11319 1 bicycle_final/251952414262_0.JPG", "6 11320 12 toaster_final/141_0.JPG"]


def write(root: Path, train: list[str] = TRAIN, test: list[str] = TEST) -> Path:
    folder = root / "Stanford_Online_Products"
    folder.mkdir(exist_ok=True)
    for line in TRAIN + TEST:
        image = folder / line.split(maxsplit=3)[3]
        image.parent.mkdir(exist_ok=True)
        image.touch()
    (folder / "Ebay_train.txt").write_text("\n".join([HEADER, *train]) + "\n")
    (folder / "Ebay_test.txt").write_text("\n".join([HEADER, *test]) + "\n")
    return folder


def test_each_list_is_a_split(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for root in (tmp_path, folder):
        train, evaluation = load_sop(root)
        assert train.classes == ("1.bicycle_final", "2.bicycle_final", "7.cabinet_final")
        assert train.labels == (0, 0, 1, 2)
        assert train.paths[0] == folder / "bicycle_final/111085122871_0.JPG"
        assert evaluation.classes == ("11319.bicycle_final", "11320.toaster_final")
        assert evaluation.labels == (0, 1)
        assert all(path.is_file() for path in (*train.paths, *evaluation.paths))


def test_windows_lines_and_blank_ones_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path)
    expected = load_sop(tmp_path)
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_bytes(" \r\n".join([*lines, "", ""]).encode())
    assert load_sop(tmp_path) == expected


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        shutil.rmtree,
        r"no such folder, .*\(ftp://cs.* is dead\. .*Ebay_train.txt, Ebay_t",
    ),
    "no train list": (
        lambda root: (root / "Ebay_train.txt").unlink(),
        "Ebay_train.txt: missing, so the data set is inc",
    ),
    "no test list": (lambda root: (root / "Ebay_test.txt").unlink(), "Ebay_test.txt: missing, so the data set is in"),
    "only a header": (lambda root: write(root.parent, test=[]), "Ebay_test.txt: lists no images"),
    "empty list": (lambda root: (root / "Ebay_train.txt").write_bytes(b""), "Ebay_train.txt: lists no images"),
    "binary list": (lambda root: (root / "Ebay_train.txt").write_bytes(b"\xff\xfe"), "Ebay_train.txt: cannot be read"),
    "torn line": (
        lambda root: write(root.parent, train=[TRAIN[0], "2 1 1"]),
        f'Ebay_train.txt, line 3: expected "{HEADER}", got "2 1 1"',
    ),
    "no number": (lambda root: write(root.parent, test=["5 x 1 a/b.JPG"]), "Ebay_test.txt, line 2: expected"),
    "header twice": (lambda root: write(root.parent, test=[HEADER, *TEST]), "Ebay_test.txt, line 2: expected"),
    "climbing": (
        lambda root: write(root.parent, ["1 1 1 a/../../x.JPG"]),
        r"listed image 'a/\.\./\.\./x.JPG' is outside of this folder",
    ),
    "absolute": (
        lambda root: write(root.parent, ["1 1 1 /etc/x.JPG"]),
        "listed image '/etc/x.JPG' is outside of this folder",
    ),
    "zero byte": (lambda root: write(root.parent, ["1 1 1 a\0/x.JPG"]), "1 of 3 images are missing"),
    "long name": (lambda root: write(root.parent, ["1 1 1 " + "a" * 300 + "/x.JPG"]), r"cannot be listed \(File name"),
    "shared class": (
        lambda root: write(root.parent, test=["5 7 2 cabinet_final/1 2_0.JPG"]),
        "class 7 is in both Ebay_train.txt and Ebay_test.txt",
    ),
    "missing image": (
        lambda root: (root / "toaster_final/141_0.JPG").unlink(),
        r"1 of 6 images are missing \(toaster_final/141_0.JPG\)",
    ),
    "missing folder": (
        lambda root: shutil.rmtree(root / "bicycle_final"),
        r"4 of 6 images are missing \(bicycle_final/1110\w+.JPG, [^,]*, [^,]*, \.\.\.\)",
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_set_is_one_line(tmp_path: Path, kind: str) -> None:
    break_it, says = BREAKS[kind]
    break_it(write(tmp_path))
    with pytest.raises(DataError, match=says) as caught:
        load_sop(tmp_path)
    (problem,) = caught.value.problems
    assert "\n" not in problem
