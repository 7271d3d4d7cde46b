"""The cache file: valid for exactly these files, made once, in the user's folder, listed and cleared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from forked import Forked
from rkd_cli.cli import main
from rkd_cli.data import ImageSet
from rkd_cli.data import cache as cache_module
from rkd_cli.data.cache import (
    PixelCache,
    cache_bytes,
    cache_path,
    clear_caches,
    file_stamps,
    list_caches,
    make_cache,
    read_cache,
)
from rkd_cli.data.decode import DECODER, Decoding, load_resized
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import Event, Note, Progress, silent
from rkd_cli.runtime.files import default_cache_folder, locked


def make(folder: Path, images: ImageSet, resize: int = 24, workers: int = 0) -> PixelCache:
    return make_cache(folder, images.paths, resize, workers, silent)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache_module, "_write_rows", fail)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_holds_each_image_resized(folder: Path, images: ImageSet, workers: int) -> None:
    events: list[Event] = []
    found = make_cache(folder, images.paths, 24, workers, events.append)
    for path, row in zip(images.paths, found.rows_of(images.paths), strict=True):
        assert torch.equal(found.pixels[row], torch.from_numpy(load_resized(path, 24).copy()))
    assert [type(event) for event in events] == [Note, Progress]
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".lock"] == [".pixels"]
    assert found.path.stat().st_size == cache_bytes(12, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_meet_without_a_seam(
    folder: Path, images: ImageSet, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK", 5)
    found = make(folder, images, workers=workers)
    for row, path in enumerate(images.paths):
        assert torch.equal(found.pixels[row], torch.from_numpy(load_resized(path, 24).copy()))


def test_a_valid_cache_is_read_and_not_made_again(
    folder: Path, images: ImageSet, request: pytest.FixtureRequest
) -> None:
    first = make(folder, images)
    request.getfixturevalue("never")
    assert torch.equal(make(folder, images).pixels, first.pixels)


@pytest.mark.parametrize("change", ["content", "time", "swapped", "in place", "shorter", "header", "pillow"])
def test_any_change_makes_it_invalid(
    folder: Path, images: ImageSet, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = images.paths[3], images.paths[6]
    if change in ("swapped", "in place"):  # of equal sizes and times
        for path, color in ((image, "green"), (other, "red")):
            Image.new("RGB", (9, 9), color).save(path, "bmp")
            os.utime(path, ns=(5, 5))
    path = make(folder, images).path
    time.sleep(0.02)  # a kernel's clock ticks so often
    if change == "content":
        Image.new("RGB", (9, 9), "red").save(image)
    elif change == "time":
        os.utime(image, ns=(1, 1))
    elif change == "swapped":
        image.rename(folder.parent / "aside")
        other.rename(image)
        (folder.parent / "aside").rename(other)
    elif change == "in place":
        image.write_bytes(other.read_bytes())
        os.utime(image, ns=(5, 5))
    elif change == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "header":
        with path.open("r+b") as file:
            file.seek(3)
            file.write(b"?")
    else:
        monkeypatch.setattr(PIL, "__version__", "0")
    assert read_cache(folder, images.paths, 24) is None
    again = make(folder, images)
    assert torch.equal(again.pixels[3], torch.from_numpy(load_resized(image, 24).copy()))


def test_a_stamp_stays_until_a_file_is_changed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode())
        os.utime(path, ns=(5, 5))
    stamps = file_stamps(paths)
    assert stamps.shape == (3,) and stamps.dtype == np.uint64 and len({*stamps.tolist()}) == 3
    assert np.array_equal(file_stamps(paths), stamps)
    time.sleep(0.02)  # a kernel's clock ticks so often
    paths[0].write_bytes(b"x")  # in place, of the same size
    os.utime(paths[0], ns=(5, 5))
    assert (file_stamps(paths) == stamps).tolist() == [False, True, True]
    paths[1].rename(tmp_path / "aside")
    paths[2].rename(paths[1])
    (tmp_path / "aside").rename(paths[2])
    swapped = file_stamps(paths)
    assert not (swapped == stamps).any()
    (tmp_path / "link").symlink_to("a")
    assert file_stamps([tmp_path / "link"]) == swapped[:1]
    with pytest.raises(DataError, match=r"gone: no such file. It was deleted meanwhile"):
        file_stamps([tmp_path / "gone"])


def test_sizes_and_sets_have_files_of_their_own(folder: Path, images: ImageSet) -> None:
    one, other = make(folder, images), make(folder, images, resize=20)
    fewer = make(folder, ImageSet(images.paths[1:], None, images.classes))
    assert len({one.path, other.path, fewer.path}) == 3
    assert read_cache(folder, images.paths, 24) is not None


def test_fits_have_files_of_their_own_and_limits_have_not(folder: Path, images: ImageSet) -> None:
    made = {}
    for decoding in (Decoding("square"), Decoding("crop"), Decoding("pad"), Decoding("crop", max_pixels=10**6)):
        made[decoding] = make_cache(folder, images.paths, 24, 0, silent, decoding)
        for row, path in enumerate(images.paths):
            assert torch.equal(made[decoding].pixels[row], torch.from_numpy(load_resized(path, 24, decoding)))
    assert len({cache.path for cache in made.values()}) == 3
    assert not torch.equal(made[Decoding("square")].pixels, made[Decoding("crop")].pixels)


def test_a_cache_of_published_pixels_is_not_used_for_photos(folder: Path, images: ImageSet) -> None:
    published = Decoding(published=True)
    make_cache(folder, images.paths, 24, 0, silent, published)
    assert read_cache(folder, images.paths, 24, published) is not None
    assert read_cache(folder, images.paths, 24) is None


@pytest.mark.parametrize("earlier", ["version", "fit"])
def test_a_cache_of_an_earlier_version_is_not_used(folder: Path, images: ImageSet, earlier: str) -> None:
    """Its pixels ignore EXIF orientation, transparency and profiles."""
    path = make(folder, images).path
    data = path.read_bytes()
    facts = json.loads(data[:4096])
    assert facts.pop("rkd pixels") == DECODER
    if earlier == "version":
        facts["rkd pixels"] = DECODER - 1
    else:
        facts = {"rkd pixels": DECODER} | {name: value for name, value in facts.items() if name != "fit"}
    path.write_bytes(json.dumps(facts).encode().ljust(4096) + data[4096:])
    assert read_cache(folder, images.paths, 24) is None


def test_a_place_has_one_file_however_it_is_spelled(
    folder: Path, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("set")
    here = make(folder, images)
    for other in ("set", "link", f"../{tmp_path.name}/set"):
        spelled = [Path(other) / path.relative_to(folder.parent) for path in images.paths]
        found = read_cache(folder, spelled, 24)
        assert found and found.path == here.path
    copies = [tmp_path / "copy" / path.relative_to(folder.parent) for path in images.paths]
    assert cache_path(folder, copies, 24) != here.path


def test_a_reader_keeps_what_it_mapped_while_the_file_is_made_anew(folder: Path, images: ImageSet) -> None:
    old = make(folder, images)
    before = old.pixels.clone()
    Image.new("RGB", (9, 9), "red").save(images.paths[0])
    assert not torch.equal(make(folder, images).pixels, before)
    assert torch.equal(old.pixels, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_damaged_images_are_named_and_nothing_is_left(folder: Path, images: ImageSet, workers: int) -> None:
    for index in (2, 7):
        images.paths[index].write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        make(folder, images, workers=workers)
    first, second = caught.value.problems
    assert str(images.paths[2]) in first and str(images.paths[7]) in second
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_says_so(images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--cache none"):
        make(tmp_path / "file", images)


def test_no_room_is_said_before_anything_is_decoded(
    folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch, never: None
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(RunError, match="are free"):
        make(folder, images)


def test_a_second_process_waits_for_the_first(folder: Path, images: ImageSet) -> None:
    """The first is this one, which holds the lock; the second may begin when it is free, and then finds the file."""
    path = cache_path(folder, images.paths, 24)
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from rkd_cli.data.cache import make_cache\n"
        "paths = [Path(line) for line in sys.argv[2:]]\n"
        "print('started', flush=True)\n"
        "print(make_cache(Path(sys.argv[1]), paths, 24, 0, print).path)"
    )
    finished = make(folder.parent / "elsewhere", images).path
    with locked(path):
        second = Forked(["-c", code, folder, *images.paths])
        second.until("started", timeout=60)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1)
        assert {entry.suffix for entry in folder.iterdir()} == {".lock"}
        finished.rename(path)
    assert second.communicate(timeout=30)[0] == f"started\n{path}\n"  # and no note that it decodes
    assert second.returncode == 0


def test_images_beside_it_stay_a_folder_of_classes(folder: Path, images: ImageSet) -> None:
    make(default_cache_folder(), images)
    assert len(ImageFolder(folder.parent)) == len(images)
    assert not default_cache_folder().is_relative_to(folder.parent)


def test_the_default_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_cache_folder() == Path(os.environ["RKD_CACHE_DIR"])
    monkeypatch.delenv("RKD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if sys.platform == "linux":
        assert default_cache_folder() == Path("/somewhere/rkd")


@pytest.mark.parametrize("damage", [b"", b"damaged", b"[]", b'{"folder": 3, "images": "many"}', b"\xff"])
def test_caches_are_listed_and_cleared(folder: Path, images: ImageSet, damage: bytes) -> None:
    assert list_caches(folder) == clear_caches(folder) == []
    one, other = make(folder, images), make(folder, images, resize=20)
    other.path.write_bytes(damage)
    (folder / "notes.txt").write_text("mine")
    (folder / f".{one.path.name}.4711.part").touch()
    (folder / ".30-0123456789ab.pixels.4711.part").touch()
    files = list_caches(folder)
    assert [(file.path, file.count, file.resize) for file in files] == [(other.path, 0, 20), (one.path, 12, 24)]
    assert (files[1].images, files[1].bytes) == (str(folder.parent), cache_bytes(12, 24))
    assert clear_caches(folder) == files
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {"notes.txt"}
    assert one.pixels.sum() > 0  # whoever reads it keeps it


def test_a_cache_that_is_cleared_while_it_is_opened(
    folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, header = make(folder, images), cache_module._header

    def cleared(paths: Sequence[Path], resize: int, decoding: Decoding) -> bytes:
        clear_caches(folder)
        return header(paths, resize, decoding)

    monkeypatch.setattr(cache_module, "_header", cleared)
    found = read_cache(folder, images.paths, 24)
    assert found and torch.equal(found.pixels, made.pixels)
    assert read_cache(folder, images.paths, 24) is None


def test_a_cache_that_is_being_made_is_not_cleared(folder: Path, images: ImageSet) -> None:
    one, other = make(folder, images), make(folder, images, resize=20)
    (folder / f".{one.path.name}.4711.part").touch()
    with locked(one.path):
        assert [file.path for file in clear_caches(folder)] == [other.path]
    assert one.path.exists() and (folder / f".{one.path.name}.4711.part").exists()


def test_the_command_lists_and_clears(folder: Path, images: ImageSet, capfd: pytest.CaptureFixture[str]) -> None:
    def rkd(*arguments: str, command: str = "cache") -> str:
        with pytest.raises(SystemExit) as end:
            main([command, *arguments])
        out, err = capfd.readouterr()
        assert (end.value.code, err) == (0, "")
        return out

    where = default_cache_folder()
    assert rkd() == f"{where}: 0 files, 0 MB\n"
    make(where, images, resize=200)
    listed = rkd()
    assert "200" in listed and f"{where}: 1 file, 1 MB\n" in listed
    assert json.loads(rkd("--json", command="doctor"))["caches"]["rkd cache"]["files"] == 1  # without the lock
    assert rkd("--clear") == f"{where}: 1 file, 1 MB removed\n"
    assert rkd("--cache-dir", str(folder)) == f"{folder}: 0 files, 0 MB\n"
