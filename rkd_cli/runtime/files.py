"""Atomic writes (temporary name, flush, rename) and locks. All files and folders are written through this module."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError

from rkd_cli.errors import RkdError, RunError, SettingsError

CACHE_FILE = re.compile(r"(\d+)-[0-9a-f]{12}\.(pixels|vectors|index)")  # beside locks and unfinished files


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; the file or folder written there replaces ``path`` after the block.

    If the block raises, the temporary file is removed and ``path`` is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        move_into_place(partial, path)
    finally:
        with suppress(OSError):
            remove(partial)


def move_into_place(new: Path, path: Path) -> None:
    """Flush a file or folder to disk and rename it to ``path``. On an OSError ``path`` is unchanged."""
    if not new.is_dir():
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
        return
    if hasattr(os, "sync"):  # a power cut after the rename could leave empty files otherwise
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
    """Remove a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove temporary files of ``atomic_write(path)`` by processes that were killed. Requires ``locked(path)``."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
        remove(partial)


def locked(path: Path, busy: RkdError | None = None) -> AbstractContextManager[None]:
    """Lock ``path`` for this process with a lock file in the same folder; see ``locked_with``."""
    return locked_with(path.with_name(f".{path.name}.lock"), busy)


@contextmanager
def locked_with(file: Path, busy: RkdError | None = None) -> Iterator[None]:
    """Lock the lock file ``file`` for this process.

    If another process has the lock, raise ``busy``, or wait if it is None. The lock file is never deleted: waiting
    processes would then lock different files.
    """
    lock = FileLock(file, timeout=-1 if busy is None else 0)
    try:
        lock.acquire()
    except Timeout:
        assert busy is not None  # without it there is no timeout
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process has locked the lock file ``path``, checked without writing; False if the system cannot tell."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file closes
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        return False
    return False


def check_folder(path: Path) -> None:
    """Raise the OSError that creating the folder and writing into it would, as far as the system can tell."""
    there = nearest(path)
    if not there.is_dir():
        kind = errno.EEXIST if there == path else errno.ENOTDIR
        raise OSError(kind, os.strerror(kind), str(path))
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def nearest(path: Path) -> Path:
    """``path`` or its nearest existing parent."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())  # "/" exists


def default_cache_folder() -> Path:
    """``RKD_CACHE_DIR``, or ``rkd`` in the user's cache folder; used by all runs."""
    named = os.environ.get("RKD_CACHE_DIR")
    return Path(named) if named else user_cache_path("rkd", appauthor=False)


def refuse_existing(flag: str, path: Path, overwrite: bool) -> None:
    """Raise a SettingsError if ``path`` is a folder, or an existing file without ``overwrite``."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise SettingsError(f"{flag} {path}: already exists. Name another file, or pass --overwrite to replace a file.")


def check_replaceable(flag: str, path: Path) -> None:
    """Raise a SettingsError if a file cannot be written at ``path``, whether or not one exists."""
    if path.is_dir():
        raise SettingsError(f"{flag} {path}: is a folder. Name a file.")
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        check_folder(path.parent)
    except OSError as error:
        raise SettingsError(f"{flag} {path}: cannot be written ({error.strerror}). Name another path.") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """``atomic_write`` that raises a RunError with one line."""
    try:
        with atomic_write(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # as the umask sets it; reading the umask would change it
            write(partial)
            if partial.stat().st_mode != mode:  # safetensors makes files readable by their owner only
                partial.chmod(mode)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # safetensors wraps the system's message, differently in each version
        wrapped = re.search(r'I/O error: (.+?) \(os error|message: "(.+?)"', reason)
        reason = (wrapped[1] or wrapped[2]) if wrapped else reason
        raise RunError(f"{path}: cannot be written ({reason}). The previous file is unchanged.") from None
