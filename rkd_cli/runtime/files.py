"""The one way any file or folder reaches the disk: written aside, flushed, renamed into place; and who may do it."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from rkd_cli.errors import RkdError, RunError, SettingsError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a free name beside ``path``: what is made there takes the place of ``path`` when the block ends well.

    However else the block ends, the new file or folder is removed and ``path`` is what it was.

    Raises:
        OSError: the disk is full, or the folder read-only or gone.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        land(partial, path)
    finally:
        with suppress(OSError):
            remove(partial)


def land(new: Path, path: Path) -> None:
    """Flush a file or folder to the disk and rename it to ``path``; what a folder replaces goes only after that.

    Raises:
        OSError: that cannot be done; ``path`` is what it was.
    """
    if not new.is_dir():
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
        return
    if hasattr(os, "sync"):  # or a power cut after the rename could leave whole names with empty files
        os.sync()
    old = path.with_name(f".{path.name}.{os.getpid()}.old.part")
    if os.path.lexists(path):
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if os.path.lexists(old):
            old.rename(path)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Have nothing at ``path``, be it a file, a folder or nothing already.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what processes that were killed left of ``written_aside(path)``. Only for who has ``locked(path)``.

    Raises:
        OSError: something cannot be removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
        remove(left)


@contextmanager
def locked(path: Path, busy: RkdError | None = None) -> Iterator[None]:
    """Keep ``path`` for this process, by a lock file beside it that stays: unlinked, it would part those who wait.

    Args:
        path: what is going to be made.
        busy: raised where another process has it; None: wait for that.
    Raises:
        RkdError: ``busy``.
        OSError: the lock file cannot be made.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if busy is None else 0)
    try:
        lock.acquire()
    except Timeout:
        assert busy is not None  # without a limit nothing times out
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process has the lock file ``path``, asked without writing; False where the system cannot say."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once, with the file
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        return False
    return False


def check_folder(path: Path) -> None:
    """That a folder can be made and written into, without doing it.

    Raises:
        OSError: what doing it would raise, as far as the system says so beforehand.
    """
    there = nearest(path)
    if not there.is_dir():
        kind = errno.EEXIST if there == path else errno.ENOTDIR
        raise OSError(kind, os.strerror(kind), str(path))
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def nearest(path: Path) -> Path:
    """``path``, or of the folders above it the first that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())  # "/" is


def refuse_existing(flag: str, path: Path, overwrite: bool) -> None:
    """That a file to be written is not there yet, or may be replaced.

    Raises:
        SettingsError: it is there, or a folder is.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise SettingsError(f"{flag} {path}: is there already: name another file, or add --overwrite to replace a file")


def check_replaceable(flag: str, path: Path) -> None:
    """That a file can be written, whether or not one is there.

    Raises:
        SettingsError: a folder is there, or its folder is not, or cannot be written.
    """
    if path.is_dir():
        raise SettingsError(f"{flag} {path}: is a folder: name a file")
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        check_folder(path.parent)
    except OSError as error:
        raise SettingsError(f"{flag} {path}: cannot be written ({error.strerror}): name another place") from None


def write_text(path: Path, text: str) -> None:
    """Put a text file in place, whole or not at all.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """``write_text`` of indented JSON.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """``written_aside`` for a run's files, whose error is one line.

    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """
    try:
        with written_aside(path) as partial:
            partial.touch()
            rights = partial.stat().st_mode  # what the umask leaves, without asking for it: that would set it
            write(partial)
            if partial.stat().st_mode != rights:  # safetensors moves a file there that its owner alone may read
                partial.chmod(rights)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # safetensors, newer and older, wraps the system's words in its own
        said = re.search(r'I/O error: (.+?) \(os error|message: "(.+?)"', reason)
        reason = (said[1] or said[2]) if said else reason
        raise RunError(f"{path}: cannot be written ({reason}): what stood there before is whole") from None
