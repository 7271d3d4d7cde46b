"""Folders of empty files, for what only looks at names."""

from __future__ import annotations

from pathlib import Path


def touch(root: Path, *names: str) -> None:
    """Make these files below ``root``."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
