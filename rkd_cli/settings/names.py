"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# names in other programs that no string similarity finds
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
    """``. Did you mean NAME?`` with the most similar of ``known``, or an empty string."""
    elsewhere = _ELSEWHERE.get(name)
    close = [elsewhere] if elsewhere in known else difflib.get_close_matches(name, known, 1)
    return f". Did you mean {close[0]}?" if close else ""
