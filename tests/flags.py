"""Command lines of tests: flags that many of them share, and others above those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def over(flags: Sequence[object], *more: object) -> list[Any]:
    """``flags``, then ``more``; an option that both give is given once, by ``more``; with None as its value, not at
    all."""
    given = {_name(word) for word in more if _is_flag(word)}
    kept, keep = list[Any](), True
    for word in flags:
        keep = _name(word) not in given if _is_flag(word) else keep
        if keep:
            kept.append(word)
    gone = [place for place, word in enumerate(more) if word is None]
    return kept + [word for place, word in enumerate(more) if place not in gone and place + 1 not in gone]


def _is_flag(word: object) -> bool:
    return str(word).startswith("--")


def _name(word: object) -> str:
    return str(word).removeprefix("--").removeprefix("no-").partition("=")[0]
