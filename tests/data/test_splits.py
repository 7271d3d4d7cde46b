"""Splits: leaving images out, holding classes out, recognizing classes that a network was trained on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rkd_cli.data import ImageSet, hold_out, load_dataset
from rkd_cli.data.splits import content_digest, overlap, seen_classes
from rkd_cli.errors import DataError


def split(classes: int, each: int = 3) -> ImageSet:
    labels = tuple(label for label in range(classes) for _ in range(each))
    return ImageSet(tuple(Path(str(i)) for i in range(len(labels))), labels, tuple(map(str, range(classes))))


def test_the_splits_of_a_set_have_names(tiny_set: Path) -> None:
    assert [images.name for images in load_dataset("cub200", tiny_set)] == ["train", "eval"]
    assert [images.name for images in hold_out(split(10))] == ["train", "val"]


def test_damaged_images_are_left_out() -> None:
    images = split(3)
    kept = images.without(images.paths[:4])
    assert (kept.paths, kept.labels, kept.classes) == (
        images.paths[4:],
        images.labels and images.labels[4:],
        ("0", "1", "2"),
    )
    with pytest.raises(DataError, match="all 9 images"):
        images.without(images.paths)


def test_images_may_have_no_labels() -> None:
    images = ImageSet((Path("a"), Path("b")), None, ())
    assert images.without([Path("a")]) == ImageSet((Path("b"),), None, ())
    with pytest.raises(DataError, match="0 have images"):
        hold_out(images)


@pytest.mark.parametrize(("classes", "held"), [(4, 2), (5, 2), (9, 2), (10, 2), (14, 2), (15, 3), (100, 20)])
def test_a_fifth_is_held_out_and_two_at_least(classes: int, held: int) -> None:
    train, val = hold_out(split(classes))
    assert (len(train.classes), len(val.classes)) == (classes - held, held)
    assert (*train.paths, *val.paths) == split(classes).paths
    assert val.labels == split(held).labels


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_too_few_to_hold_out(classes: int) -> None:
    with pytest.raises(DataError, match=f"and {classes} have images. Use --select-on eval"):
        hold_out(split(classes))


def test_classes_without_images_are_not_held_out() -> None:
    images = split(6)
    train, val = hold_out(images.without(images.paths[-6:]))  # the last two classes
    assert (set(train.labels or ()), set(val.labels or ())) == ({0, 1}, {0, 1})
    with pytest.raises(DataError, match="3 have images"):
        hold_out(images.without(images.paths[-9:]))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Six classes of two files each, whose names are the same in every class."""
    for name in "abcdef":
        for number in (1, 2):
            path = tmp_path / f"set/{name}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name}{number}".encode() * 50 * number)
    return tmp_path / "set"


def seen_again(root: Path, seen: tuple[str, ...]) -> list[str]:
    return overlap(seen, load_dataset("folder", root)[1])


def test_class_folders_that_are_added_move_the_split(classes: Path) -> None:
    seen = seen_classes(load_dataset("folder", classes)[0])  # a, b, c
    assert len(seen) == 3
    assert all(len(entry) < 40 for entry in seen)
    assert seen_again(classes, seen) == []
    for name in ("0", "1"):
        shutil.copytree(classes / "f", classes / name)
    assert seen_again(classes, seen) == ["c"]


def test_a_seen_class_is_known_by_its_name(classes: Path, tmp_path: Path) -> None:
    """Wherever it lies, whatever is added, however the images are encoded."""
    seen = seen_classes(load_dataset("folder", classes)[0])
    there = classes.rename(tmp_path / "there")
    (there / "b/more.jpg").write_bytes(b"one more")
    for path in there.glob("*/?.jpg"):
        path.write_bytes(path.read_bytes() + b"encoded anew")
    train, evaluation = load_dataset("folder", there)
    assert overlap(seen, train) == ["a", "b", "c"]
    assert overlap(seen, evaluation) == []


def test_a_seen_class_is_known_by_its_images(classes: Path) -> None:
    seen = seen_classes(load_dataset("folder", classes)[0])
    (classes / "b").rename(classes / "zebra")
    (classes / "zebra/more.jpg").write_bytes(b"one more")
    assert seen_again(classes, seen) == ["zebra"]


def test_empty_and_missing_images_are_nobodys(classes: Path) -> None:
    for path in classes.glob("*/*.jpg"):
        path.write_bytes(b"")
    seen = seen_classes(load_dataset("folder", classes)[0])
    evaluation = load_dataset("folder", classes)[1]
    shutil.rmtree(classes)
    assert overlap(seen, evaluation) == []
    assert overlap(("nonsense", "", "a-b"), evaluation) == []


def test_the_real_birds_share_no_class(cub10_archive: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(cub10_archive, tmp_path, "gztar", filter="data")
    train, evaluation = load_dataset("cub200", tmp_path)
    seen = seen_classes(train)
    assert len(set(seen)) == 5
    assert overlap(seen, evaluation) == []
    assert overlap(seen, train) == list(train.classes)


@pytest.mark.parametrize(
    ("change", "is_seen"),
    [
        ("first byte", True),
        ("byte 65537", True),
        ("last byte", True),
        ("last but 64 KiB", True),
        ("middle", False),  # of more than 128 KiB: what an encoder makes of other pixels differs at its end too
        ("one byte more", True),
        ("swapped", True),
        ("gone", True),
        ("copied", False),
    ],
)
def test_content_is_told_by_the_ends_of_files(tmp_path: Path, change: str, is_seen: bool) -> None:
    paths = [tmp_path / name for name in ("small", "empty", "medium", "large")]
    sizes = {"small": 9, "empty": 0, "medium": (1 << 16) + 9, "large": 200_000}
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * sizes[path.name])
    digest = content_digest(paths)
    at = {"first byte": 0, "last byte": -1, "last but 64 KiB": -(1 << 16), "middle": 100_000}
    medium, large = paths[2:]
    if change in at:
        data = bytearray(large.read_bytes())
        data[at[change]] ^= 1
        large.write_bytes(data)
    elif change == "byte 65537":
        data = bytearray(medium.read_bytes())
        data[1 << 16] ^= 1
        medium.write_bytes(data)
    elif change == "one byte more":
        medium.write_bytes(medium.read_bytes() + bytes([2]))
    elif change == "swapped":
        paths[2:] = large, medium
    elif change == "gone":
        large.unlink()
    else:
        paths = [shutil.copyfile(path, path.with_suffix(".copy")) for path in paths]
    assert (content_digest(paths) != digest) == is_seen


@pytest.mark.parametrize(("classes", "folds"), [(4, 2), (10, 3), (17, 4), (100, 4)])
def test_folds_are_disjoint_and_hold_each_class_out_once(classes: int, folds: int) -> None:
    images, held = split(classes), list[str]()
    for part in range(1, folds + 1):
        train, val = hold_out(images, f"{part}/{folds}")
        held += val.classes
        assert len(val.classes) in (classes // folds, -(-classes // folds))
        assert sorted({*train.classes, *val.classes}, key=int) == list(images.classes)
        for piece in (train, val):  # each image has the class that it had
            names = [piece.classes[label] for label in piece.labels or ()]
            assert names == [images.classes[(images.labels or ())[int(str(path))]] for path in piece.paths]
            assert set(piece.labels or ()) == set(range(len(piece.classes)))
    assert held == list(images.classes)


def test_the_last_fold_of_five_is_the_usual_validation_split() -> None:
    for classes in (10, 13, 100):
        assert hold_out(split(classes), "5/5") == hold_out(split(classes))


def test_folds_need_two_classes_each_and_no_split_of_the_data_set() -> None:
    with pytest.raises(DataError, match=r"--fold 1/3: needs 6 training classes, 4 to train on.*5 have images.*fewer"):
        hold_out(split(5), "1/3")
    with pytest.raises(DataError, match="--fold 1/2: the data set names its own"):
        hold_out(replace(split(8), val=split(4)), "1/2")
