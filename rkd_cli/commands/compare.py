"""Runs side by side, read from their directories: settings, figures and cost. No network is loaded."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from rkd_cli.errors import DataError
from rkd_cli.runtime.files import is_locked
from rkd_cli.schemas import OVERLAP, EpochDone, Result, leading
from rkd_cli.settings import DistillSettings, TeacherSettings, one_spelling
from rkd_cli.settings.resolve import command_of

_Read = TypeVar("_Read", bound=BaseModel)
# what changes neither the weights nor which epoch is the best, or has a column already
_ASIDE = {"seed", "save_dir", "workers", "cache", "cache_dir", "save_every", "device", "log", "recall", "eval_train"}
_NAMED = {"command", "dataset", "data", "base", "embedding_size", "loss", "teacher"}  # parts of the facts below
_OF_TERMS = {"queue_size": ("csd", "queue", "d3"), "hint_epochs": ("fitnet",)}  # other names begin with their term's
_OWN_PLACE = ("folder", "images")  # the sets that their path tells from others of the kind
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: no parameters


class _Saved(BaseModel):
    """``settings.json`` of this version or another: what is needed here, and all else as it stands."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, bool | int | float | str | list[int | float | str] | None]

    dataset: str
    data: str
    base: str
    embedding_size: int
    epochs: Annotated[int, Field(ge=1)]
    seed: int


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory shows it.

    Args:
        path: of its directory.
        status: done, going on, or stopped (also by a kill).
        facts: data, network, loss, teacher, and each setting that shapes the weights.
        identity: equal for runs that differ by their seeds alone.
        seed: of the run.
        epochs: that it is to have.
        reached: the last epoch in its metrics; None before the first.
        best_epoch: None where nothing was measured yet.
        figures: of the best epoch on unseen classes, R@K; without labels on photos held out, by the names of
            ``metrics.agreement``.
        last: the first of these of the last epoch.
        parameters, bytes: of the best model and its file, None where there is none yet.
        seconds: spent.
    """

    path: Path
    status: str
    facts: Mapping[str, Any]
    identity: str
    seed: int
    epochs: int
    reached: int | None
    best_epoch: int | None
    figures: Mapping[str, float]
    last: float | None
    parameters: int | None
    bytes: int | None
    seconds: float

    @property
    def score(self) -> float:
        """What runs are sorted by: R@1, or else the overlap."""
        return self.figures.get("R@1", self.figures.get(OVERLAP, -1.0))

    @property
    def is_untrained(self) -> bool:
        """Whether no epoch was better than the network before training."""
        return self.best_epoch == 0


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds alone, best first; mean and sample standard deviation of those that are done,
    empty where these have fewer than two seeds. A seed that was run again counts once, by the mean of its runs."""

    runs: tuple[RunFacts, ...]
    seeds: int
    mean: Mapping[str, float]
    deviation: Mapping[str, float]

    @property
    def score(self) -> float:
        """See ``RunFacts``; of the mean where there is one."""
        return self.mean.get("R@1", self.mean.get(OVERLAP, self.runs[0].score))


@dataclass(frozen=True)
class Comparison:
    """Groups by data set, each set's best first; which facts differ; and one line for each run that cannot be read."""

    groups: tuple[Group, ...]
    differing: tuple[str, ...]
    problems: tuple[str, ...]


def compare_runs(paths: Iterable[Path]) -> Comparison:
    """Read runs and put them in order.

    Raises:
        DataError: none can be read.
    """
    runs: list[RunFacts] = []
    problems: list[str] = []
    others: list[Path] = []
    for path in dict.fromkeys(paths):
        if not (path / "settings.json").is_file():
            others.append(path)
            continue
        try:
            runs.append(_read_run(path))
        except DataError as error:
            problems += error.problems
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        problems.append(f"{others[0]}{more}: no run there (no settings.json): name directories of runs")
    if not runs:
        raise DataError(*problems)
    together: dict[str, list[RunFacts]] = {}
    for run in runs:
        together.setdefault(run.identity, []).append(run)
    order = list(dict.fromkeys(run.facts["data"] for run in runs))
    groups = [_group(same) for same in together.values()]
    groups.sort(key=lambda group: (order.index(group.runs[0].facts["data"]), -group.score))
    return Comparison(tuple(groups), tuple(_differing(runs)), tuple(problems))


def _differing(runs: Sequence[RunFacts]) -> list[str]:
    """The facts that two runs both have, and have otherwise."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.facts.items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1]


def _group(runs: Sequence[RunFacts]) -> Group:
    by_seed: dict[int, list[dict[str, float]]] = {}
    for run in runs:
        if run.status == "done":
            figures = {**run.figures, **({"last": run.last} if run.last is not None else {}), "seconds": run.seconds}
            by_seed.setdefault(run.seed, []).append(figures)
    ordered = tuple(sorted(runs, key=lambda run: -run.score))
    if len(by_seed) < 2:
        return Group(ordered, len(by_seed), {}, {})
    shared = [name for name in next(iter(by_seed.values()))[0] if all(name in f for s in by_seed.values() for f in s)]
    columns = {
        name: [statistics.fmean(figures[name] for figures in same) for same in by_seed.values()] for name in shared
    }
    return Group(
        ordered,
        len(by_seed),
        {name: statistics.fmean(column) for name, column in columns.items()},
        {name: statistics.stdev(column) for name, column in columns.items()},
    )


def _read_run(path: Path) -> RunFacts:
    settings = read_settings(path)
    facts = _facts(settings, path)
    teacher = facts.get("teacher")
    identity = facts | ({"teacher": _teacher_identity(teacher)} if teacher else {})
    done = path / "result.json"
    reached: int | None
    best_epoch: int | None
    last: float | None
    if done.is_file():
        result = _parsed(Result, done, _text(done))
        reached, best_epoch, seconds = int(settings["epochs"]), result.best_epoch, result.seconds
        figures = result.best["eval"]
        last = result.final["eval"][leading(figures)]
        status = "done"
    else:
        rows = read_rows(path / "metrics.jsonl")
        measured = [row for row in rows if row.figures]
        best = [row for row in measured if row.is_best][-1:]  # each is better than those before it
        reached, seconds = rows[-1].epoch if rows else None, sum(row.seconds for row in rows)
        best_epoch = best[0].epoch if best else None
        figures = best[0].figures["eval"] if best else {}
        last = measured[-1].figures["eval"][leading(figures)] if best else None
        status = "going on" if is_locked(path / ".lock") else "stopped"
    return RunFacts(
        path,
        status,
        facts,
        json.dumps(identity, sort_keys=True),
        int(settings["seed"]),
        int(settings["epochs"]),
        reached,
        best_epoch,
        figures,
        last,
        *_cost(path / "best.safetensors"),
        seconds,
    )


def read_settings(path: Path) -> dict[str, Any]:
    """What the run was made with; of what its version did not have, today's defaults.

    Raises:
        DataError: it cannot be read.
    """
    file = path / "settings.json"
    try:
        saved = one_spelling(_parsed(_Saved, file, _text(file)).model_dump())
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    saved["command"] = command_of(saved)
    model: type[BaseModel] = DistillSettings if saved["command"] == "distill" else TeacherSettings
    return {**model.model_construct().model_dump(mode="json"), **saved}


def _facts(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    is_student = settings["command"] == "distill"
    ratios = DistillSettings.ratios if is_student else ()
    if not all(isinstance(settings[name], int | float) for name in ratios):
        raise DataError(f"{path / 'settings.json'}: a ratio is no number: the file is damaged")
    terms = {name.removesuffix("_ratio"): settings[name] for name in ratios if settings[name]}
    place = f" {settings['data']}" if settings["dataset"] in _OWN_PLACE else ""
    facts = {
        "data": f"{settings['dataset']}{place}",
        "network": f"{settings['base']} {settings['embedding_size']}-d",
        "loss": " + ".join(f"{ratio:g} {term}" for term, ratio in terms.items()) if is_student else settings["loss"],
    }
    if is_student:
        facts["teacher"] = str(settings["teacher"]).removesuffix("/best.safetensors")
    for name, value in settings.items():
        term = name.partition("_")[0]
        used_by = _OF_TERMS.get(name, (term,) if f"{term}_ratio" in settings else ())
        if name not in _ASIDE | _NAMED and name not in ratios and (not used_by or {*used_by} & terms.keys()):
            facts[name] = value
    return facts


def _teacher_identity(name: str) -> str:
    """Teachers that differ by their seeds alone are one, for a student of each seed may have its own."""
    path = Path(name)
    directory = path if path.is_dir() else path.parent
    if path == directory or path.name == "last.safetensors":
        with suppress(DataError):
            return json.dumps([path.name if path != directory else "", _facts(read_settings(directory), directory)])
    return name


def read_rows(path: Path) -> list[EpochDone]:
    """The epochs of a ``metrics.jsonl``; none before the first was saved.

    Raises:
        DataError: it cannot be read.
    """
    return [_parsed(EpochDone, path, line) for line in _text(path).splitlines()] if path.is_file() else []


def _cost(path: Path) -> tuple[int | None, int | None]:
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, framework="numpy") as file:
            slices = [file.get_slice(name) for name in file.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118
            count = sum(math.prod(part.get_shape()) for part in slices if "F" in part.get_dtype())
        return count, path.stat().st_size
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}): the file is damaged") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _parsed(model: type[_Read], path: Path, text: str) -> _Read:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{path}: is damaged or of another rkd ({where}: {first['msg']})") from None
