"""Walking through a folder of images: what is read, and what is left out and told."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rkd_cli.data.decode import EXTENSIONS, HEIC
from rkd_cli.events import Note, Reporter

# What a NAS, a system or a program keeps beside photos: thumbnails, deleted photos, snapshots. In any case; * ends a
# beginning. Names that begin with a dot are hidden anyway, and are here to be counted.
_SYSTEM = (
    *("@eaDir", "#recycle", "#snapshot", "@tmp", "@sharesnap", "SYNOPHOTO_THUMB*", "SYNOFILE_THUMB*"),  # Synology
    *("@Recycle", "@Recently-Snapshot", "@Transcode", "@__thumb", ".@__thumb", ".@*"),  # QNAP
    *("Network Recycle Bin*", "~snapshot", ".snapshot", ".snapshots", ".zfs", ".recycle"),  # other NAS
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "Thumbs.db", "ehthumbs*", "desktop.ini"),  # Windows
    *("__MACOSX", "._*", ".AppleDouble", ".Trashes", "Network Trash Folder", "Temporary Items"),  # macOS
    *("lost+found", ".Trash-*", ".thumbnails", ".stversions", ".dropbox.cache"),  # Linux, and what keeps copies
)
_NAMES = {name.casefold(): name for name in _SYSTEM if not name.endswith("*")}
_BEGINNINGS = {name[:-1].casefold(): name for name in _SYSTEM if name.endswith("*")}
# a library of Apple's Photos, iPhoto or Aperture is a folder: its originals are read, and not what is made of them
_LIBRARIES = (".photoslibrary", ".photolibrary", ".aplibrary")
_MADE = ("resources", "private", "scopes", "external", "Previews", "Thumbnails")
_NAMED = 3  # how many names a note has


@dataclass
class Tree:
    """What lies below a folder.

    Args:
        root: the folder.
        files: (folder, name) of every file that is not hidden.
        system: {name: how often it was left out} of what systems keep beside photos.
        again: links to folders that are read anyway, and folders below links that are.
        broken: links to nothing.
        closed: folders that cannot be listed.
    """

    root: Path
    files: list[tuple[str, str]] = field(default_factory=list)
    system: Counter[str] = field(default_factory=Counter)
    again: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    @cached_property
    def images(self) -> list[Path]:
        """The images, sorted."""
        return sorted(Path(parent, name) for parent, name in self.files if is_image(name))


def find_images(folder: Path) -> list[Path]:
    """The images below a folder, sorted."""
    return walk(folder).images


def walk(root: Path) -> Tree:
    """Everything below a folder, through symbolic links too.

    Folders are told apart by device and inode. A link is followed unless it leads to a folder that is read anyway, or
    to one that ``root`` lies in, so that no link makes a loop or an image come twice. Hidden folders (``.*``, ``__*``)
    and files (``.*``) and what systems keep beside photos are left out.
    """
    tree, seen = Tree(root), {_identity(str(parent)) for parent in root.resolve().parents}
    folders, links, below_link = [str(root)], deque[str](), False
    while folders or links:
        below_link |= not folders  # all others come first: they keep their own names
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
            is_folder = _is_folder(entry)
            if system := _of_system(entry.name, folder):
                tree.system[system] += 1
            elif is_hidden(entry.name, is_folder):
                continue
            elif is_folder:
                (links if entry.is_symlink() else inner).append(entry.path)
            elif entry.is_symlink() and not is_image(entry.name) and not Path(entry.path).exists():
                tree.broken.append(entry.path)
            else:
                tree.files.append((folder, entry.name))
        folders += reversed(inner)
    return tree


def is_image(name: str) -> bool:
    """Whether a file is an image that is read here, by its ending."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str, is_folder: bool) -> bool:
    """Whether a walk leaves out what has this name."""
    return name.startswith((".", "__") if is_folder else ".") or bool(_of_system(name))


def note_left_out(folder: Path, report: Reporter, *trees: Tree) -> None:
    """Tell of what walks below a folder have left out."""
    unread = Counter(Path(name).suffix.lower() for tree in trees for _, name in tree.files if not is_image(name))
    if heic := sum(unread.pop(suffix, 0) for suffix in HEIC):
        report(Note(f"{folder}: HEIC images are left out ({heic:,}): `pip install pillow-heif` to read them"))
    if unread:
        kinds = [f"{count:,} {suffix or 'without an ending'}" for suffix, count in unread.most_common()]
        report(Note(f"{folder}: files that are no images read here are left out: {some(kinds)}"))
    system: Counter[str] = sum((tree.system for tree in trees), Counter())
    if system:
        kinds = [f"{count:,} {name}" for name, count in system.most_common()]
        report(Note(f"{folder}: what a NAS or a system keeps beside photos is left out: {some(kinds)}"))
    for what, names in (
        ("links to folders that are read anyway are not followed", [name for tree in trees for name in tree.again]),
        ("links to nothing are left out", [name for tree in trees for name in tree.broken]),
        ("folders that cannot be listed are left out", [name for tree in trees for name in tree.closed]),
    ):
        if names:
            report(Note(f"{folder}: {what} ({len(names):,}): {some(names)}"))


def some(names: Sequence[str]) -> str:
    """The first names."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _of_system(name: str, folder: str = "") -> str:
    """What a system keeps under this name, as ``_SYSTEM`` has it; nothing where it is the user's own."""
    if folder.endswith(_LIBRARIES) and name in _MADE:
        return f"{name} of a photo library"
    lower = name.casefold()
    return _NAMES.get(lower) or next((title for start, title in _BEGINNINGS.items() if lower.startswith(start)), "")


def _identity(folder: str) -> tuple[int, int]:
    stat = Path(folder).stat()
    return stat.st_dev, stat.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
