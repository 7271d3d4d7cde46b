"""What is read below a folder, through links too, and what is left out and counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rkd_cli.data import load_dataset
from rkd_cli.data.walk import find_images, note_left_out, walk
from rkd_cli.events import Event, Note
from trees import touch


def found(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)]


def notes(root: Path) -> list[str]:
    events: list[Event] = []
    note_left_out(root, events.append, walk(root))
    return [event.text.removeprefix(f"{root}: ") for event in events if isinstance(event, Note)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of photos; beside it there is room for others."""
    touch(tmp_path / "photos", "1.jpg", "trip/2.jpg")
    return tmp_path / "photos"


def test_linked_folders_are_read(root: Path) -> None:
    touch(root.parent, "album/3.jpg", "album/deep/4.jpg", "other/5.jpg")
    (root / "linked").symlink_to(root.parent / "album")
    (root.parent / "album/deep/more").symlink_to("../../other")
    assert found(root) == ["1.jpg", "linked/3.jpg", "linked/deep/4.jpg", "linked/deep/more/5.jpg", "trip/2.jpg"]
    assert notes(root) == []


def test_linked_class_folders_are_classes_as_for_imagefolder(tmp_path: Path) -> None:
    for name in "abcd":
        touch(tmp_path / "elsewhere" / name, *(f"{n}.jpg" for n in range(3)))
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere" / name)
        touch(tmp_path / "album" / name, *(f"{n}.jpg" for n in range(3, 6)))
        (tmp_path / "elsewhere" / name / "album").symlink_to(tmp_path / "album" / name)
    train, evaluation = load_dataset("folder", tmp_path / "photos")
    assert (train.classes, evaluation.classes, len(train), len(evaluation)) == (("a", "b"), ("c", "d"), 12, 12)


@pytest.mark.parametrize("target", [".", "..", "trip", "/"])
def test_a_link_to_a_folder_that_is_read_anyway_makes_no_loop(root: Path, target: str) -> None:
    (root / "trip/again").symlink_to(Path(os.path.normpath(root / target)))
    assert found(root) == ["1.jpg", "trip/2.jpg"]
    assert notes(root) == [f"1 links to folders that are read anyway are not followed: {root}/trip/again"]


def test_two_links_to_overlapping_albums_double_no_image(root: Path) -> None:
    touch(root.parent, "album/3.jpg", "album/inner/4.jpg")
    (root / "a").symlink_to(root.parent / "album/inner")
    (root / "b").symlink_to(root.parent / "album")
    (root / "c").symlink_to(root.parent / "album")
    assert found(root) == ["1.jpg", "a/4.jpg", "b/3.jpg", "trip/2.jpg"]
    again = f"{root}/b/inner, {root}/c"
    assert notes(root) == [f"2 links to folders that are read anyway are not followed: {again}"]


def test_links_to_nothing_are_counted_and_linked_images_are_read(root: Path) -> None:
    touch(root.parent, "original.jpg")
    (root / "3.jpg").symlink_to("../original.jpg")
    (root / "unmounted").symlink_to("/no/such/album")
    (root / "itself").symlink_to("itself")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    assert found(root) == ["1.jpg", "3.jpg", "trip/2.jpg"]
    assert notes(root) == [f"3 broken links are left out: {root}/gone.jpg, {root}/itself, {root}/unmounted"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_links_to_devices_are_left_out(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")
    (root / "zero.jpg").symlink_to("/dev/zero")
    assert found(root) == ["1.jpg", "trip/2.jpg"]
    assert notes(root) == [f"2 pipes, sockets and devices are left out: {root}/pipe.jpg, {root}/zero.jpg"]


@pytest.mark.parametrize(
    ("left_out", "says"),
    [
        ("trip/@eaDir/2.jpg/SYNOPHOTO_THUMB_M.jpg", "@eaDir"),
        ("trip/SYNOPHOTO_THUMB_XL.jpg", "SYNOPHOTO_THUMB*"),
        ("trip/SYNOFILE_THUMB_M.png", "SYNOFILE_THUMB*"),
        ("#recycle/old.jpg", "#recycle"),
        ("#snapshot/GMT-2026.01.01/1.jpg", "#snapshot"),
        ("@Recycle/old.jpg", "@Recycle"),
        ("@Recently-Snapshot/1.jpg", "@Recently-Snapshot"),
        (".@__thumb/default1.jpg", ".@__thumb"),
        ("$Recycle.Bin/S-1-5/$R1.jpg", "$RECYCLE.BIN"),
        ("RECYCLER/S-1-5/Dc1.jpg", "RECYCLER"),
        ("System Volume Information/1.jpg", "System Volume Information"),
        ("lost+found/#1234.jpg", "lost+found"),
        (".Trash-1000/files/1.jpg", ".Trash-*"),
        (".thumbnails/1.jpg", ".thumbnails"),
        ("__MACOSX/._1.jpg", "__MACOSX"),
        ("._1.jpg", "._*"),
        ("Thumbs.db", "Thumbs.db"),
        ("desktop.ini", "desktop.ini"),
        ("Photos Library.photoslibrary/resources/derivatives/1.jpeg", "resources of a photo library"),
    ],
)
def test_what_a_nas_or_a_system_keeps_is_no_photo(root: Path, left_out: str, says: str) -> None:
    touch(root, left_out, "Photos Library.photoslibrary/originals/0/3.jpeg")
    assert found(root) == ["1.jpg", "Photos Library.photoslibrary/originals/0/3.jpeg", "trip/2.jpg"]
    assert notes(root) == [f"system files are left out: 1 {says}"]


@pytest.mark.parametrize("name", ["recycle", "@home", "#1", "lost", "Thumbs", "Trash", "resources"])
def test_folders_of_similar_names_are_read(root: Path, name: str) -> None:
    touch(root, f"{name}/3.jpg")
    assert f"{name}/3.jpg" in found(root)
    assert notes(root) == []


def test_folders_of_systems_are_no_classes(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN"):
        touch(tmp_path, f"{name}/1.jpg", f"{name}/2.jpg")
    (tmp_path / "e").symlink_to("a")
    train, evaluation = load_dataset("folder", tmp_path)
    assert train.classes + evaluation.classes == ("a", "b", "c", "d")


def test_the_root_may_be_such_a_folder_or_a_link(tmp_path: Path) -> None:
    touch(tmp_path, "#recycle/1.jpg")
    (tmp_path / "linked").symlink_to("#recycle")
    assert found(tmp_path / "#recycle") == found(tmp_path / "linked") == ["1.jpg"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_told(root: Path) -> None:
    (root / "trip").chmod(0)
    try:
        assert notes(root) == [f"folders that cannot be listed are left out (1): {root}/trip"]
    finally:
        (root / "trip").chmod(0o755)
