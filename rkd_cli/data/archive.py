"""Unpack an untrusted .tgz: check every member, unpack to a temporary folder, and move it into place."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import BinaryIO

from rkd_cli.errors import DataError, DownloadError
from rkd_cli.events import Progress, Reporter, silent
from rkd_cli.runtime.files import atomic_write, locked, remove_partials

TICK = 0.25  # seconds between two progress events
BOUND_FACTOR, BOUND_EXTRA = 64, 64 << 20  # maximum unpacked bytes: a multiple of the archive's size, plus a constant
HEADER_MAX = 4 << 20  # maximum unpacked bytes between two members: long names, padding
BLOCK = tarfile.BLOCKSIZE
DAMAGED = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    LookupError,  # this and the next ones: tarfile raises them for malicious headers
    OverflowError,
    RecursionError,
    ValueError,
)


def extract(
    archive: Path,
    into: Path,
    member: str,
    report: Reporter = silent,
    check: Callable[[Path], None] = lambda unpacked: None,
) -> Path:
    """Unpack the top folder ``member`` of a .tgz to ``into/member`` atomically, and return that path.

    Other members are skipped, but one unsafe member rejects the whole archive. Modes and times are not restored.
    ``check`` gets the unpacked folder before it is moved into place, and may raise.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DownloadError("this Python cannot unpack archives safely. Use Python 3.11.4 or later.")
    target = into / member
    busy = DownloadError(f"{target}: another process is unpacking it. Wait for it, then run the command again.")
    try:
        into.mkdir(parents=True, exist_ok=True)
        with locked(target, busy), archive.open("rb") as raw:
            remove_partials(target)
            with atomic_write(target) as aside:
                aside.mkdir()
                _unpack(raw, aside, member, meter(report, "Extracting", os.fstat(raw.fileno()).st_size))
                check(aside)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: damaged ({reason}). Delete it and download it again.") from error
    except OSError as error:
        reason = f"{error.filename or into}: {error.strerror or error}"
        raise DownloadError(f"{archive}: cannot be unpacked ({reason}). Fix that and run the command again.") from error
    return target


def meter(report: Reporter, what: str, total: int) -> Callable[[int], None]:
    """A function that takes the bytes done, and reports progress every TICK seconds and at the end."""
    reported, at = -1, float("-inf")

    def tick(done: int) -> None:
        nonlocal reported, at
        now = monotonic()
        if done != reported and (done == total or now - at >= TICK):
            reported, at = done, now
            report(Progress(what=what, done=done, total=max(done, total), unit="bytes"))

    return tick


class _Rationed:
    """The unpacked stream for tarfile; reading more than ``ration`` bytes raises, against archive bombs."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream = stream
        self.ration = HEADER_MAX

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        self.ration -= len(block)
        if self.ration < 0:
            raise tarfile.ReadError("more data than its headers announce")
        return block


def _unpack(raw: BinaryIO, aside: Path, member: str, tick: Callable[[int], None]) -> None:
    """Unpack ``member`` into ``aside``. Reads the gzip stream to its end, which checks its checksum."""
    bound = os.fstat(raw.fileno()).st_size * BOUND_FACTOR + BOUND_EXTRA
    free, announced, top = shutil.disk_usage(aside).free, 0, PurePosixPath(member)
    links: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    with gzip.GzipFile(fileobj=raw) as unpacked:
        stream = _Rationed(unpacked)
        # mode "r|" only needs read()
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar:  # type: ignore[call-overload]
            for info in tar:
                path = _checked(raw.name, info, top, links, folders)
                announced += BLOCK + info.size
                if announced > bound:
                    raise DataError(f"{raw.name}: unpacks to more than {bound:,} bytes. Nothing was unpacked.")
                if announced > free:
                    raise DownloadError(
                        f"{aside.parent}: {announced:,} bytes or more are needed to unpack {raw.name}, and {free:,} "
                        "are free. Free some space and run the command again."
                    )
                stream.ration = info.size + HEADER_MAX
                if path.is_relative_to(top):
                    tar.extract(_within(info, path, top), aside, set_attrs=False, filter="data")
                tick(raw.tell())
            # tarfile stops at a bad or missing header; the real end is two blocks of zeros
            if tar.fileobj is None or tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("the end is missing")
            while tar.fileobj.read(BLOCK):
                pass
            tick(raw.tell())
    if top not in folders:
        raise DataError(f"{raw.name}: contains no folder {member}. Nothing was unpacked.")


def _within(info: tarfile.TarInfo, path: PurePosixPath, top: PurePosixPath) -> tarfile.TarInfo:
    """The member relative to ``top``, so that tarfile's own filter rejects paths outside of it."""
    inner = info.replace(name=str(path.relative_to(top)), deep=False)
    if info.islnk():  # the target of a hard link is relative to the archive's root
        inner.linkname = str(PurePosixPath(info.linkname).relative_to(top))
    return inner


def _checked(
    archive: str,
    info: tarfile.TarInfo,
    top: PurePosixPath,
    links: set[PurePosixPath],
    folders: set[PurePosixPath],
) -> PurePosixPath:
    """The path of a member, if it may be unpacked beside those before it, whose links and folders grow by it.

    Raises:
        DataError: it leads out of the folder, or is no file, folder or link.
    """
    path = PurePosixPath(info.name)
    is_link = info.issym() or info.islnk()
    folders.update(path.parents)
    if info.issym():
        links.add(path)
    wrong = ""
    if path.is_absolute() or ".." in path.parts:
        wrong = "has an absolute path or contains .."
    elif is_link and _target(info, path)[:1] != top.parts:
        wrong = f"is a link out of {top} (to {info.linkname!r})"
    elif not (info.isfile() or info.isdir() or is_link) or info.size < 0:
        wrong = "is neither a file nor a folder"
    # only while no path leads through a link does comparing names say where a path ends
    elif not links.isdisjoint(path.parents) or (info.issym() and path in folders):
        wrong = "is inside a link"
    elif path == top and not info.isdir():
        wrong = "is not a folder"
    if wrong:
        raise DataError(f"{archive}: {info.name!r} {wrong}. Nothing was unpacked; do not trust this archive.")
    return path


def _target(info: tarfile.TarInfo, path: PurePosixPath) -> tuple[str, ...]:
    """The target of a link, relative to the archive's root; empty if outside, or if names cannot tell."""
    base = path.parent.parts if info.issym() else ()
    parts = PurePosixPath(info.linkname).parts
    climbs = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    below = parts[climbs:]
    if climbs > len(base) or ".." in below or PurePosixPath(info.linkname).is_absolute():
        return ()
    return base[: len(base) - climbs] + below
