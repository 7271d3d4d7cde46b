"""The manual: a page of Markdown for each task. ``flags.md`` is generated from the settings."""

from __future__ import annotations

from importlib import resources

from pydantic import BaseModel

from rkd_cli.errors import SettingsError
from rkd_cli.settings import COMMANDS, SPELLINGS, default_text, flag_name, help_panels, help_text
from rkd_cli.settings.names import meant

# in the order in which a person meets them
PAGES = {
    "photos": "train on your own photos, with or without labels",
    "teachers": "choose a run, a pretrained network or a vectors file",
    "losses": "choose losses and schedules; repeat the paper",
    "evaluate": "measure models, embed images, compare runs",
    "export": "write an ONNX file, quantize it, publish a model",
    "search": "find similar images and near-duplicates",
    "databases": "keep vectors in databases, from pandas to PostgreSQL",
    "python": "use models and losses from Python",
    "many-gpus": "train in many processes, or with very large batches",
    "resume": "continue a run that was stopped; what errors mean",
    "files": "files of a run, caches, dependencies, layout",
    "results": "recall that was measured here, and in the paper",
    "random-weights": "comparisons of methods from random weights",
    "benchmarks": "speed and memory that were measured here",
    "flags": "every flag of every command",
}


def read_page(name: str) -> str:
    """The Markdown of a page.

    Raises:
        SettingsError: there is no such page.
    """
    if name not in PAGES:
        raise SettingsError(f"{name}: no such page" + (meant(name, PAGES) or ". Run `rkd manual` to list the pages."))
    return (resources.files(__name__) / f"{name}.md").read_text(encoding="utf-8")


def flags_page() -> str:
    """The page ``flags``."""
    return "\n".join(["# Flags", "", _ABOUT, *(line for name in COMMANDS for line in _command(name))]) + "\n"


_ABOUT = """\
```sh
rkd distill --help        # required and common flags
rkd distill --help-all    # all flags
```

A list is one value with commas: `--recall 1,2,4`. `--[no-]NAME` is a switch: `--NAME` turns it on, `--no-NAME` off.
Every command except `doctor`, `manual` and `recipes` also takes `--config FILE`: a TOML or JSON file of settings. Flags
override it.
"""


def _command(name: str) -> list[str]:
    model, lines, panel = COMMANDS[name], [f"## rkd {name}", ""], ""
    for field, title in help_panels(model).items():
        if title != panel:
            lines += [*([""] if panel else []), f"**{title}**", "", "| flag | default | what |", "|---|---|---|"]
            panel = title
        lines.append(_row(model, field))
    return [*lines, ""]


def _row(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    flags = [flag_name(name), *(flag_name(other) for other, of in SPELLINGS.items() if of == name)]
    if field.annotation in (bool, bool | None):
        flags = [flag.replace("--", "--[no-]", 1) for flag in flags]
    return f"| `{'`, `'.join(flags)}` | {default_text(field)} | {help_text(field)} |"
