"""Compare runs: settings, figures and cost, read from their directories. No network is loaded."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from scipy import special

from rkd_cli.errors import DataError
from rkd_cli.runtime.files import is_locked
from rkd_cli.schemas import OVERLAP, EpochDone, Result, leading
from rkd_cli.settings import DistillSettings, TeacherSettings, one_spelling, without_effect
from rkd_cli.settings.resolve import command_of

_Model = TypeVar("_Model", bound=BaseModel)
# settings that affect neither the weights nor the best epoch, or have a column of their own
_IGNORED = {
    "seed",
    "fold",
    "save_dir",
    "workers",
    "cache",
    "cache_dir",
    "save_every",
    "keep_state",
    "device",
    "log",
    "recall",
    "eval_train",
}
_COMBINED = {"command", "dataset", "data", "base", "embedding_size", "loss", "teacher"}  # into facts, in ``_facts``
_USED_BY = {"queue_size": ("csd", "queue", "d3"), "hint_epochs": ("fitnet",)}  # other names start with their term's
_WITH_PATH = ("folder", "images", "list", "packed")  # data sets that the name alone does not identify
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm, not parameters


class _SavedSettings(BaseModel):
    """``settings.json`` of any version: the required fields, and all others unchecked."""

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
    """The content of a run directory."""

    path: Path
    status: str  # done, running, or stopped
    facts: Mapping[str, Any]  # data, network, loss, teacher, and each setting that affects the weights
    identity: str  # equal for runs that differ only in their seeds and folds
    seed: int
    epochs: int  # to train
    reached: int | None  # last epoch in the metrics
    best_epoch: int | None
    figures: Mapping[str, float]  # of the evaluation split at the best epoch: R@K, or ``metrics.agreement``
    last: float | None  # the leading figure at the last epoch
    parameters: int | None  # of the best checkpoint
    bytes: int | None
    seconds: float  # of training so far
    fold: str | None = None  # I/N

    @property
    def score(self) -> float:
        """R@1, or the overlap without labels; runs are sorted by it."""
        return self.figures.get("R@1", self.figures.get(OVERLAP, -1.0))

    @property
    def is_untrained(self) -> bool:
        """Whether no epoch was better than the network before training."""
        return self.best_epoch == 0


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds and folds, best first, and statistics of the finished ones.

    ``deviation`` is the sample standard deviation over seeds. A seed with several runs counts once, by their mean; with
    folds it counts when all are finished, by the mean over them. The statistics of a single seed are over its folds;
    without folds there are none.
    """

    runs: tuple[RunFacts, ...]
    seeds: int  # that count
    mean: Mapping[str, float]
    deviation: Mapping[str, float]

    @property
    def folds(self) -> int:
        """Number of folds of a seed, 1 without."""
        return int(self.runs[0].facts.get("folds", 1))

    @property
    def score(self) -> float:
        """``RunFacts.score`` of the mean, or of the best run."""
        return self.mean.get("R@1", self.mean.get(OVERLAP, self.runs[0].score))


@dataclass(frozen=True)
class Difference:
    """The leading figure of the best group of a data set minus that of another, seed by seed, as means over folds.

    ``margin`` is half of the 95 % interval of the mean difference (paired Student's t).
    """

    first: Group
    second: Group
    figure: str
    seeds: int
    mean: float
    margin: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.margin


@dataclass(frozen=True)
class Comparison:
    """Runs in groups."""

    groups: tuple[Group, ...]  # by data set, best first
    differing: tuple[str, ...]  # names of facts that are not the same in all runs
    problems: tuple[str, ...]  # one line for each run that cannot be read
    differences: tuple[Difference, ...] = ()  # of groups with two or more common seeds
    # for each group, {seed: recalls of the concatenated embeddings of its folds}; empty if not measured
    concatenated: tuple[Mapping[int, Mapping[str, float]], ...] = ()


def compare_runs(paths: Iterable[Path]) -> Comparison:
    """Read, group and sort runs. Raises a DataError if none can be read."""
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
        problems.append(f"{others[0]}{more}: not a run directory (no settings.json). Name run directories.")
    if not runs:
        raise DataError(*problems)
    same: dict[str, list[RunFacts]] = {}
    for run in runs:
        same.setdefault(run.identity, []).append(run)
    order = list(dict.fromkeys(run.facts["data"] for run in runs))
    groups = [_group(members) for members in same.values()]
    groups.sort(key=lambda group: (order.index(group.runs[0].facts["data"]), -group.score))
    return Comparison(tuple(groups), tuple(_differing(runs)), tuple(problems), tuple(_differences(groups)))


def _differences(groups: Sequence[Group]) -> Iterator[Difference]:
    best: dict[str, Group] = {}
    for group in groups:
        first = best.setdefault(group.runs[0].facts["data"], group)
        ours, theirs = finished(first.runs), finished(group.runs)
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        common = [[(mine[fold], others[fold]) for fold in mine if fold in others] for mine, others in pairs]
        common = [folds for folds in common if folds]
        figure = leading(first.runs[0].figures)
        if first is group or len(common) < 2:
            continue
        gains = [
            statistics.fmean(_mean_of(figure, mine) - _mean_of(figure, others) for mine, others in folds)
            for folds in common
        ]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        margin = error * float(special.stdtrit(len(gains) - 1, 0.975))
        if math.isfinite(margin):
            yield Difference(first, group, figure, len(gains), statistics.fmean(gains), margin)


def _mean_of(figure: str, runs: Sequence[RunFacts]) -> float:
    return statistics.fmean(run.figures.get(figure, math.nan) for run in runs)


def finished(runs: Sequence[RunFacts]) -> dict[int, dict[str | None, list[RunFacts]]]:
    """The finished runs of each seed and fold."""
    found: dict[int, dict[str | None, list[RunFacts]]] = {}
    for run in runs:
        if run.status == "done":
            found.setdefault(run.seed, {}).setdefault(run.fold, []).append(run)
    return found


def _differing(runs: Sequence[RunFacts]) -> list[str]:
    """The names of facts that differ between runs which have them."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.facts.items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1]


def _group(runs: Sequence[RunFacts]) -> Group:
    group = Group(tuple(sorted(runs, key=lambda run: -run.score)), 0, {}, {})
    seeds = [
        [_means([_columns(run) for run in same]) for same in folds.values()]
        for folds in finished(runs).values()
        if len(folds) == group.folds
    ]
    rows = [_means(folds) for folds in seeds] if len(seeds) > 1 else [*itertools.chain(*seeds)]
    if len(rows) < 2:
        return replace(group, seeds=len(seeds))
    mean = _means(rows)
    deviation = {name: statistics.stdev(row[name] for row in rows) for name in mean}
    return replace(group, seeds=len(seeds), mean=mean, deviation=deviation)


def _columns(run: RunFacts) -> dict[str, float]:
    return {**run.figures, **({} if run.last is None else {"last": run.last}), "seconds": run.seconds}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of what all rows have."""
    common = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: statistics.fmean(row[name] for row in rows) for name in common}


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
        result = _parse(Result, done, _read_text(done))
        reached = int(settings["epochs"]) if result.ended_at is None else result.ended_at
        best_epoch, seconds = result.best_epoch, result.seconds
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
        status = "running" if is_locked(path / ".lock") else "stopped"
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
        settings["fold"],
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run, with today's defaults for settings that its version did not have."""
    file = path / "settings.json"
    try:
        saved = one_spelling(_parse(_SavedSettings, file, _read_text(file)).model_dump())
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    saved["command"] = command_of(saved)
    model: type[BaseModel] = DistillSettings if saved["command"] == "distill" else TeacherSettings
    return {**model.model_construct().model_dump(mode="json"), **saved}


def _facts(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    is_student = settings["command"] == "distill"
    ratios = DistillSettings.ratios if is_student else ()
    if not all(isinstance(settings[name], int | float) for name in ratios):
        raise DataError(f"{path / 'settings.json'}: damaged (a loss ratio is not a number). Restore the file.")
    terms = {name.removesuffix("_ratio"): settings[name] for name in ratios if settings[name]}
    folder = f" {settings['data']}" if settings["dataset"] in _WITH_PATH else ""
    facts = {
        "data": f"{settings['dataset']}{folder}",
        "network": f"{settings['base']} {settings['embedding_size']}-d",
        "loss": " + ".join(f"{ratio:g} {term}" for term, ratio in terms.items()) if is_student else settings["loss"],
    }
    if is_student:
        facts["teacher"] = str(settings["teacher"]).removesuffix("/best.safetensors")
    if settings["fold"]:
        facts["folds"] = int(str(settings["fold"]).partition("/")[2])
    model: type[BaseModel] = DistillSettings if is_student else TeacherSettings
    unused = without_effect(model, settings, [name for name in settings if name in model.model_fields])
    # a switch that is on without an effect is the same as one that is off
    off = {name: default for name in unused if not (default := model.model_fields[name].default)}
    for name, value in {**settings, **off}.items():
        term = name.partition("_")[0]
        used_by = _USED_BY.get(name, (term,) if f"{term}_ratio" in settings else ())
        ignored = _IGNORED | _COMBINED | (unused.keys() - off.keys())
        if name not in ignored and name not in ratios and (not used_by or {*used_by} & terms.keys()):
            facts[name] = value
    return facts


def _teacher_identity(name: str) -> str:
    """The facts of a teacher's run, so that teachers which differ only in their seeds are equal; else its name."""
    path = Path(name)
    directory = path if path.is_dir() else path.parent
    if path == directory or path.name == "last.safetensors":
        with suppress(DataError):
            return json.dumps([path.name if path != directory else "", _facts(read_settings(directory), directory)])
    return name


def read_rows(path: Path) -> list[EpochDone]:
    """The epochs in a ``metrics.jsonl``; none if the file does not exist yet."""
    return [_parse(EpochDone, path, line) for line in _read_text(path).splitlines()] if path.is_file() else []


def _cost(path: Path) -> tuple[int | None, int | None]:
    """Parameters and bytes of a checkpoint."""
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, framework="numpy") as file:
            slices = [file.get_slice(name) for name in file.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118
            count = sum(math.prod(part.get_shape()) for part in slices if "F" in part.get_dtype())
        return count, path.stat().st_size
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Restore the file.") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _parse(model: type[_Model], path: Path, text: str) -> _Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(
            f"{path}: damaged, or of an incompatible version ({where}: {first['msg']}). Restore it, or omit the run."
        ) from None
