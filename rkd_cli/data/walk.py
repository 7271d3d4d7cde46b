"""Find the images in a folder, and report the files that are left out."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from rkd_cli.data.extensions import EXTENSIONS, HEIC
from rkd_cli.events import Note, Reporter

# Names (case-insensitive, * matches any ending) of thumbnails, deleted photos and snapshots that a NAS, an operating
# system or a program stores with photos. Names with a leading dot would be hidden anyway, but are counted.
_SYSTEM = (
    *("@eaDir", "#recycle", "#snapshot", "@tmp", "@sharesnap", "SYNOPHOTO_THUMB*", "SYNOFILE_THUMB*"),  # Synology
    *("@Recycle", "@Recently-Snapshot", "@Transcode", "@__thumb", ".@__thumb", ".@*"),  # QNAP
    *("Network Recycle Bin*", "~snapshot", ".snapshot", ".snapshots", ".zfs", ".recycle"),  # other NAS
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "Thumbs.db", "ehthumbs*", "desktop.ini"),  # Windows
    *("__MACOSX", "._*", ".AppleDouble", ".Trashes", "Network Trash Folder", "Temporary Items"),  # macOS
    *("lost+found", ".Trash-*", ".thumbnails", ".stversions", ".dropbox.cache"),  # Linux and file synchronization
)
_NAMES = {name.casefold(): name for name in _SYSTEM if not name.endswith("*")}
_BEGINNINGS = {name[:-1].casefold(): name for name in _SYSTEM if name.endswith("*")}
# a library of Apple's Photos, iPhoto or Aperture is a folder: read its originals, not derived files
_LIBRARIES = (".photoslibrary", ".photolibrary", ".aplibrary")
_MADE = ("resources", "private", "scopes", "external", "Previews", "Thumbnails")
_NAMED = 3  # names in a note


@dataclass
class Tree:
    """The content of a folder and its subfolders."""

    root: Path
    files: list[tuple[str, str]] = field(default_factory=list)  # (folder, name), without hidden files
    system: Counter[str] = field(default_factory=Counter)  # {name of ``_SYSTEM``: times left out}
    again: list[str] = field(default_factory=list)  # links to folders that are read anyway, and folders below links
    broken: list[str] = field(default_factory=list)  # links without a target
    special: list[str] = field(default_factory=list)  # named pipes, sockets and devices, which reading may wait for
    closed: list[str] = field(default_factory=list)  # folders that cannot be listed

    @cached_property
    def images(self) -> list[Path]:
        """The sorted paths of the images."""
        return sorted(Path(parent, name) for parent, name in self.files if is_image(name))


def find_images(folder: Path) -> list[Path]:
    """The sorted paths of the images in a folder and its subfolders."""
    return walk(folder).images


def walk(root: Path) -> Tree:
    """Walk a folder, following symbolic links.

    A link to a folder that is read anyway, or to a parent of ``root``, is not followed (compared by device and inode),
    so there are no loops and no duplicates. Hidden folders (``.*``, ``__*``), hidden files (``.*``) and system files
    are left out.
    """
    tree, seen = Tree(root), {_identity(str(parent)) for parent in root.resolve().parents}
    folders, links, below_link = [str(root)], deque[str](), False
    while folders or links:
        below_link |= not folders  # links come last, so that folders are read under their own names
        folder = folders.pop() if folders else links.popleft()
        try:
            identity = _identity(folder)
            if below_link and identity in seen:
                tree.again.append(folder)
                continue
            seen.add(identity)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            tree.closed.append(folder)
            continue
        inner: list[str] = []
        for entry in entries:
            kind = _kind(entry)
            if system := _of_system(entry.name, folder):
                tree.system[system] += 1
            elif is_hidden(entry.name, kind == "folder"):
                continue
            elif kind == "folder":
                (links if entry.is_symlink() else inner).append(entry.path)
            elif kind == "file":
                tree.files.append((folder, entry.name))
            else:
                (tree.broken if kind == "broken" else tree.special).append(entry.path)
        folders += reversed(inner)
    return tree


def is_image(name: str) -> bool:
    """Whether a file name has the extension of a supported image format."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str, is_folder: bool) -> bool:
    """Whether a walk leaves out files or folders with this name."""
    return name.startswith((".", "__") if is_folder else ".") or bool(_of_system(name))


def note_left_out(folder: Path, report: Reporter, *trees: Tree) -> None:
    """Report the files that walks of a folder left out."""
    unread = Counter(Path(name).suffix.lower() for tree in trees for _, name in tree.files if not is_image(name))
    if heic := sum(unread.pop(suffix, 0) for suffix in HEIC):
        report(Note(f"{folder}: {heic:,} HEIC images are left out. Run `pip install pillow-heif` to read them."))
    if unread:
        kinds = [f"{count:,} {suffix or 'without an extension'}" for suffix, count in unread.most_common()]
        report(Note(f"{folder}: files that are not images are left out: {some(kinds)}"))
    system: Counter[str] = sum((tree.system for tree in trees), Counter())
    if system:
        kinds = [f"{count:,} {name}" for name, count in system.most_common()]
        report(Note(f"{folder}: system files are left out: {some(kinds)}"))
    for what, names in (
        ("links to folders that are read anyway are not followed", [name for tree in trees for name in tree.again]),
        ("broken links are left out", [name for tree in trees for name in tree.broken]),
        ("pipes, sockets and devices are left out", [name for tree in trees for name in tree.special]),
        ("folders that cannot be listed are left out", [name for tree in trees for name in tree.closed]),
    ):
        if names:
            report(Note(f"{folder}: {len(names):,} {what}: {some(names)}"))


def some(names: Sequence[object]) -> str:
    """The first names, comma-separated."""
    return ", ".join(map(str, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def _of_system(name: str, folder: str = "") -> str:
    """The entry of ``_SYSTEM`` that matches a name; empty for the user's own files."""
    if folder.endswith(_LIBRARIES) and name in _MADE:
        return f"{name} of a photo library"
    lower = name.casefold()
    return _NAMES.get(lower) or next((title for start, title in _BEGINNINGS.items() if lower.startswith(start)), "")


def _identity(folder: str) -> tuple[int, int]:
    stat = Path(folder).stat()
    return stat.st_dev, stat.st_ino


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "broken", "special"]:
    """The kind of an entry, or of a link's target. ``scandir`` knows files and folders, so they cost no stat."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
        return "special"
    except OSError:  # a link to nothing or to itself
        return "broken"
