"""Unpacking a .tgz that nobody has to trust: looked through first, unpacked aside, landed by rename."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import BinaryIO

from rkd_cli.errors import DataError, DownloadError
from rkd_cli.events import Progress, Reporter, silent

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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

Visit = Callable[[tarfile.TarFile, tarfile.TarInfo, PurePosixPath], None]


def extract(
    archive: Path,
    into: Path,
    member: str,
    report: Reporter = silent,
    check: Callable[[Path], None] = lambda unpacked: None,
) -> Path:
    """Unpack the top folder ``member`` of the .tgz ``archive`` to ``into/member`` and return that path.

    Everything else in the archive is ignored, but looked at: one bad member refuses the whole before anything
    is written. ``into/member`` appears, or is replaced, only when the new folder is whole and ``check``, told
    where it lies until then, has not objected. Modes and times are not kept.

    Raises DataError for an archive that is damaged, unsafe or without ``member``, and DownloadError for what
    lies with this machine: no room, no permission, another process unpacking to the same place.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DownloadError("this Python cannot unpack archives safely; use Python 3.11.4 or later")
    prefix = f".{member}-unpacking-"
    busy = f"{into / member}: another process is unpacking it; wait for it to end, then run this command again"
    try:
        into.mkdir(parents=True, exist_ok=True)
        with only_one(into / f".{member}.lock", busy) as alone, archive.open("rb") as raw:
            if alone:
                _sweep(into, prefix)
            announced = _look_through(raw, into, member, report)
            with tempfile.TemporaryDirectory(prefix=prefix, dir=into, ignore_cleanup_errors=True) as aside:
                _unpack(raw, Path(aside), member, announced, report)
                check(Path(aside) / member)
                _land(Path(aside) / member, into / member, Path(aside) / ".replaced")
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: damaged ({reason}); delete it and fetch it again") from error
    except OSError as error:
        reason = f"{error.filename or into}: {error.strerror or error}"
        raise DownloadError(
            f"{archive} could not be unpacked ({reason}); mend that and run the same command again"
        ) from error
    return into / member


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


@contextmanager
def only_one(lock: Path, busy: str) -> Iterator[bool]:
    """Hold the lock file ``lock`` for the block; the value is False where this system has no locks.

    Raises DownloadError(``busy``) when another process holds it, OSError when the file cannot be made.
    """
    handle, alone = _acquire(lock, busy)
    try:
        yield alone
    finally:
        if alone:
            lock.unlink(missing_ok=True)
        os.close(handle)


def _acquire(lock: Path, busy: str) -> tuple[int, bool]:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                return handle, False
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file that we opened: then we hold a lock nobody sees.
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle, True
        except BlockingIOError:
            os.close(handle)
            raise DownloadError(busy) from None
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            return handle, False
        os.close(handle)


def _sweep(into: Path, prefix: str) -> None:
    for leftover in into.iterdir():
        if leftover.name.startswith(prefix):
            shutil.rmtree(leftover, ignore_errors=True)


def _look_through(raw: BinaryIO, into: Path, member: str, report: Reporter) -> int:
    """Read the whole archive, write nothing, and return the bytes that it announces."""
    compressed = os.fstat(raw.fileno()).st_size
    paths: set[PurePosixPath] = set()
    links: set[PurePosixPath] = set()

    def note(tar: tarfile.TarFile, info: tarfile.TarInfo, path: PurePosixPath) -> None:
        paths.add(path)
        if info.issym():
            links.add(path)

    bound = compressed * BOUND_FACTOR + BOUND_EXTRA
    announced = _walk(raw, member, bound, meter(report, "Checking", compressed), note)
    through = sorted(path for path in paths if not links.isdisjoint(path.parents))
    if through:  # only while no path leads through a link does comparing names say where a path ends
        raise DataError(f"{raw.name}: the path {str(through[0])!r} leads through a link; nothing was unpacked")
    if not any(path.parts[:1] == (member,) for path in paths):
        raise DataError(f"{raw.name}: holds no folder {member}; nothing was unpacked")
    free = shutil.disk_usage(into).free
    if announced > free:
        raise DownloadError(
            f"{into}: {announced:,} bytes are needed to unpack {raw.name} and {free:,} are free; "
            "make room and run the same command again"
        )
    return announced


def _unpack(raw: BinaryIO, aside: Path, member: str, announced: int, report: Reporter) -> None:
    def write(tar: tarfile.TarFile, info: tarfile.TarInfo, path: PurePosixPath) -> None:
        if path.parts[:1] == (member,):
            tar.extract(info, aside, set_attrs=False, filter="data")

    tick = meter(report, "Extracting", os.fstat(raw.fileno()).st_size)
    _walk(raw, member, announced, tick, write)
    if (aside / member).is_symlink() or not (aside / member).is_dir():
        raise DataError(f"{raw.name}: {member} is no folder there")
    if hasattr(os, "sync"):  # or a power cut after the rename could leave whole names with empty files
        os.sync()


def _land(new: Path, target: Path, replaced: Path) -> None:
    """Put ``new`` where ``target`` is; what was there moves to ``replaced``, and back if that fails."""
    had = os.path.lexists(target)
    if had:
        target.rename(replaced)
    try:
        new.rename(target)
    except OSError:
        if had:
            replaced.rename(target)
        raise


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


def _walk(raw: BinaryIO, member: str, bound: int, tick: Callable[[int], None], visit: Visit) -> int:
    """Hand every member to ``visit`` once it is found safe; return the sum of the announced bytes.

    Reads to the end of the gzip stream, so that its checksum is compared. Both passes come through here: what
    the second one unpacks is checked again, should the file have changed in between.
    """
    raw.seek(0)
    announced = 0
    with gzip.GzipFile(fileobj=raw) as unpacked:
        stream = _Rationed(unpacked)
        # Mode "r|" asks for nothing but read().
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as tar:  # type: ignore[call-overload]
            for info in tar:
                path = _safe_path(raw.name, info, member)
                announced += BLOCK + info.size
                if announced > bound:
                    raise DataError(f"{raw.name}: announces more than {bound:,} unpacked bytes; nothing was unpacked")
                stream.ration = info.size + HEADER_MAX
                visit(tar, info, path)
                tick(raw.tell())
            # tarfile takes a bad header, or none, for the end; the true end is two blocks of zeros
            if tar.fileobj is None or tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("the end is missing")
            while tar.fileobj.read(BLOCK):
                pass
            tick(raw.tell())
    return announced


def _safe_path(archive: str, info: tarfile.TarInfo, member: str) -> PurePosixPath:
    path = PurePosixPath(info.name)
    wrong = ""
    if path.is_absolute() or ".." in path.parts:
        wrong = "has an absolute or climbing path"
    elif (info.issym() or info.islnk()) and _target(info, path)[:1] != (member,):
        wrong = f"is a link out of {member} (to {info.linkname!r})"
    elif not (info.isfile() or info.isdir() or info.issym() or info.islnk()) or info.size < 0:
        wrong = "is neither a file nor a folder"
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
