"""The built-in recipes in ``recipes.toml``: experiments of the paper."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("recipes.toml")
_ABOUT = ("command", "what", "published", "student")  # the other keys of a recipe are settings


@dataclass(frozen=True)
class Recipe:
    """A built-in experiment; ``published`` is the paper's Recall@1 in percent, if any."""

    name: str
    command: str
    what: str
    published: float | None


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(_tables()["recipe"])


def recipes() -> list[Recipe]:
    """The built-in recipes without their settings."""
    tables = {name: _merged("recipe", name) for name in recipe_names()}
    return [Recipe(name, table["command"], table["what"], table.get("published")) for name, table in tables.items()]


def recipe_settings(name: str) -> dict[str, Any]:
    """The settings of a built-in recipe, including those of its bases."""
    settings = {key: value for key, value in _merged("recipe", name).items() if key not in _ABOUT}
    return settings | {"save_dir": name}


def student_recipe(teacher: Mapping[str, object]) -> str | None:
    """The student recipe for a teacher with these settings, if one has its network and images.

    Recipes for ``folder`` match any data set.
    """
    for name in recipe_names():
        table = _merged("recipe", name)
        same = [key for key in ("dataset", "base", "resize", "image_size") if table.get(key, "folder") != "folder"]
        if "student" in table and all(table[key] == teacher[key] for key in same):
            return str(table["student"])
    return None


def _merged(kind: str, name: str) -> dict[str, Any]:
    """A table merged over its bases; later ones override earlier ones."""
    own = dict(_tables()[kind][name])
    merged: dict[str, Any] = {}
    for base in own.pop("bases", ()):
        merged |= _merged("base", base)
    return merged | own


@cache
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    """{"base" or "recipe": {name: keys}}."""
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))
