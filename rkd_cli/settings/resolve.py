"""Build settings from the command line and configuration files, with one error line per wrong value."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from rkd_cli.errors import SettingsError
from rkd_cli.runtime.processes import is_distributed
from rkd_cli.schemas import Header
from rkd_cli.settings.distillation import DistillSettings
from rkd_cli.settings.effect import without_effect
from rkd_cli.settings.names import flag_name, meant, one_spelling
from rkd_cli.settings.recipes import recipe_names, recipe_settings, recipes
from rkd_cli.settings.training import CHANGE_ON_RESUME, TeacherSettings, TrainSettings

Model = TypeVar("Model", bound=BaseModel)
GRID = ".grid.json"  # hidden: `rkd compare students/*` takes only runs
_TRAININGS: dict[str, type[BaseModel]] = {"train-teacher": TeacherSettings, "distill": DistillSettings}


def resolve(model: type[Model], flags: Mapping[str, object], config: Path | None = None) -> Model:
    """Settings from a TOML or JSON file, overridden by ``flags``: {field: text or bool}, only those given."""
    if flags.get("resume"):
        return _resume(model, flags, config)
    values = read_config(config, model) if config else {}
    try:
        flags = one_spelling(flags)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    wrong: dict[str, str] = {}
    for name, text in flags.items():
        try:
            values[name] = _parse(model, name, text)
        except ValidationError as error:
            wrong[name] = _message(error.errors()[0])
            values.pop(name, None)
    try:
        settings = model(**values)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            wrong.setdefault(name, _message(problem))
    if wrong:
        raise SettingsError(*(_line(model, name, message, flags, config) for name, message in wrong.items()))
    if config and _is_recipe(config) and "batch" not in flags:
        settings.model_fields_set.discard("batch")  # a recipe's batch may shrink to fit a small data set
    return settings


def resolve_grid(model: type[Model], flags: Mapping[str, object], config: Path | None = None) -> list[Model]:
    """``resolve``, once per combination for flags such as ``--seed 1,2 --lr 1e-3,1e-4``.

    Each run has its own directory in ``save_dir``, named after its values. With ``--resume``, the flags in the file
    ``GRID`` are the defaults, and runs that have not begun start with them; without that file, with the settings of the
    others.
    """
    if model not in _TRAININGS.values():
        return [resolve(model, flags, config)]
    values = {**(read_config(config, model) if config and "save_dir" not in flags else {}), **flags}
    place = Path(str(values.get("save_dir", model.model_fields["save_dir"].default)))
    resumes = bool(flags.get("resume"))
    saved = _read_grid(place / GRID) if resumes and (place / GRID).is_file() else None
    asked = {**(saved["flags"] if saved else {}), **flags}
    grid = grid_of(model, asked)
    if not grid:
        return [resolve(model, flags, config)]
    runs: dict[Path, dict[str, object]] = {}
    for combination in itertools.product(*(some.items() for some in grid.values())):
        words = [f"{flag_name(name)[2:]}-{short}" for name, (short, _) in zip(grid, combination, strict=True)]
        path = place / "_".join(words)
        texts = {name: text for name, (_, text) in zip(grid, combination, strict=True)}
        runs[path] = {**texts, "save_dir": str(path)}
    begun = [path for path in runs if (path / "settings.json").is_file()]
    now = {name: value for name, value in asked.items() if name in flags or name == "jobs"}
    if not resumes or not (saved or begun):
        return [resolve(model, {**now, **own}, config) for own in runs.values()]
    new = {name: value for name, value in asked.items() if name not in ("resume", "overwrite")}
    others = saved["config"] and Path(saved["config"]) if saved else begun[0] / "settings.json"
    return [
        resolve(model, {**now, **own}, config) if path in begun else resolve(model, {**new, **own}, others)
        for path, own in runs.items()
    ]


def grid_text(flags: Mapping[str, object], config: Path | None) -> str:
    """The content of the file ``GRID``."""
    return json.dumps({"config": str(config) if config else None, "flags": flags}, indent=2) + "\n"


def _read_grid(path: Path) -> dict[str, Any]:
    saved = _read_table(path)
    flags, config = saved.get("flags"), saved.get("config")
    is_whole = isinstance(flags, dict) and all(isinstance(value, str | bool) for value in flags.values())
    if not is_whole or not isinstance(config, str | None):
        raise SettingsError(f"{path}: is damaged. Remove it, and give the flags of the grid with --resume.")
    return saved


def grid_of(model: type[BaseModel], flags: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """{flag: {value as in the name of a directory: value as given}} of the flags that have several values."""
    grid: dict[str, dict[str, str]] = {}
    for name, given in flags.items():
        texts = [part.strip() for part in str(given).split(",")]
        if len(texts) < 2 or not _takes_several(model, name):
            continue
        grid[name] = {_short(model, name, text): text for text in texts}
        if len(grid[name]) < len(texts):
            raise SettingsError(f"{flag_name(name)}: each value must appear once, got {given}")
    return grid


def _takes_several(model: type[BaseModel], name: str) -> bool:
    """Whether a training can be repeated with other values of a flag: a number that affects its result, or a fold."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    is_number = any(getattr(kind, "__origin__", kind) in (int, float) for kind in kinds)
    return name == "fold" or (is_number and (name == "epochs" or name not in CHANGE_ON_RESUME))


def _short(model: type[BaseModel], name: str, text: str) -> str:
    """A value as part of the name of a directory; equal for equal values."""
    try:
        value = _parse(model, name, text)
    except ValidationError:  # ``resolve`` says what is wrong
        return text
    return f"{value:.12g}" if isinstance(value, float) else str(value).replace("/", "of")


def _resume(model: type[Model], flags: Mapping[str, object], config: Path | None) -> Model:
    """The settings of the run in ``save_dir``, updated by the flags that may change on resume."""
    directory = Path(str(flags.get("save_dir", model.model_fields["save_dir"].default)))
    path = directory / "settings.json"
    if config or flags.get("overwrite"):
        raise SettingsError(f"--resume: uses the settings of {directory}. Omit --config and --overwrite.")
    if not path.is_file():
        raise SettingsError(f"--resume: {directory} contains no run. Name its directory with --save-dir, or start one.")
    saved = read_config(path)
    command = command_of(saved)
    if _TRAININGS.get(command) not in (None, model):
        raise SettingsError(f"--resume: {directory} is a run of `rkd {command}`. Resume it with that command.")
    if set(saved) - {"command", *model.model_fields} or "save_dir" not in saved:
        raise SettingsError(f"--resume: {path} is damaged. Fix it, or start a new run.")
    before = resolve(model, {"save_dir": str(directory)}, path)
    now = resolve(model, {name: value for name, value in flags.items() if name != "resume"}, path)
    assert isinstance(before, TrainSettings) and isinstance(now, TrainSettings)
    wrong = [
        f"{flag_name(name)} {getattr(now, name)}: the run in {directory} has {getattr(before, name)}. Omit the flag."
        for name in flags
        if name not in ("resume", "save_dir", *CHANGE_ON_RESUME) and getattr(now, name) != getattr(before, name)
    ]
    if now.epochs < before.epochs:
        wrong.append(f"--epochs {now.epochs}: the run in {directory} has {before.epochs}, and cannot be shortened.")
    if now.epochs > before.epochs and now.schedule == "cosine":
        end = f"the cosine schedule of the run in {directory} ends at epoch {before.epochs}"
        wrong.append(f"--epochs {now.epochs}: {end}. Omit the flag, or start another run with --load.")
    if wrong:
        raise SettingsError(*wrong)
    earlier = {} if "fit" in saved else {"fit": "square"}  # the only one in older versions
    return now.model_copy(update={"resume": True, "save_dir": directory} | earlier)


def command_of(saved: Mapping[str, object]) -> str:
    """The training whose settings a file holds; earlier versions did not store it."""
    return str(saved.get("command") or ("distill" if "dist_ratio" in saved else "train-teacher"))


def agree(path: Path, header: Header, base: str | None, size: int | None, l2normalize: bool | None) -> None:
    """Raise a SettingsError if flags that are not None differ from a checkpoint's header."""
    asked = {"base": base, "embedding_size": size, "l2normalize": l2normalize}
    wrong = [
        f"{flag_name(name)} {value}: {path} has {getattr(header, name)}. Omit the flag."
        for name, value in asked.items()
        if value is not None and value != getattr(header, name)
    ]
    if wrong:
        raise SettingsError(*wrong)


def read_config(path: Path, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """The values of a TOML or JSON file, or of a built-in recipe, which must be for ``model`` if that is given."""
    if not _is_recipe(path):
        values = _read_table(path)
        command = values.pop("command", None) if model else None
        if command and command != getattr(model, "command", ""):
            raise SettingsError(f"--config {path}: holds settings of `rkd {command}`")
        return values
    name = str(path)
    settings = recipe_settings(name)
    if model and set(settings) - set(model.model_fields):
        (command,) = (recipe.command for recipe in recipes() if recipe.name == name)
        raise SettingsError(f"--config {name}: is a recipe for `rkd {command}`.")
    return settings


def _is_recipe(path: Path) -> bool:
    return str(path) in recipe_names() and not path.is_file()  # a run directory may have its recipe's name


def _read_table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, recipe_names(), 3)
        hint = f"Did you mean the recipe {' or '.join(close)}?" if close else "`rkd recipes` lists the recipes."
        raise SettingsError(f"--config {path}: no such file. {hint}") from None
    except OSError as error:
        raise SettingsError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # from json, tomllib and the decoder
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise SettingsError(f"--config {path}: not {kind} ({error})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path}: must contain one object of settings")
    try:
        return one_spelling(values)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate names."""
    names = [name for name, _ in pairs]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} given twice")
    return dict(pairs)


def check_effect(settings: BaseModel, given: Iterable[str], grid: Iterable[BaseModel] = (), **others: object) -> None:
    """Raise a SettingsError if a field in ``given`` has no effect with these settings and ``others``.

    For flags only: a configuration file may contain settings without effect. In a ``grid``, a flag that has an effect
    on one of the runs is accepted.
    """
    started = int(os.environ["WORLD_SIZE"]) if is_distributed() else 1
    unused: dict[str, str] | None = None
    for one in (settings, *grid):
        values = dict(one) | {"nproc": max(started, getattr(one, "nproc", 1))} | others
        unused = without_effect(type(one), values, given if unused is None else unused)
    if unused:
        raise SettingsError(*(f"{flag_name(name)}: {why}" for name, why in unused.items()))


def _parse(model: type[BaseModel], name: str, text: object) -> object:
    if not isinstance(text, str):
        return text
    adapter: TypeAdapter[object] = TypeAdapter(model.model_fields[name].rebuild_annotation())
    return adapter.validate_strings(text)


def _line(model: type[BaseModel], name: str, message: str, flags: Mapping[str, object], config: Path | None) -> str:
    if not name:
        return message
    if name not in model.model_fields:
        return f"{config}: unknown key {name}" + meant(name, model.model_fields)
    if message == "is required":
        return f"{flag_name(name)}: is required ({str(model.model_fields[name].description).rstrip('.')})"
    return f"{flag_name(name)}: {message}" if name in flags or not config else f"{config}: {name} {message}"


def _message(problem: Any) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        return "is required"
    template = {
        "greater_than_equal": "must be at least {ge}",
        "greater_than": "must be above {gt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be one of {expected}",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "value_error": "{error}",
    }.get(kind, problem["msg"].replace("{", "(").replace("}", ")"))
    text = template.format(**context).replace("'", "")
    choices = re.findall(r"'(.+?)'", context["expected"]) if kind == "literal_error" else ()
    return text if kind == "value_error" else f"{text}, got {given}" + meant(str(given), choices)
