"""Photos without labels: how they are found, split, held out; and what pillow alone does not read."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_cli.data import ImageSet, hold_out_photos, load_dataset, walk
from rkd_cli.data.cache import pixel_facts
from rkd_cli.data.decode import load_resized
from rkd_cli.data.extensions import HEIC_READER
from rkd_cli.data.sets.images import load_images
from rkd_cli.errors import DataError
from rkd_cli.events import Event, Note
from trees import touch


def many(count: int, root: Path = Path("photos")) -> ImageSet:
    return ImageSet(tuple(root / f"{n % 7}/IMG_{n:05}.jpg" for n in range(count)), None, ())


def test_a_tree_is_walked_and_what_is_hidden_is_passed_by(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.jpg" for n in range(20)), *(f"2024/trip/{n}.PNG" for n in range(20)), "a.avif", "b.txt")
    touch(tmp_path, ".thumbnails/1.jpg", "2024/.trash/2.jpg", "__MACOSX/3.jpg", ".4.jpg")
    train, evaluation = load_dataset("images", tmp_path)
    assert (train.name, evaluation.name) == ("train", "eval")
    assert (train.labels, train.classes, evaluation.labels, evaluation.classes) == (None, (), None, ())
    assert (len(train), len(evaluation)) == (21, 20)
    assert list(train.paths) == sorted(train.paths) and list(evaluation.paths) == sorted(evaluation.paths)
    found = {path.relative_to(tmp_path).as_posix() for path in (*train.paths, *evaluation.paths)}
    assert found == {f"{n}.jpg" for n in range(20)} | {f"2024/trip/{n}.PNG" for n in range(20)} | {"a.avif"}


def test_folders_train_and_eval_are_taken_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "train/deep/2.jpg", "eval/3.jpg", "other/4.jpg")
    train, evaluation = load_images(tmp_path)
    assert [path.name for path in train.paths] == ["1.jpg", "2.jpg"]
    assert [path.name for path in evaluation.paths] == ["3.jpg"]


def test_a_tenth_is_held_out_wherever_the_photos_lie() -> None:
    kept, held = hold_out_photos(many(5000), Path("photos"), "eval")
    assert (kept.name, held.name) == ("train", "eval")
    assert len(kept) + len(held) == 5000
    assert abs(len(held) - 500) < 4 * (5000 * 0.1 * 0.9) ** 0.5
    assert {path.parent.name for path in held.paths} == set("0123456")
    moved, _ = hold_out_photos(many(5000, Path("/elsewhere")), Path("/elsewhere"), "eval")
    assert [path.name for path in moved.paths] == [path.name for path in kept.paths]


def test_another_tenth_is_held_out_of_the_rest() -> None:
    train, evaluation = hold_out_photos(many(5000), Path("photos"), "eval")
    kept, val = hold_out_photos(train, Path("photos"))
    assert val.name == "val"
    assert abs(len(val) - len(train) / 10) < 4 * (len(train) * 0.1 * 0.9) ** 0.5
    assert not set(val.paths) & set(evaluation.paths)
    assert set(kept.paths) | set(val.paths) == set(train.paths)


def test_photos_that_are_added_move_no_others() -> None:
    before, after = (set(hold_out_photos(many(count), Path("photos"), "eval")[1].paths) for count in (1000, 1200))
    assert before == {path for path in after if path in many(1000).paths}


def test_of_few_photos_twenty_are_held_out_and_one_added_moves_one_at_most() -> None:
    held = [set(hold_out_photos(many(count), Path("photos"), "eval")[1].paths) for count in range(40, 90)]
    assert {len(paths) for paths in held} == {20}
    for before, after in itertools.pairwise(held):
        assert len(before - after) <= 1


@pytest.mark.parametrize(("name", "says"), [("eval", "Add some.$"), ("val", "Add some, or use --select-on eval.$")])
def test_too_few_to_hold_out(name: str, says: str) -> None:
    hold_out_photos(many(40), Path("photos"), name)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"^photos: 39 images are too few to split off 20 or more; 40 .*{says}"):
        hold_out_photos(many(39), Path("photos"), name)  # type: ignore[arg-type]


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such folder. --dataset images needs a folder of images"):
        load_images(tmp_path / "absent")
    with pytest.raises(DataError, match=r"contains no images. Name another folder with --data"):
        load_images(tmp_path)
    touch(tmp_path, "train/1.jpg", "eval/notes.txt")
    with pytest.raises(DataError, match=r"eval: contains no images"):
        load_images(tmp_path)


def test_photos_that_nothing_reads_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{n}.jpg" for n in range(40)), "a.HEIC", "b/c.heif", ".d.heic")
    touch(tmp_path / "classes", *(f"{name}/{file}" for name in "wxyz" for file in ("1.jpg", "2.heic", "3.jpg")))
    monkeypatch.setattr(walk, "EXTENSIONS", (".jpg",))
    events: list[Event] = []
    load_images(tmp_path, events.append)
    load_dataset("folder", tmp_path / "classes", events.append)
    says = "{} HEIC images are left out. Run `pip install pillow-heif` to read them."
    assert events == [Note(f"{tmp_path}: {says.format(6)}"), Note(f"{tmp_path / 'classes'}: {says.format(4)}")]
    monkeypatch.setattr(walk, "EXTENSIONS", (".jpg", ".heic", ".heif"))
    events.clear()
    train, evaluation = load_images(tmp_path, events.append)
    assert (len(train) + len(evaluation), events) == (54, [])


@pytest.mark.parametrize("suffix", [".avif", ".heic", ".heif"])
def test_pictures_of_phones_are_read(tmp_path: Path, suffix: str) -> None:
    if suffix != ".avif":
        pytest.importorskip("pillow_heif")
    paths = [tmp_path / f"{n}{suffix}" for n in range(40)]
    Image.new("RGB", (64, 48), (200, 40, 90)).save(paths[0], quality=95)
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    train, evaluation = load_images(tmp_path)
    assert len(train) + len(evaluation) == 40
    pixels = load_resized(train.paths[0], 16)
    assert np.abs(pixels.astype(int) - (200, 40, 90)).max() < 8
    assert (HEIC_READER in pixel_facts(paths, 16)["decoder"]) == (suffix != ".avif" or not HEIC_READER)
    paths[0].write_bytes(paths[0].read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be decoded"):
        load_resized(paths[0], 16)
