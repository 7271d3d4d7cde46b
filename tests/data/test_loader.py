"""Streamed, mapped and resident batches are the same bits; and what becomes of workers that fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data import BalancedBatchSampler, ImageSet, decode, workers
from rkd_cli.data.cache import cache_bytes, make_cache
from rkd_cli.data.decode import Crop, Decoding, load_resized, random_crops, resized_crops
from rkd_cli.data.loader import (
    CachedViews,
    DeviceReader,
    DrawCrops,
    EvalLoader,
    FileReader,
    PixelReader,
    StreamReader,
    TrainLoader,
    find_damaged,
    pick_reader,
)
from rkd_cli.data.workers import in_workers
from rkd_cli.errors import DataError, RunError
from rkd_cli.events import silent
from rkd_cli.runtime.seeds import derive_seed
from rkd_cli.schemas import Fit

CPU = torch.device("cpu")


CROPS: dict[str, DrawCrops] = {"random": random_crops, "resized": partial(resized_crops, min_area=0.25)}


def everything(reader: PixelReader, images: ImageSet, draw: DrawCrops = random_crops) -> list[Tensor]:
    loader = TrainLoader(images, BalancedBatchSampler(images.labels, 6, 2, 3, seed=5), 24, 19, reader, draw)
    tensors = [tensor for epoch in (1, 2, 1) for batch in loader.epoch(epoch) for tensor in batch]
    return tensors + [tensor for batch in EvalLoader(images, 5, 24, 19, reader) for tensor in batch]


def cut(folder: Path, images: ImageSet) -> FileReader:
    return FileReader(make_cache(folder, images.paths, 24, 0, silent), 19)


READERS: dict[str, Callable[[Path, ImageSet], PixelReader]] = {
    "2 workers": lambda folder, images: StreamReader(24, 19, 2),
    "file": cut,
    "device": lambda folder, images: DeviceReader(cut(folder, images).cache, 19, CPU),
    # a cache of more images than those of the split, in another order
    "file of more": lambda folder, images: cut(
        folder, ImageSet((*images.paths[::-1], folder.parent / "0/0.png"), None, ())
    ),
}


@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.parametrize("kind", READERS)
def test_every_reader_gives_the_same_bits(folder: Path, images: ImageSet, kind: str, crops: str) -> None:
    images = ImageSet(images.paths[1:], images.labels and images.labels[1:], images.classes)
    expected = everything(StreamReader(24, 19, 0), images, CROPS[crops])
    found = everything(READERS[kind](folder, images), images, CROPS[crops])
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    pixels = found[0]
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fit", ["square", "crop", "pad"])
@pytest.mark.parametrize("mode", ["none", "disk"])
def test_every_reader_decodes_as_the_set_says(folder: Path, images: ImageSet, mode: str, fit: Fit) -> None:
    images = images.decoded(10**6, fit)
    due = [torch.from_numpy(load_resized(path, 24, Decoding(fit))) for path in images.paths]
    for count in (0, 2):
        reader = pick_reader(mode, folder, [images, images], 24, 19, CPU, count, silent)
        (batch,) = reader.read(images, [[Crop(index, 2, 2) for index in range(len(images))]])
        assert torch.equal(batch.images.permute(0, 2, 3, 1), torch.stack(due)[:, 2:21, 2:21])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_of_pixels_reaches_whoever_decodes(folder: Path, images: ImageSet, workers: int) -> None:
    images = images.decoded(30 * 30)  # they are 20 to 31 pixels high, and 30 wide
    (last,) = images.paths[11:]
    says = f"{last}: cannot be used (930 pixels, more than the limit of 900)"
    for mode in ("none", "disk"):
        with pytest.raises(DataError) as caught:
            reader = pick_reader(mode, folder, [images], 24, 19, CPU, workers, silent)
            list(reader.read(images, [[Crop(index, 0, 0) for index in range(len(images))]]))
        assert [problem.partition(". Increase")[0] for problem in caught.value.problems] == [says]
    assert list(find_damaged([images], workers, silent)) == [last]


@pytest.mark.cuda
@pytest.mark.parametrize("crops", CROPS)
def test_a_gpu_gives_the_same_bits(folder: Path, images: ImageSet, crops: str) -> None:
    expected = everything(StreamReader(24, 19, 0), images, CROPS[crops])
    on_device = everything(DeviceReader(cut(folder, images).cache, 19, torch.device("cuda")), images, CROPS[crops])
    assert all(tensor.is_cuda for tensor in on_device)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_device, expected, strict=True))
    for reader in (FileReader(cut(folder, images).cache, 19, pin=True), StreamReader(24, 19, 2, pin=True)):
        pinned = everything(reader, images, CROPS[crops])
        assert pinned[0].is_pinned()
        assert all(torch.equal(a, b) for a, b in zip(pinned, expected, strict=True))


@pytest.mark.parametrize("kind", ["2 workers", "file", "device"])
def test_batches_say_which_images_they_hold(folder: Path, images: ImageSet, kind: str) -> None:
    reader = READERS[kind](folder, images)
    assert images.labels
    loader = TrainLoader(images, BalancedBatchSampler(images.labels, 6, 2, 3, seed=5), 24, 19, reader, random_crops)
    for batch in loader.epoch(1):
        assert batch.labels.tolist() == [images.labels[index] for index in batch.index.tolist()]
    unlabeled = ImageSet(images.paths, None, ())
    batches = list(EvalLoader(unlabeled, 5, 24, 19, reader))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(len(images)))
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == {-1}


@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.parametrize("count", [0, 2])
def test_an_epoch_is_a_function_of_its_number_and_goes_on_anywhere(images: ImageSet, count: int, crops: str) -> None:
    sampler = BalancedBatchSampler(images.labels, 6, 2, 4, seed=5)
    loader = TrainLoader(images, sampler, 24, 19, StreamReader(24, 19, count), CROPS[crops])
    whole = list(loader.epoch(3))
    sampler.set_epoch(9)  # whoever uses the sampler too
    next(abandoned := loader.epoch(2))
    del abandoned
    rest = list(loader.epoch(3, first=2))
    assert len(rest) == len(loader) - 2
    for (one, *_), (other, *_) in zip(whole[2:], rest, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 1])
def test_damaged_images_end_training_at_once_and_evaluation_with_all(images: ImageSet, count: int) -> None:
    for index in (2, 7):
        images.paths[index].write_bytes(b"no image")
    reader = StreamReader(24, 19, count)
    singly = [[Crop(index, 0, 0)] for index in range(len(images))]
    with pytest.raises(DataError) as caught:
        list(reader.read(images, singly))
    assert [str(images.paths[2]) in line for line in caught.value.problems] == [True]
    seen = []
    with pytest.raises(DataError) as caught:
        for batch in EvalLoader(images, 1, 24, 19, reader):
            seen += batch.index.tolist()
    assert seen == [index for index in range(len(images)) if index not in (2, 7)]
    assert list(find_damaged([images, images], count, silent)) == [images.paths[2], images.paths[7]]
    assert list(find_damaged([images], count, silent).values()) == list(caught.value.problems)


@pytest.mark.parametrize(
    ("mode", "make", "kind"),
    [
        ("auto", True, FileReader),
        ("auto", False, StreamReader),
        ("none", True, StreamReader),
        ("disk", False, FileReader),
        ("device", True, FileReader),  # a CPU has the pages of the file in its memory already
    ],
)
def test_the_reader_of_each_mode(folder: Path, images: ImageSet, mode: str, make: bool, kind: type) -> None:
    maker = make_cache if make else None
    assert type(pick_reader(mode, folder, [images, images], 24, 19, CPU, 0, silent, maker)) is kind


def test_without_a_folder_it_is_the_users(images: ImageSet) -> None:
    reader = pick_reader("auto", None, [images], 24, 19, CPU, 0, silent)
    assert isinstance(reader, FileReader)
    assert reader.cache.path.parent == Path(os.environ["RKD_CACHE_DIR"])


def test_auto_streams_where_the_disk_is_small(folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2 * cache_bytes(12, 24)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert type(pick_reader("auto", folder, [images], 24, 19, CPU, 0, silent)) is StreamReader
    assert not folder.exists()


def test_auto_reads_a_cache_that_is_there_in_a_folder_that_cannot_be_written(
    folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick_reader("disk", folder, [images], 24, 19, CPU, 0, silent)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert type(pick_reader("auto", folder, [images], 24, 19, CPU, 0, silent)) is FileReader


@pytest.mark.parametrize(
    ("sides", "min_area"),
    [
        ((24, 19), None),
        ((24, 24), None),
        ((256, 224), 0.25),
        ((36, 32), 0.08),
        ((300, 32), 0.9),
        ((40, 32), 1.0),  # where no draw fits
        ((2, 1), 0.01),
    ],
)
def test_cached_views_are_those_that_torch_draws_one_by_one(
    monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int], min_area: float | None
) -> None:
    monkeypatch.setattr(decode, "_DRAWS", 100)  # blocks that meet within an image
    views = CachedViews(60, 3, sides, 7, min_area)
    generator = torch.Generator().manual_seed(derive_seed(7, "views"))
    indices = [image for image in range(60) for _ in range(3)]
    if min_area is None:
        expected = random_crops(indices, *sides, generator)
    else:
        expected = resized_crops(indices, *sides, generator, min_area)
    expected = [replace(crop, view=number % 3) for number, crop in enumerate(expected)]
    assert views.crops(range(180)) == expected
    assert len(views) == 180
    batch = [5, 0, 59, 5]
    picks = torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(1)).tolist()
    drawn = views.draw(batch, *sides, torch.Generator().manual_seed(1))
    assert drawn == [expected[3 * image + pick] for image, pick in zip(batch, picks, strict=True)]


def test_other_cached_views_have_another_digest() -> None:
    digests = {CachedViews(9, 2, (24, 19), seed, area).digest for seed in (0, 1) for area in (None, 0.25, 0.5)}
    assert len(digests) == 6
    assert CachedViews(9, 2, (24, 19), 1, 0.5).digest in digests


def test_a_cached_view_takes_nine_bytes() -> None:
    assert CachedViews(1000, 8, (256, 224), 0, 0.25)._table.nbytes == 1000 * 8 * 9


# -- workers


def failed(work: Callable[[int], object], says: str) -> None:
    start = time.monotonic()
    with pytest.raises(RunError, match=says) as caught:
        list(in_workers(work, range(8), 2))
    assert "\n" not in str(caught.value)
    assert "Try fewer --workers" in str(caught.value)
    assert time.monotonic() - start < 20


def killed(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def stuck(item: int) -> int:
    if item == 3:
        time.sleep(3)
    return item


def broken(item: int) -> int:
    raise RuntimeError(f"no {item}")


@pytest.mark.parametrize("count", [0, 2])
def test_results_come_in_order(count: int) -> None:
    before = torch.random.get_rng_state()
    assert list(in_workers(str, iter(range(20)), count)) == [str(item) for item in range(20)]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_killed_worker_is_one_line() -> None:
    failed(killed, r"workers that decode images failed \(DataLoader worker \(pid")


def test_a_stuck_worker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TIME_LIMIT", 1.0)
    failed(stuck, "timed out after 1.0 seconds")


def test_a_defect_in_a_worker_is_not_swallowed() -> None:
    failed(broken, "Caught RuntimeError in DataLoader worker process 0")


def test_workers_leave_ctrl_c_to_their_parent(images: ImageSet) -> None:
    def handlers(item: int) -> tuple[object, object]:
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    assert list(in_workers(handlers, [0], 1)) == [(signal.SIG_IGN, signal.SIG_DFL)]


SMALL = """
import sys
from pathlib import Path
import torch
from rkd_cli.data import ImageSet
from rkd_cli.data.cache import make_cache
from rkd_cli.data.loader import EvalLoader, StreamReader, find_damaged
from rkd_cli.events import silent
from rkd_cli.runtime.seeds import derive_seed

paths = tuple(sorted(Path(sys.argv[1]).glob("*.png")))
images = ImageSet(paths, None, ())
cache = make_cache(Path(sys.argv[2]), paths, 256, 2, silent)
batches = list(EvalLoader(images, 16, 256, 256, StreamReader(256, 256, 2)))
whole = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
print(torch.equal(whole, cache.pixels), len(whole), find_damaged([images], 2, silent))
"""


@pytest.fixture
def in_small_shm() -> Iterator[list[str]]:
    """What to put before a command to give it a /dev/shm of one megabyte."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield command


def test_a_small_shm_is_enough(in_small_shm: list[str], tmp_path: Path) -> None:
    for index in range(64):  # 12.6 MB decoded
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / f"{index:02}.png")
    command = [*in_small_shm, sys.executable, "-c", SMALL, str(tmp_path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "True 64 {}\n"), done.stderr
