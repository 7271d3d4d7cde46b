"""Read whole run directories, and find the teachers of the runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rkd_cli.commands.compare import Comparison, RunFacts, compare_runs, read_rows, read_settings
from rkd_cli.errors import CheckpointError, DataError, RkdError
from rkd_cli.models.checkpoint import read_header
from rkd_cli.models.joined import TEACHERS
from rkd_cli.models.sources import is_pretrained, located
from rkd_cli.schemas import EpochDone


@dataclass(frozen=True)
class Run:
    """The whole content of a run directory."""

    name: str  # short and unique
    facts: RunFacts
    settings: Mapping[str, Any]
    rows: tuple[EpochDone, ...]
    changed: datetime  # last change of its files
    version: str | None  # of rkd, from the best checkpoint
    teacher: str | None = None  # name of the teacher's model, if it was found

    @property
    def place(self) -> tuple[str, str]:
        """The data set and its folder."""
        return str(self.settings["dataset"]), str(self.settings["data"])


@dataclass(frozen=True)
class RunSize:
    """What a run directory takes on the disk."""

    path: Path
    status: str  # as in ``RunFacts``, or unreadable
    bytes: int
    spare: Mapping[Path, int]  # {file that may be removed: its bytes}


@dataclass(frozen=True)
class Candidate:
    """A model that is not open yet: of a run, or a teacher."""

    name: str  # unique
    source: Path  # a checkpoint, or a teacher's vectors file
    run: Run | None  # that wrote the checkpoint, if known
    is_teacher: bool


@dataclass(frozen=True)
class Family:
    """Runs and their teachers."""

    runs: tuple[Run, ...]  # as named
    teachers: tuple[Run, ...]  # runs of teachers that were not named
    models: tuple[Candidate, ...]  # teachers first
    notes: Mapping[str, str]  # {run: why its teacher is left out}


def read_runs(found: Comparison, paths: Sequence[Path]) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Runs in the order of ``paths``, and one line for each unreadable run. Raises a DataError if none can be read."""
    facts = sorted((run for group in found.groups for run in group.runs), key=lambda run: paths.index(run.path))
    names = _names([run.path for run in facts])
    runs, problems = [], list(found.problems)
    for run in facts:
        try:
            runs.append(_read_run(run, names[run.path]))
        except DataError as error:
            problems += error.problems
    if not runs:
        raise DataError(*problems)
    return tuple(runs), tuple(problems)


def sizes_of_runs(folders: Sequence[Path]) -> list[RunSize]:
    """The runs in these folders, which may be runs themselves. Raises a DataError for each folder without any."""
    found = {folder: sorted(folder.rglob("settings.json")) for folder in folders}
    if empty := [folder for folder, files in found.items() if not files]:
        raise DataError(*(f"{one}: no run directory (no settings.json). Name folders of runs." for one in empty))
    return [_size_of(path) for path in dict.fromkeys(file.parent for files in found.values() for file in files)]


def _size_of(path: Path) -> RunSize:
    try:
        status = compare_runs([path]).groups[0].runs[0].status
    except DataError:
        status = "unreadable"
    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    left = {*path.glob(".*.part"), *path.glob(".tmp*")}  # temporary files of rkd and safetensors
    if status == "done":
        left.add(path / "state.safetensors")
    spare = {file: size for file, size in sizes.items() if file in left and status != "running"}
    return RunSize(path, status, sum(sizes.values()), spare)


def clear_run(found: RunSize) -> int:
    """Remove the spare files of a run, and return their bytes."""
    for file in found.spare:
        file.unlink(missing_ok=True)
    return sum(found.spare.values())


def find_family(runs: Sequence[Run]) -> Family:
    """The runs with the teachers whose files exist."""
    named = {run.facts.path.resolve(): run for run in runs}
    teachers: dict[Path, Candidate] = {}  # without those in ``named``
    taught: list[Run] = []
    notes: dict[str, str] = {}
    for run in runs:
        asked = run.settings.get("teacher")
        try:
            joined = run.facts.path / TEACHERS
            of_several = asked and "," in str(asked) and joined.is_file()
            source = _teacher_file(str(joined if of_several else asked)) if asked else None
        except RkdError as error:
            notes[run.name] = f"{run.name}: its teacher is left out: {error.problems[0]}"
            source = None
        if source is None:
            taught.append(run)
        elif source.name == "best.safetensors" and source.parent in named:
            taught.append(replace(run, teacher=named[source.parent].name))
        else:
            taken = {other.name for other in runs} | {other.name for other in teachers.values()}
            teacher = teachers.setdefault(source, _teacher(source, taken))
            taught.append(replace(run, teacher=teacher.name))
    teaching = {run.teacher for run in taught}
    own = [Candidate(run.name, run.facts.path / "best.safetensors", run, run.name in teaching) for run in taught]
    models = sorted((*teachers.values(), *own), key=lambda model: not model.is_teacher)
    return Family(tuple(taught), tuple(t.run for t in teachers.values() if t.run), tuple(models), notes)


def _read_run(facts: RunFacts, name: str) -> Run:
    path, version = facts.path, None
    with suppress(CheckpointError):  # missing, or damaged, which is reported when the model is opened
        version = read_header(path / "best.safetensors").version
    files = [path / file for file in ("settings.json", "metrics.jsonl", "result.json")]
    changed = max(file.stat().st_mtime for file in files if file.is_file())
    rows = tuple(read_rows(path / "metrics.jsonl"))
    return Run(name, facts, read_settings(path), rows, datetime.fromtimestamp(changed).astimezone(), version)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """{path: as few of its last parts as are unique}."""
    parts = {path: (path if path.name not in ("", "..") else path.resolve()).parts for path in paths}
    names = {}
    for path, own in parts.items():
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts.values()) > 1:
            count += 1
        names[path] = "/".join(own[-count:])
    return names


def _teacher_file(name: str) -> Path:
    if is_pretrained(name):
        raise CheckpointError(f"{name} is a pretrained network")
    path = Path(located(name)).resolve()
    if path.is_dir():
        raise CheckpointError(f"{name} is a folder of another library")
    return path


def _teacher(source: Path, taken: Collection[str]) -> Candidate:
    of_run = source.name in ("best.safetensors", "last.safetensors")
    parts = source.parent.parts if of_run else source.parts
    count = 1
    while count < len(parts) and "/".join(parts[-count:]) in taken:
        count += 1
    name, run = "/".join(parts[-count:]), None
    if source.name == "best.safetensors":
        with suppress(DataError):  # the checkpoint may be alone in its folder
            (group,) = compare_runs([source.parent]).groups
            run = _read_run(group.runs[0], name)
    return Candidate(name, source, run, True)
