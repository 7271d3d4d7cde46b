"""CUB put in place from a server and from a local archive."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest

from rkd_cli.data import download as module
from rkd_cli.data.download import download_cub
from rkd_cli.data.transfer import md5_of
from rkd_cli.errors import DataError, DownloadError
from rkd_cli.events import Event
from servers import (
    MD5,
    Serve,
    answer,
    beside,
    good,
    notes,
)


def cub_archive(*names: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(f"CUB_200_2011/{name}")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"birds"))
    return gzip.compress(out.getvalue())


@pytest.fixture
def small_cub(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive of one list, and a check_cub content with that."""

    def check(folder: Path) -> None:
        if not (folder / "images.txt").is_file():
            raise DataError(f"{folder / 'images.txt'}: missing")

    monkeypatch.setattr(module, "check_cub", check)
    return cub_archive("images.txt")


def test_cub_is_fetched_once(serve: Serve, tmp_path: Path, small_cub: bytes) -> None:
    url, seen = serve(partial(good, body=small_cub))
    events: list[Event] = []
    md5 = hashlib.md5(small_cub).hexdigest()
    download = partial(download_cub, url=url, md5=md5, size=len(small_cub), report=events.append)
    data = tmp_path / "new/data"
    folder = download(data)
    assert folder == data / "CUB_200_2011" and (folder / "images.txt").read_bytes() == b"birds"
    assert (data / "CUB_200_2011.tgz").read_bytes() == small_cub and "You can delete" in notes(events)
    assert beside(folder) == {"CUB_200_2011", "CUB_200_2011.tgz"}

    assert download(data) == folder and "already complete" in notes(events)
    (folder / "images.txt").unlink()
    assert download(data) == folder and "exists already" in notes(events)
    assert (folder / "images.txt").is_file() and len(seen) == 1

    (folder / "images.txt").unlink()
    (data / "CUB_200_2011.tgz").write_bytes(b"damaged")
    assert download(data) == folder and len(seen) == 2
    assert (folder / "images.txt").is_file()


def test_cub_without_success_says_how_to_go_without_network(serve: Serve, tmp_path: Path, small_cub: bytes) -> None:
    url, _ = serve(answer(404))
    with pytest.raises(DownloadError, match="pass --archive FILE"):
        download_cub(tmp_path, url=url)
    assert not (tmp_path / "CUB_200_2011").exists()


def test_cub_from_a_local_archive(tmp_path: Path, small_cub: bytes) -> None:
    local, events, url = tmp_path / "mine.tgz", list[Event](), "http://127.0.0.1:9/"
    run = partial(download_cub, url=url, archive=local, report=events.append)
    with pytest.raises(DownloadError, match="no such file"):
        run(tmp_path / "a")
    local.write_bytes(small_cub)
    assert (run(tmp_path / "a") / "images.txt").is_file() and "not the official archive" in notes(events)
    events.clear()
    with pytest.raises(DownloadError, match=r"damaged \(the md5"):
        run(tmp_path / "b", md5=MD5, size=len(small_cub))
    assert not (tmp_path / "b/CUB_200_2011").exists()
    run(tmp_path / "b", md5=md5_of(local), size=len(small_cub))
    assert (tmp_path / "b/CUB_200_2011/images.txt").is_file() and notes(events) == ""
    assert local.read_bytes() == small_cub


def test_cub_from_an_archive_that_lacks_parts(tmp_path: Path, small_cub: bytes) -> None:
    (tmp_path / "mine.tgz").write_bytes(cub_archive("classes.txt"))
    with pytest.raises(DataError) as caught:
        download_cub(tmp_path, archive=tmp_path / "mine.tgz")
    first, second = caught.value.problems
    assert "mine.tgz: does not contain the whole data set" in first
    assert second.startswith(f"{tmp_path / 'CUB_200_2011/images.txt'}: missing") and "unpacking" not in second
    assert not (tmp_path / "CUB_200_2011").exists()


def test_the_real_birds_over_a_line_that_drops(serve: Serve, tmp_path: Path, cub10_archive: Path) -> None:
    body = cub10_archive.read_bytes()
    url, seen = serve(partial(good, body=body, stop=len(body) // 2), partial(good, body=body))
    folder = download_cub(tmp_path, url=url, md5=hashlib.md5(body).hexdigest(), size=len(body))
    assert len(seen) == 2 and len(list((folder / "images").glob("*/*.jpg"))) == 543
    shutil.rmtree(folder)


def test_an_md5_of_ones_own_is_compared_with_a_local_archive(tmp_path: Path, small_cub: bytes) -> None:
    """As --md5 with --archive."""
    local = tmp_path / "mine.tgz"
    local.write_bytes(small_cub)
    with pytest.raises(DownloadError, match=r"damaged \(the md5"):
        download_cub(tmp_path / "a", md5="0" * 32, size=None, archive=local)
    assert download_cub(tmp_path / "b", md5=md5_of(local), size=None, archive=local).is_dir()
