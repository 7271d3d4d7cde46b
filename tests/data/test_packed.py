"""``--data`` of tar, zip and parquet files, and of Hugging Face data sets."""

from __future__ import annotations

import io
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkd_cli.data import ImageSet, find_dataset, load_dataset
from rkd_cli.data.cache import make_cache, read_cache
from rkd_cli.data.copies import copy_notes
from rkd_cli.data.decode import load_resized
from rkd_cli.data.loader import find_damaged, without_damaged
from rkd_cli.data.members import MemberPaths
from rkd_cli.data.sets.packed import _expanded
from rkd_cli.data.splits import relative_names
from rkd_cli.errors import DataError
from rkd_cli.events import silent

Files = dict[str, bytes]


def jpeg(number: int) -> bytes:
    file, pixels = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def shard(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def in_folders(classes: int, each: int = 2, of: str = "") -> Files:
    return {f"{of}c{n // each}/{n}.jpg": jpeg(n) for n in range(classes * each)}


def samples(numbers: Iterable[int]) -> Files:
    files: Files = {}
    for n in numbers:
        files |= {f"k{n}.jpg": jpeg(n), f"k{n}.txt": b"a bird", f"k{n}.cls": b"%d" % (n // 2)}
    return files


def labeled(images: ImageSet) -> list[tuple[str, str]]:
    return [(p.stem, images.classes[label]) for p, label in zip(images.paths, images.labels or (), strict=True)]


def found(root: Path) -> tuple[ImageSet, ImageSet]:
    assert find_dataset(root) == "packed"
    return load_dataset("packed", root)


def test_shards_have_the_labels_of_their_samples(tmp_path: Path) -> None:
    shard(tmp_path / "s-00.tar", samples(range(6)))
    shard(tmp_path / "s-01.tar", samples([6]) | {"k7.jpg": jpeg(7), "k7.json": b'{"class": "3", "path": "x"}'})
    root = tmp_path / "s-{00..01}.tar"
    train, evaluation = found(root)
    assert labeled(train) == [("k0", "0"), ("k1", "0"), ("k2", "1"), ("k3", "1")]
    assert labeled(evaluation) == [("k4", "2"), ("k5", "2"), ("k6", "3"), ("k7", "3")]
    assert relative_names(evaluation.paths, root)[-1] == "s-01.tar/k7.jpg"
    (tmp_path / "k6.jpg").write_bytes(jpeg(6))
    assert np.array_equal(load_resized(evaluation.paths[2], 8), load_resized(tmp_path / "k6.jpg", 8))


def test_names_of_shards_name_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        shard(tmp_path / f"{split}-0.tar", samples(range(4 * number, 4 * number + 4)))
    train, evaluation = found(tmp_path / "{train,test}-0.tar")
    assert (train.classes, evaluation.classes) == (("0", "1"), ("2", "3"))


@pytest.mark.parametrize("pack", [shard, zipped])
def test_class_folders_in_an_archive(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    root = pack(tmp_path / f"a.{'tar' if pack is shard else 'zip'}", in_folders(4, of="photos/"))
    train, evaluation = found(root)
    assert [*labeled(train), *labeled(evaluation)] == [(str(n), f"c{n // 2}") for n in range(8)]


def test_split_folders_in_an_archive(tmp_path: Path) -> None:
    root = zipped(tmp_path / "a.zip", in_folders(4, of="x/train/") | in_folders(2, of="x/test/"))
    train, evaluation = found(root)
    assert (train.classes, evaluation.classes) == (("c0", "c1", "c2", "c3"), ("c0", "c1"))


def test_images_without_labels_are_held_out(tmp_path: Path) -> None:
    root = shard(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(60)} | {"._1.jpg": b"", "note.txt": b""})
    train, evaluation = found(root)
    assert train.labels is None
    assert isinstance(train.paths, MemberPaths)
    assert len(train) + len(evaluation) == 60
    again = load_dataset("images", root)
    assert [*again[1].paths] == [*evaluation.paths]


def test_damaged_members_are_named_and_left_out(tmp_path: Path) -> None:
    files = in_folders(4, each=6)
    for name in ("c0/3.jpg", "c2/12.jpg", "c3/23.jpg"):
        files[name] = files[name][:200]
    sets = found(shard(tmp_path / "a.tar", files))
    damaged = find_damaged(sets, 0, silent)
    assert [str(path.relative_to(tmp_path)) for path in damaged] == [
        "a.tar/c0/3.jpg",
        "a.tar/c2/12.jpg",
        "a.tar/c3/23.jpg",
    ]
    assert all(
        text.startswith(f"{path}: cannot be decoded (") and "BytesIO" not in text for path, text in damaged.items()
    )
    assert sum(map(len, without_damaged(sets, 0, silent))) == 21


@pytest.mark.parametrize("kept", [700, 1024, 2000, 4096])
def test_a_truncated_tar_is_an_error(tmp_path: Path, kept: int) -> None:
    root = shard(tmp_path / "a.tar", in_folders(4))
    root.write_bytes(root.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar archive"):
        load_dataset("packed", root)


def test_names_that_lead_elsewhere_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(99))
    files = in_folders(4) | {"../x.jpg": jpeg(1), "c0/../../y.jpg": jpeg(2), "/c1/z.jpg": jpeg(3)}
    for root in (shard(tmp_path / "a.tar", files), zipped(tmp_path / "b.zip", files)):
        train, _ = load_dataset("packed", root)
        assert {*relative_names(train.paths, root)} >= {f"{root.name}/c0/y.jpg", f"{root.name}/c1/z.jpg"}
        assert not find_damaged([train], 0, silent)


def test_zip_members_that_are_refused(tmp_path: Path) -> None:
    wrong = {"c0/locked.jpg": "encrypted", "c1/huge.jpg": "more than the 536,870,912", "c2/crc.jpg": "checksum"}
    root = zipped(tmp_path / "a.zip", in_folders(4) | dict.fromkeys(wrong, jpeg(0)))
    data = bytearray(root.read_bytes())
    at = data.find(b"PK\1\2")
    while at >= 0:
        name = data[at + 46 : at + 46 + struct.unpack_from("<H", data, at + 28)[0]].decode()
        if name == "c0/locked.jpg":
            data[at + 8] |= 1
        elif name == "c1/huge.jpg":
            struct.pack_into("<I", data, at + 24, 0xFFFFFF00)
        elif name == "c2/crc.jpg":
            data[at + 16] ^= 1
        at = data.find(b"PK\1\2", at + 4)
    root.write_bytes(data)
    damaged = {str(path.relative_to(root)): text for path, text in find_damaged(found(root), 0, silent).items()}
    assert damaged.keys() == wrong.keys()
    assert all(reason in damaged[name] for name, reason in wrong.items())


def test_large_images_of_little_data_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (3000, 3000)).save(file, "PNG")
    train, _ = found(zipped(tmp_path / "a.zip", in_folders(4) | {"c0/bomb.png": file.getvalue()}))
    (text,) = find_damaged([train.decoded(10**6)], 0, silent).values()
    assert "a.zip/c0/bomb.png: cannot be used (9,000,000 pixels, more than the limit of 1,000,000)" in text


def test_a_cache_is_renewed_when_the_archive_changes(tmp_path: Path) -> None:
    root = shard(tmp_path / "a.tar", in_folders(4))
    train, _ = found(root)
    cache = make_cache(tmp_path, train.paths, 8, 0, silent)
    assert np.array_equal(cache.pixels[1].numpy(), load_resized(train.paths[1], 8))
    assert read_cache(tmp_path, train.paths, 8)
    shard(root, {name: jpeg(50 + n) for n, name in enumerate(in_folders(4))})
    assert not read_cache(tmp_path, train.paths, 8)


def test_copies_are_named(tmp_path: Path) -> None:
    root = zipped(tmp_path / "a.zip", in_folders(4) | {"c3/copy.jpg": jpeg(0)})
    (note,) = copy_notes(*found(root), root)
    assert "(a.zip/c3/copy.jpg is a.zip/c0/0.jpg)" in note


def test_braces_expand_as_in_a_shell() -> None:
    assert _expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert _expanded("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.tar", b"no tar", "a.tar: not a whole tar archive"),
        ("a.tar", b"\x1f\x8b" + bytes(600), "Decompress it"),
        ("a.zip", b"no zip", "a.zip: not a whole zip archive"),
        ("s-{0..2}.tar", None, r"s-0.tar: no such file \(3 of 3 are missing\)"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, name: str, data: bytes | None, says: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        load_dataset("packed", tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_a_label_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    root = shard(tmp_path / "a.tar", samples(range(4)) | {"k9.jpg": jpeg(9), "k9.cls": b"cat"})
    with pytest.raises(DataError, match=r"a.tar/k9.cls: no label can be read"):
        load_dataset("packed", root)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ORG/NAME, where datasets looks first; no network."""
    datasets, config = pytest.importorskip("datasets"), pytest.importorskip("datasets.config")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    (tmp_path / "org/set").mkdir(parents=True)
    for split, classes in (("train", (3, 1)), ("test", (0, 2))):
        rows = [{"image": {"bytes": jpeg(n), "path": None}, "label": n} for n in classes for _ in range(2)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(
            tmp_path / f"org/set/{split}-00000-of-00001.parquet"
        )
    return tmp_path


def test_hugging_face_and_parquet(hub: Path) -> None:
    for root in (Path("hf:org/set"), Path("org/set")):
        train, evaluation = found(root)
        assert (train.classes, evaluation.classes) == (("b", "d"), ("a", "c"))
        assert labeled(train)[:1] == [("0", "d")]
        assert not find_damaged([train, evaluation], 0, silent)
        (hub / "3.jpg").write_bytes(jpeg(3))
        assert np.array_equal(load_resized(train.paths[1], 8), load_resized(hub / "3.jpg", 8))
    assert str(train.paths[1]) == "org/set/train-00000-of-00001.parquet/1"


def test_a_data_set_that_is_nowhere_is_one_line(hub: Path) -> None:
    with pytest.raises(DataError, match="hf:no/such: cannot be loaded by datasets") as error:
        load_dataset("packed", Path("hf:no/such"))
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_dataset("packed", Path("hf:org/other"))


def test_an_archive_trains_resumes_and_is_evaluated(rkd: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    root, run = shard(tmp_path / "a.tar", in_folders(4, 4)), tmp_path / "run"
    flags = ["--base", "timm:test_resnet", "--weights", "none", "--resize", 36, "--image-size", 32, "--batch", 4]
    flags += [
        "--num-image-per-class",
        2,
        "--iter-per-epoch",
        1,
        "--embedding-size",
        8,
        "--workers",
        0,
        "--sample",
        "all",
    ]
    code, _, err = rkd(
        "train-teacher", "--data", root, *flags, "--epochs", 1, "--lr-decay-epochs=", "--save-dir", run, "--keep-state"
    )
    assert (code, err) == (0, "")
    assert rkd("train-teacher", "--resume", "--epochs", 2, "--save-dir", run)[0] == 0
    code, out, err = rkd("evaluate", run, "--workers", 0)
    assert (code, err) == (0, "")
    assert "next: " not in out
