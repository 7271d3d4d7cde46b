"""The model card of a run: figures, cost, usage and the command that trained it."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from rkd_cli.report.text import as_flags
from rkd_cli.settings import DistillSettings, TeacherSettings, without_effect

if TYPE_CHECKING:
    from rkd_cli.commands.runs import Run
    from rkd_cli.schemas import Header

UNFILLED = "license: other # fill in"  # in a card that nobody has edited
# settings of one machine, which do not affect the model
_OF_THE_PLACE = ("save_dir", "overwrite", "resume", "workers", "cache", "cache_dir", "save_every", "device", "log")
_PATHS = {"data": "DATA", "teacher": "TEACHER", "teacher_weights": "FILE", "load": "FILE"}


def card_text(run: Run, header: Header) -> str:
    """The card: Markdown with front matter for model hubs, without local paths. ``header``: of the best model."""
    settings = run.settings
    return template("card.md.j2").render(
        name=run.name,
        facts=run.facts,
        header=header,
        command=settings["command"],
        teacher=", ".join(map(_without_folder, str(settings.get("teacher") or "").split(","))),
        shell=_shell(settings["command"], settings),
    )


def layout_card(model: Path, name: str, header: Header, to: str) -> str:
    """The card of a folder that the library ``to`` loads: that of the checkpoint's run, and how to use the folder."""
    own = model.with_name("README.md")
    card = own.read_text(encoding="utf-8") + "\n" if model.is_file() and own.is_file() else ""
    card = card.replace("library_name: rkd", f"library_name: {to}", 1)
    facts = {"card": card, "name": name, "header": header, "to": to, "unfilled": UNFILLED}
    return card + template("layout.md.j2").render(**facts) + "\n"


def template(name: str) -> Template:
    """A template of this package that is no HTML."""
    return Environment(
        loader=PackageLoader("rkd_cli.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def _without_folder(teacher: str) -> str:
    """The name of a network, a file, or for a run's checkpoint the run's directory."""
    path = PurePath(teacher)
    return path.parent.name if path.name in ("best.safetensors", "last.safetensors") else path.name


def _shell(command: str, settings: Any) -> str:
    """The command of the run, without defaults."""
    model = DistillSettings if command == "distill" else TeacherSettings
    differs: dict[str, object] = {}
    for name, field in model.model_fields.items():
        value, default = settings.get(name), field.default
        value = tuple(value) if isinstance(value, list) else value
        if name in _OF_THE_PLACE or value is None or (str(value) == str(default) and name not in ("dataset", "data")):
            continue
        is_name = name == "teacher" and ":" in str(value)
        shown = _PATHS[name] if name in _PATHS and not is_name else value
        differs[name] = "FILE" if name == "weights" and PurePath(str(value)).name != str(value) else shown
    unused = without_effect(model, settings, differs)  # an error on the command line
    return shlex.join(["rkd", command, *as_flags({n: value for n, value in differs.items() if n not in unused})])
