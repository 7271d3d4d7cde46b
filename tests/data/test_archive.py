"""Unpacking: what is safe arrives whole, what is not leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest

from rkd_cli.data import archive as module
from rkd_cli.data.archive import extract
from rkd_cli.errors import DataError, DownloadError, RkdError
from rkd_cli.events import Progress
from rkd_cli.runtime import files
from rkd_cli.runtime.files import locked

TOP = "CUB_200_2011"
NOISE = bytes((i * i + i // 7) % 251 for i in range(5000))
GOOD = {f"{TOP}/images.txt": b"1 a.jpg\n", f"{TOP}/images/a/a.jpg": NOISE, "attributes.txt": b"not ours"}
REAL = Path(__file__).resolve().parents[2].parent / "shared/data/cub10.tgz"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def tar_bytes(files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(min(info.size, 1024))) if info.size <= 1024 else None)
    return out.getvalue()


def make(folder: Path, files: dict[str, bytes] = GOOD, *extra: tarfile.TarInfo) -> Path:
    path = folder / "some.tgz"
    path.write_bytes(gzip.compress(tar_bytes(files, extra), 1))
    return path


def names(folder: Path) -> set[str]:
    """What lies there, but for locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def refused(path: Path, into: Path, words: str, kind: type[RkdError] = DataError) -> None:
    """It fails with one line that names the archive and ``words``, and leaves nothing in ``into``."""
    with pytest.raises(kind) as caught:
        extract(path, into, TOP)
    (problem,) = caught.value.problems
    assert words in problem and str(path) in problem and "\n" not in problem
    assert names(into) == set()


def test_the_folder_arrives_and_the_rest_is_ignored(tmp_path: Path) -> None:
    events: list[object] = []
    path = make(tmp_path)
    assert extract(path, tmp_path / "out", TOP, events.append) == tmp_path / "out" / TOP
    assert names(tmp_path / "out") == {TOP}
    assert (tmp_path / "out" / TOP / "images/a/a.jpg").read_bytes() == NOISE
    assert (tmp_path / "out" / TOP / "images.txt").read_bytes() == b"1 a.jpg\n"
    assert names(tmp_path / "out" / TOP) == {"images.txt", "images"}
    last = [event for event in events if isinstance(event, Progress) and event.what == "Extracting"][-1]
    assert last.done == last.total == path.stat().st_size and last.unit == "bytes"


def test_names_that_begin_with_a_dot_and_links_that_stay_inside(tmp_path: Path) -> None:
    files = {f"./{TOP}/images/a.jpg": NOISE}
    inner = member(f"./{TOP}/images/b.jpg", tarfile.SYMTYPE, "a.jpg")
    upward = member(f"./{TOP}/lists/c.jpg", tarfile.SYMTYPE, "../images/a.jpg")
    hard = member(f"./{TOP}/d.jpg", tarfile.LNKTYPE, f"./{TOP}/images/a.jpg")
    folder = extract(make(tmp_path, files, inner, upward, hard), tmp_path / "out", TOP)
    for name in ("images/b.jpg", "lists/c.jpg", "d.jpg"):
        assert (folder / name).read_bytes() == NOISE


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("/etc/evil"), "absolute path or contains"),
        (member(f"{TOP}/../../evil"), "absolute path or contains"),
        (member(f"{TOP}/x/../y"), "absolute path or contains"),
        (member(f"{TOP}/l", tarfile.SYMTYPE, "/etc/passwd"), "link out of"),
        (member(f"{TOP}/l", tarfile.SYMTYPE, "../../etc"), "link out of"),
        (member(f"{TOP}/l", tarfile.SYMTYPE, "../other"), "link out of"),
        (member(f"{TOP}/l", tarfile.SYMTYPE, f"../../{TOP}/x"), "link out of"),
        (member(f"{TOP}/l", tarfile.SYMTYPE, "images/../../.."), "link out of"),
        (member(f"{TOP}/l", tarfile.LNKTYPE, "/etc/passwd"), "link out of"),
        (member(f"{TOP}/l", tarfile.LNKTYPE, "../passwd"), "link out of"),
        (member("elsewhere", tarfile.SYMTYPE, "/etc"), "link out of"),
        (member(f"{TOP}/p", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member(f"{TOP}/c", tarfile.CHRTYPE), "neither a file nor a folder"),
        (member(f"{TOP}/b", tarfile.BLKTYPE), "neither a file nor a folder"),
    ],
    ids=lambda value: f"{value.name}-{value.linkname}" if isinstance(value, tarfile.TarInfo) else "",
)
def test_one_bad_member_refuses_the_whole(tmp_path: Path, bad: tarfile.TarInfo, words: str) -> None:
    refused(make(tmp_path, GOOD, bad), tmp_path / "out", words)
    assert names(tmp_path) == {"some.tgz", "out"}


def test_a_path_through_a_link_is_refused(tmp_path: Path) -> None:
    link = member(f"{TOP}/images/deep", tarfile.SYMTYPE, "..")
    through = member(f"{TOP}/images/deep/evil")
    refused(make(tmp_path, GOOD, link, through), tmp_path / "out", "is inside a link")
    refused(make(tmp_path, GOOD, through, link), tmp_path / "out", "is inside a link")


def test_a_path_through_a_link_that_was_linked_elsewhere_is_refused(tmp_path: Path) -> None:
    """A hard link to ``images/up``, which leads to the folder itself, leads out of the folder: names do not tell."""
    inside = member(f"{TOP}/images/up", tarfile.SYMTYPE, "..")
    outside = member(f"{TOP}/out", tarfile.LNKTYPE, f"{TOP}/images/up")
    refused(make(tmp_path, GOOD, inside, outside, member(f"{TOP}/out/evil")), tmp_path / "out", "damaged")


def test_a_bomb_is_refused_by_what_it_announces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BOUND_EXTRA", 1 << 20)
    refused(make(tmp_path, {f"{TOP}/zeros": bytes(4 << 20)}), tmp_path / "out", "unpacks to more than")
    refused(make(tmp_path, GOOD, member(f"{TOP}/huge", size=1 << 50)), tmp_path / "out", "unpacks to more than")


def test_a_bomb_in_a_header_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEADER_MAX", 1 << 16)
    head = member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=8 << 20).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "some.tgz"
    path.write_bytes(gzip.compress(head + b"a" * (8 << 20) + tar_bytes(GOOD), 1))
    refused(path, tmp_path / "out", "more data than its headers announce")


def test_headers_made_to_confuse_tarfile_are_one_line_too(tmp_path: Path) -> None:
    path = tmp_path / "some.tgz"
    head = member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2).tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(gzip.compress((head + b"a\0".ljust(512, b"\0")) * 3000 + tar_bytes(GOOD), 1))
    refused(path, tmp_path / "out", "damaged")


def test_too_little_room_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    refused(make(tmp_path), tmp_path / "out", "1,000 are free", DownloadError)


def damage(data: bytes, how: str) -> bytes:
    if how == "checksum":
        return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    if how == "flipped":
        return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]
    tar = gzip.decompress(data)
    ends = {"half a file": 4 * 512 + 100, "between files": 2 * 512}
    if how in ends:  # a right gzip around half a tar
        return gzip.compress(tar[: ends[how]])
    if how == "bad header":  # tarfile alone takes it for the end
        return gzip.compress(tar[:1024] + b"x" * 512 + tar[1536:])
    return {"cut": data[: len(data) // 2], "no trailer": data[:-4], "empty": b"", "text": b"<html>"}[how]


@pytest.mark.parametrize(
    "how",
    [
        "checksum",
        "flipped",
        "half a file",
        "between files",
        "bad header",
        "cut",
        "no trailer",
        "empty",
        "text",
    ],
)
def test_damage_is_one_line_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    path = make(tmp_path)
    path.write_bytes(damage(path.read_bytes(), how))
    refused(path, tmp_path / "out", "damaged")


def test_without_the_folder_it_is_refused(tmp_path: Path) -> None:
    refused(make(tmp_path, {"other/images.txt": b"1"}), tmp_path / "out", "contains no folder")
    refused(make(tmp_path, {TOP: b"a file"}), tmp_path / "out", "is not a folder")


def test_a_missing_archive_is_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "none.tgz", tmp_path / "out", "No such file", DownloadError)


def test_an_incomplete_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    old = tmp_path / "out" / TOP
    old.mkdir(parents=True)
    (old / "half.txt").write_text("old")
    path = make(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(DataError):
        extract(path, tmp_path / "out", TOP)
    assert names(old) == {"half.txt"}
    path.write_bytes(whole)
    extract(path, tmp_path / "out", TOP)
    assert names(old) == {"images.txt", "images"} and names(tmp_path / "out") == {TOP}


def test_an_interruption_leaves_the_old_and_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "out" / TOP
    old.mkdir(parents=True)
    (old / "half.txt").write_text("old")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "move_into_place", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(make(tmp_path), tmp_path / "out", TOP)
    assert names(tmp_path / "out") == {TOP} and names(old) == {"half.txt"}


def test_leftovers_of_killed_runs_are_swept_and_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / f".{TOP}.4711.part" / TOP).mkdir(parents=True)
    (out / f".{TOP}-mine").mkdir()
    extract(make(tmp_path), out, TOP)
    assert names(out) == {TOP, f".{TOP}-mine"}


def test_a_second_extraction_fails_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / f".{TOP}.4711.part").mkdir(parents=True)
    with locked(out / TOP), pytest.raises(DownloadError, match="another process is unpacking"):
        extract(make(tmp_path), out, TOP)
    assert names(out) == {f".{TOP}.4711.part"}
    extract(make(tmp_path), out, TOP)  # released
    assert names(out) == {TOP}


def test_modes_in_the_archive_are_not_kept(tmp_path: Path) -> None:
    script = member(f"{TOP}/run.sh", size=4)
    script.mode = 0o4777
    folder = extract(make(tmp_path, GOOD, script), tmp_path / "out", TOP)
    assert (folder / "run.sh").stat().st_mode & 0o7111 == 0


def test_the_real_birds(tmp_path: Path) -> None:
    if not REAL.exists():
        pytest.skip("needs ../shared/data/cub10.tgz")
    folder = extract(REAL, tmp_path, TOP)
    images = [line.split()[1] for line in (folder / "images.txt").read_text().splitlines()]
    assert len(images) == 543 and all((folder / "images" / name).stat().st_size > 1000 for name in images)
    shutil.rmtree(folder)
