"""Names of flags: spellings, and suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

SPELLINGS = {"teacher_load": "teacher"}  # {alias: field}, for flags, configuration files and older runs


def flag_name(field: str) -> str:
    """``num_image_per_class`` -> ``--num-image-per-class``."""
    return "--" + field.replace("_", "-")


def one_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace aliases by the names of their fields; a ValueError if a field is given under both."""
    renamed = {name: value for name, value in values.items() if name not in SPELLINGS}
    for other, name in SPELLINGS.items():
        if values.get(other) is None:
            continue
        if renamed.get(name) is not None:
            raise ValueError(f"{flag_name(name)} and {flag_name(other)} are the same flag. Give one of them.")
        renamed[name] = str(values[other])
    return renamed


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
