"""Unpacking a .tgz that nobody has to trust: every member is checked, unpacked aside, and landed by rename."""

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
from rkd_cli.runtime.files import locked, sweep, written_aside

TICK = 0.25  # seconds between two Progress events
BOUND_FACTOR, BOUND_EXTRA = 64, 64 << 20  # unpacked bytes allowed: so many times the archive's, and so many more
HEADER_MAX = 4 << 20  # unpacked bytes allowed between two members: long names, padding
BLOCK = tarfile.BLOCKSIZE
DAMAGED = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    LookupError,  # these and below: what tarfile raises on headers made to confuse it
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
    """Unpack the top folder ``member`` of a .tgz to ``into/member``, which appears or is replaced when all is well.

    Everything else in the archive is ignored, but looked at: one bad member refuses the whole. Modes and times are
    not kept.

    Args:
        archive: the .tgz.
        into: where the folder goes.
        member: its name.
        report: told how far it is.
        check: told where the folder lies before it lands; it may object by raising.
    Returns:
        ``into/member``.
    Raises:
        DataError: an archive that is damaged, unsafe or without ``member``; what ``check`` raises.
        DownloadError: no room, no permission, another process unpacking to the same place.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DownloadError("this Python cannot unpack archives safely; use Python 3.11.4 or later")
    target = into / member
    busy = DownloadError(f"{target}: another process is unpacking it; wait for it to end, then run this command again")
    try:
        into.mkdir(parents=True, exist_ok=True)
        with locked(target, busy), archive.open("rb") as raw:
            sweep(target)
            with written_aside(target) as aside:
                aside.mkdir()
                _unpack(raw, aside, member, meter(report, "Extracting", os.fstat(raw.fileno()).st_size))
                check(aside)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: damaged ({reason}); delete it and fetch it again") from error
    except OSError as error:
        reason = f"{error.filename or into}: {error.strerror or error}"
        raise DownloadError(
            f"{archive} could not be unpacked ({reason}); mend that and run the same command again"
        ) from error
    return target


def meter(report: Reporter, what: str, total: int) -> Callable[[int], None]:
    """A function to be told the bytes done, however often; it reports every TICK seconds, and the last."""
    told, at = -1, float("-inf")

    def tick(done: int) -> None:
        nonlocal told, at
        now = monotonic()
        if done != told and (done == total or now - at >= TICK):
            told, at = done, now
            report(Progress(what=what, done=done, total=max(done, total), unit="bytes"))

    return tick


class _Rationed:
    """The unpacked stream as tarfile reads it: past ``ration`` bytes it ends with an error, as for a bomb."""

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
    """Put what is in ``member`` into ``aside``. Reads to the end of the gzip stream: its checksum is compared."""
    bound = os.fstat(raw.fileno()).st_size * BOUND_FACTOR + BOUND_EXTRA
    free, announced, top = shutil.disk_usage(aside).free, 0, PurePosixPath(member)
    links: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    with gzip.GzipFile(fileobj=raw) as unpacked:
        stream = _Rationed(unpacked)
        # Mode "r|" asks for nothing but read().
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar:  # type: ignore[call-overload]
            for info in tar:
                path = _checked(raw.name, info, top, links, folders)
                announced += BLOCK + info.size
                if announced > bound:
                    raise DataError(f"{raw.name}: announces more than {bound:,} unpacked bytes; nothing was unpacked")
                if announced > free:
                    raise DownloadError(
                        f"{aside.parent}: {announced:,} bytes or more are needed to unpack {raw.name} and {free:,} "
                        "are free; make room and run the same command again"
                    )
                stream.ration = info.size + HEADER_MAX
                if path.is_relative_to(top):
                    tar.extract(_within(info, path, top), aside, set_attrs=False, filter="data")
                tick(raw.tell())
            # tarfile takes a bad header, or none, for the end; the true end is two blocks of zeros
            if tar.fileobj is None or tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("the end is missing")
            while tar.fileobj.read(BLOCK):
                pass
            tick(raw.tell())
    if top not in folders:
        raise DataError(f"{raw.name}: holds no folder {member}; nothing was unpacked")


def _within(info: tarfile.TarInfo, path: PurePosixPath, top: PurePosixPath) -> tarfile.TarInfo:
    """The member as seen from ``top``, so that tarfile's own filter refuses what leads out of that."""
    inner = info.replace(name=str(path.relative_to(top)), deep=False)
    if info.islnk():  # other than a symbolic link's, its target counts from the archive's top
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
        wrong = "has an absolute or climbing path"
    elif is_link and _target(info, path)[:1] != top.parts:
        wrong = f"is a link out of {top} (to {info.linkname!r})"
    elif not (info.isfile() or info.isdir() or is_link) or info.size < 0:
        wrong = "is neither a file nor a folder"
    # only while no path leads through a link does comparing names say where a path ends
    elif not links.isdisjoint(path.parents) or (info.issym() and path in folders):
        wrong = "leads through a link"
    elif path == top and not info.isdir():
        wrong = "is no folder"
    if wrong:
        raise DataError(f"{archive}: {info.name!r} {wrong}; nothing was unpacked, do not trust this archive")
    return path


def _target(info: tarfile.TarInfo, path: PurePosixPath) -> tuple[str, ...]:
    """Where a link leads, from the archive's top; empty when that is outside or cannot be told from names."""
    base = path.parent.parts if info.issym() else ()
    parts = PurePosixPath(info.linkname).parts
    climbs = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    below = parts[climbs:]
    if climbs > len(base) or ".." in below or PurePosixPath(info.linkname).is_absolute():
        return ()
    return base[: len(base) - climbs] + below
