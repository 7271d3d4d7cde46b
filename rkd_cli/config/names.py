"""The name that somebody is likely to mean by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# what other programs call it, and what no likeness finds
_ELSEWHERE = {
    "--batch-size": "--batch",
    "--bs": "--batch",
    "--learning-rate": "--lr",
    "--num-epochs": "--epochs",
    "--num-workers": "--workers",
    "--model": "--base",
    "--arch": "--base",
    "--backbone": "--base",
    "--pretrained": "--weights",
    "--dim": "--embedding-size",
    "--output": "--save-dir",
    "--output-dir": "--save-dir",
    "--gpu": "--device",
    "--checkpoint": "--load",
    "train": "train-teacher",
    "eval": "evaluate",
    "test": "evaluate",
    "student": "distill",
    "download": "download-cub",
}


def meant(name: str, known: Collection[str]) -> str:
    """``: do you mean NAME?`` with the one of ``known`` that is likely to be meant; nothing where none is."""
    elsewhere = _ELSEWHERE.get(name)
    close = [elsewhere] if elsewhere in known else difflib.get_close_matches(name, known, 1)
    return f": do you mean {close[0]}?" if close else ""
