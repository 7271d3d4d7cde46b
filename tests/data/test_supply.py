"""Streamed, mapped and resident batches: the same bits; the cache file: valid for exactly these files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from rkd_cli.data import cache as cache_module
from rkd_cli.data import load_dataset
from rkd_cli.data.batches import EvalBatches, TrainBatches
from rkd_cli.data.cache import PixelCache, cache_bytes, cache_path, make_cache, read_cache
from rkd_cli.data.images import ImageSet, load_resized
from rkd_cli.data.sampler import BalancedBatchSampler
from rkd_cli.data.supply import Mapped, Resident, Streamed, Supply, pick_supply
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import Event, Note, Progress, silent

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "set/.rkd-cache"


@pytest.fixture
def images(folder: Path) -> ImageSet:
    paths = []
    for index in range(12):
        path = folder.parent / f"{index % 3}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 256, (20 + index, 30, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        paths.append(path)
    return ImageSet(tuple(paths), tuple(index % 3 for index in range(12)), ("a", "b", "c"))


def make(folder: Path, images: ImageSet, resize: int = 24, workers: int = 0) -> PixelCache:
    return make_cache(folder, images.paths, resize, Streamed(resize, resize, workers).decode, silent)


def everything(supply: Supply, images: ImageSet) -> list[Tensor]:
    sampler = BalancedBatchSampler(images.labels, 6, 2, 3, seed=5)
    train = TrainBatches(images, sampler, 24, 19, supply)
    tensors = [tensor for epoch in (1, 2, 1) for batch in train.epoch(epoch) for tensor in batch]
    return tensors + [tensor for batch in EvalBatches(images, 5, 24, 19, supply) for tensor in batch]


@pytest.mark.parametrize("kind", ["2 workers", "mapped", "resident", "held out"])
def test_every_supply_delivers_the_same_bits(folder: Path, images: ImageSet, kind: str) -> None:
    expected = everything(Streamed(24, 19, 0), images)
    if kind == "held out":  # a cache of more images than those of this split, in another order
        whole = ImageSet(images.paths[::-1], images.labels, images.classes)
        images = ImageSet(images.paths[2:], images.labels[2:], images.classes)
        expected, supply = everything(Streamed(24, 19, 0), images), Mapped(make(folder, whole), 19)  # type: ignore[assignment]
    else:
        supply = {  # type: ignore[assignment]
            "2 workers": lambda: Streamed(24, 19, 2),
            "mapped": lambda: Mapped(make(folder, images), 19),
            "resident": lambda: Resident(make(folder, images), 19, CPU),
        }[kind]()
    found = everything(supply, images)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    pixels = found[0]
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda
def test_a_gpu_delivers_the_same_bits(folder: Path, images: ImageSet) -> None:
    resident = everything(Resident(make(folder, images), 19, torch.device("cuda")), images)
    assert all(tensor.is_cuda for tensor in resident)
    expected = everything(Streamed(24, 19, 0), images)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(resident, expected, strict=True))
    pinned = everything(Mapped(make(folder, images), 19, pin=True), images)
    assert pinned[0].is_pinned()
    assert all(torch.equal(a, b) for a, b in zip(pinned, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_holds_each_image_resized(folder: Path, images: ImageSet, workers: int) -> None:
    events: list[Event] = []
    found = make_cache(folder, images.paths, 24, Streamed(24, 24, workers).decode, events.append)
    for path, row in zip(images.paths, found.rows_of(images.paths), strict=True):
        assert torch.equal(found.pixels[row], torch.from_numpy(load_resized(path, 24).copy()))
    assert [type(event) for event in events] == [Note, Progress]
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".lock"] == [".pixels"]
    assert found.path.stat().st_size == cache_bytes(12, 24)


def never(paths: Sequence[Path], plan: object) -> Iterator[Tensor | DataError]:
    raise AssertionError("decoded again")


def test_a_valid_cache_is_read_and_not_made_again(folder: Path, images: ImageSet) -> None:
    first = make(folder, images)
    assert torch.equal(make_cache(folder, images.paths, 24, never, silent).pixels, first.pixels)


@pytest.mark.parametrize("change", ["content", "time", "shorter", "header", "pillow"])
def test_any_change_makes_it_invalid(
    folder: Path, images: ImageSet, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, image = make(folder, images).path, images.paths[3]
    if change == "content":
        Image.new("RGB", (9, 9), "red").save(image)
    elif change == "time":
        os.utime(image, ns=(1, 1))
    elif change == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "header":
        with path.open("r+b") as file:
            file.seek(3)
            file.write(b"?")
    else:
        monkeypatch.setattr(cache_module.PIL, "__version__", "0")
    assert read_cache(folder, images.paths, 24) is None
    again = make(folder, images)
    assert torch.equal(again.pixels[3], torch.from_numpy(load_resized(image, 24).copy()))


def test_sizes_and_sets_have_files_of_their_own(folder: Path, images: ImageSet) -> None:
    one, other = make(folder, images), make(folder, images, resize=20)
    fewer = make(folder, ImageSet(images.paths[1:], images.labels[1:], images.classes))
    assert len({one.path, other.path, fewer.path}) == 3
    assert read_cache(folder, images.paths, 24) is not None


def test_a_reader_keeps_what_it_mapped_while_the_file_is_made_anew(folder: Path, images: ImageSet) -> None:
    old = make(folder, images)
    before = old.pixels.clone()
    Image.new("RGB", (9, 9), "red").save(images.paths[0])
    assert not torch.equal(make(folder, images).pixels, before)
    assert torch.equal(old.pixels, before)


def test_all_damaged_images_are_named_and_nothing_is_left(folder: Path, images: ImageSet) -> None:
    for index in (2, 7):
        images.paths[index].write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        make(folder, images)
    assert [str(images.paths[index]) in line for index, line in zip((2, 7), caught.value.problems, strict=True)] == [
        True,
        True,
    ]
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_says_so(images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--cache none"):
        make(tmp_path / "file", images)


def test_no_room_is_said_before_anything_is_decoded(
    folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(RunError, match="are free"):
        make_cache(folder, images.paths, 24, never, silent)


def test_a_second_process_waits_for_the_first(folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(folder, images)
    waited = []

    class Lock(FileLock):
        def acquire(self, *args: object, **more: object) -> object:
            waited.append(self.lock_file)
            return super().acquire(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "FileLock", Lock)
    assert make_cache(folder, images.paths, 24, never, silent).path == found.path
    assert waited == [str(cache_path(folder, images.paths, 24).with_suffix(".lock"))]


@pytest.mark.parametrize(
    ("mode", "make", "kind"),
    [
        ("auto", True, Mapped),
        ("auto", False, Streamed),
        ("none", True, Streamed),
        ("disk", False, Mapped),
        ("device", True, Mapped),  # a CPU has the pages of the file in its memory already
    ],
)
def test_what_each_mode_supplies(folder: Path, images: ImageSet, mode: str, make: bool, kind: type) -> None:
    assert type(pick_supply(mode, folder, [images, images], 24, 19, CPU, 0, silent, make)) is kind


def test_auto_streams_where_the_disk_is_small(folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2 * cache_bytes(12, 24)})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    assert type(pick_supply("auto", folder, [images], 24, 19, CPU, 0, silent)) is Streamed
    assert not folder.exists()


def test_auto_reads_a_cache_that_is_there_in_a_folder_that_cannot_be_written(
    folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick_supply("disk", folder, [images], 24, 19, CPU, 0, silent)
    monkeypatch.setattr(cache_module.os, "access", lambda *_: False)
    assert type(pick_supply("auto", folder, [images], 24, 19, CPU, 0, silent)) is Mapped


def test_a_folder_data_set_does_not_take_the_cache_for_a_class(folder: Path, images: ImageSet) -> None:
    extra = folder.parent / "3/x.png"
    extra.parent.mkdir()
    Image.new("RGB", (9, 9)).save(extra)
    splits = load_dataset("folder", folder.parent)
    make(folder, splits[0])
    assert load_dataset("folder", folder.parent) == splits
