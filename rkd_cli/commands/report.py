"""``rkd report``: read runs, and measure their models on the evaluation split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from rkd_cli.commands.compare import compare_runs
from rkd_cli.commands.evaluate import recall_notes
from rkd_cli.commands.options import open_named, reading_as_trained
from rkd_cli.commands.runs import Candidate, Run, find_family, read_runs
from rkd_cli.commands.variants import Rows, Variant, kind_of, measure_variants
from rkd_cli.compress import vector_bytes
from rkd_cli.data import ImageSet, load_dataset
from rkd_cli.data.loader import without_damaged
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.embedding.embedder import Embedder
from rkd_cli.errors import CheckpointError, DataError, RkdError, SettingsError
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.geometry import is_unit, unit_rows
from rkd_cli.metrics import Protocol, at_r, protocol_metrics, recall_at_k
from rkd_cli.models.checkpoint import read_header, untrained_notes
from rkd_cli.models.cost import Cost, measure_cost
from rkd_cli.models.embedding_net import EmbeddingNet
from rkd_cli.models.exported import ExportedNet, open_exported
from rkd_cli.report.gallery import (
    Confusion,
    Gallery,
    Space,
    find_confusions,
    find_galleries,
    find_near,
    recall_by_class,
    shown_images,
    thumbnail,
)
from rkd_cli.report.projection import Plane, check_map, draw_points, project
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.doctor import processor_name
from rkd_cli.schemas import Header
from rkd_cli.settings import ReportSettings

_MAX_COMPARED = 4  # models in galleries and maps
_KS = (1, 2, 4, 8)
_VARIANTS_OF = 20_000  # images on which smaller vectors are measured too
_PROGRESS_EVERY = 20  # thumbnails


@dataclass(frozen=True)
class Model:
    """A model of a run, or a teacher, on the evaluation split. What was not measured is None or empty."""

    name: str  # of its run, or of the teacher
    is_teacher: bool
    run: Run | None  # None for a teacher without a run directory
    base: str | None = None  # None for a vectors file
    size: int | None = None
    recall: Mapping[int, float] = field(default_factory=dict)  # measured now, like the next two
    r_precision: float | None = None
    map_at_r: float | None = None
    cost: Cost | None = None
    map: float | None = None  # with roles or cameras, like the next one
    minp: float | None = None
    variants: tuple[Variant, ...] = ()  # recall with prefixes of the embedding, and with smaller vectors
    by_class: Mapping[str, float] = field(default_factory=dict)  # {class: Recall@1}


@dataclass(frozen=True)
class Picture:
    """An image of a data set."""

    webp: bytes | None  # None if unreadable
    name: str  # folder and file
    label: str | None  # None without classes


@dataclass(frozen=True)
class Map:
    """Some images of a data set in a plane for each model."""

    kind: str
    planes: tuple[Plane, ...]
    labels: tuple[str, ...] | None  # of the images; None without classes


@dataclass(frozen=True)
class SetReport:
    """The models of one data set."""

    title: str
    images: int  # of the evaluation split; 0 if it cannot be read
    classes: int
    models: tuple[Model, ...]  # teachers first
    compared: tuple[str, ...] = ()  # names of the models in galleries, confusions and map, in this order
    main: int = 0  # index of the compared model that queries and pairs are chosen by
    galleries: tuple[Gallery, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    pictures: Mapping[int, Picture] = field(default_factory=dict)  # {image: picture} of shown images
    class_sizes: Mapping[str, int] = field(default_factory=dict)  # {class: queries}
    map: Map | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The content of the page."""

    runs: tuple[Run, ...]
    teachers: tuple[Run, ...]  # that were not named
    sets: tuple[SetReport, ...]
    differing: tuple[str, ...]  # settings that are not the same in all named runs
    problems: tuple[str, ...]  # one line for each unreadable run
    machine: str
    made: datetime
    seed: int


def measure_report(paths: Sequence[Path], settings: ReportSettings, report: Reporter) -> Report:
    """Read runs, find their teachers, and measure all models. Notes say what is missing.

    Raises:
        DataError: no run can be read.
        SettingsError: the library of the map or the device is missing, or --data is for runs of several data sets.
    """
    check_map(settings.map)
    paths = list(dict.fromkeys(paths))
    exported = [Candidate(path.name, path, None, False) for path in paths if path.suffix == ".onnx"]
    paths = [path for path in paths if path.suffix != ".onnx"]
    if not paths:
        raise DataError(f"{exported[0].source}: name the directory of its run too.")
    found = compare_runs(paths)
    runs, problems = read_runs(found, paths)
    places = list(dict.fromkeys(run.place for run in runs))
    if settings.data and len(places) > 1:
        raise SettingsError(f"--data {settings.data}: the runs use {len(places)} data sets. Omit the flag.")
    context = make_context(settings.device, settings.precision, settings.seed)
    for problem in problems:
        report(Note(f"left out: {problem}"))
    family = find_family(runs)
    sets = []
    for place in places:
        own = {run.name: run for run in family.runs if run.place == place}
        names = own.keys() | {run.teacher for run in own.values()}
        notes = [note for name, note in family.notes.items() if name in own]
        models = [model for model in family.models if model.name in names]
        models += exported if place == places[0] else []
        sets.append(_SetMeasurement(place, settings, context, report, notes).measure(models))
    return Report(
        family.runs,
        family.teachers,
        tuple(sets),
        found.differing,
        problems,
        f"{processor_name()}, torch {torch.__version__}",
        datetime.now().astimezone(),
        settings.seed,
    )


@dataclass
class _SetMeasurement:
    """Measures the models of one data set."""

    place: tuple[str, str]  # data set and folder
    settings: ReportSettings
    context: Context
    report: Reporter
    notes: list[str]
    _costs: dict[tuple[object, ...], Cost] = field(default_factory=dict)

    def measure(self, candidates: Sequence[Candidate]) -> SetReport:
        images = self._load()
        labels = None if images is None or images.labels is None else torch.tensor(images.labels)
        protocol = images.protocol if images else None
        ks = sorted({int(name[2:]) for c in candidates if c.run for name in c.run.facts.figures if "R@" in name})
        models, spaces = [], []
        by_direction = {c.run.teacher for c in candidates if c.run and _learned_directions(c.source)}
        for candidate in candidates:
            model, measured = self._measure_model(candidate, images)
            embeddings = measured.embeddings if measured else None
            if measured and embeddings is not None and labels is not None:
                if protocol:
                    recall, r, map_r, *more, _ = protocol_metrics(embeddings, embeddings, labels, protocol, ks or _KS)
                    model = replace(model, map=more[0], minp=more[1])
                else:
                    recall, (r, map_r) = recall_at_k(embeddings, labels, ks or _KS), at_r(embeddings, labels)
                variants = self._variants(model, measured, labels, protocol)
                model = replace(model, recall=recall, r_precision=r, map_at_r=map_r, variants=variants)
                self._check_recall(model)
            if embeddings is not None and labels is None and candidate.name in by_direction and not is_unit(embeddings):
                embeddings = unit_rows(embeddings).float()  # its neighbors are the reference
                self.notes.append(f"{candidate.name}: compared at unit length, as in the training of its students")
            if embeddings is not None and len(protocol.gallery if protocol else embeddings) > 1:
                space = find_near(model.name, embeddings, protocol)
                spaces.append(space)
                if images and labels is not None:
                    shares = recall_by_class(space, labels, protocol.queries if protocol else None)
                    model = replace(model, by_class={images.classes[one]: share for one, share in shares.items()})
            models.append(model)
        classes = 0 if labels is None else len({*labels.tolist()})
        dataset, _ = self.place
        found = SetReport(f"{dataset}, {self._data}", len(images) if images else 0, classes, tuple(models))
        if images and images.labels is not None:
            rows = protocol.queries.tolist() if protocol else range(len(images))
            sizes = Counter(images.labels[row] for row in rows)
            found = replace(found, class_sizes={images.classes[label]: size for label, size in sizes.items()})
        if images and spaces:
            found = self._compare(found, spaces, images, labels)
            if protocol:
                self.notes.append("pictures and recalls of classes count images of the query's camera as answers too")
        for note in self.notes:
            self.report(Note(note))
        return replace(found, notes=tuple(self.notes))

    @property
    def _data(self) -> Path:
        return self.settings.data or Path(self.place[1])

    def _load(self) -> ImageSet | None:
        try:
            splits: Sequence[ImageSet] = load_dataset(self.place[0], self._data, self.report)
            if self.settings.skip_damaged:
                decoded = [images.decoded(self.settings.max_pixels) for images in splits]
                splits = without_damaged(decoded, self.settings.workers, self.report)
        except RkdError as error:
            self.notes.append(f"no model is measured on images, and no images are shown: {_first_problem(error)}")
            return None
        return splits[1]

    def _measure_model(self, candidate: Candidate, images: ImageSet | None) -> tuple[Model, Rows | None]:
        model = Model(candidate.name, candidate.is_teacher, candidate.run)
        if candidate.run:
            model = replace(model, base=candidate.run.settings["base"], size=candidate.run.settings["embedding_size"])
        inference = self.settings.inference(self._data)
        try:
            if not candidate.source.is_file():
                raise CheckpointError(f"{candidate.source}: does not exist (yet)")
            embedder = open_named(str(candidate.source), inference)
            network = embedder.network
            model = replace(model, base=embedder.header.base if embedder.header else None, size=embedder.size)
            if isinstance(network, EmbeddingNet | ExportedNet) and embedder.header:
                model = replace(model, cost=self._cost(network, embedder.header, candidate))
            if images is None:
                return model, None
            self._note_seen(candidate.name, embedder, images)
            what = f"Embedding with {candidate.name}"
            how = reading_as_trained(embedder, inference, self.context.device)
            found = embedder.embed({what: images}, how, self.context, self.report)[what]
            if len(found.images) < len(images):
                raise DataError(
                    f"{candidate.source}: has embeddings of only {len(found.images):,} of {len(images):,} images"
                )
        except RkdError as error:
            self.notes.append(f"{candidate.name}: not measured: {_first_problem(error)}")
            return model, None
        embeddings = found.embeddings.cpu()
        return model, Rows(embeddings, is_unit(embeddings), kind_of(embedder))

    def _note_seen(self, name: str, embedder: Embedder, images: ImageSet) -> None:
        if embedder.header and (seen := overlap(embedder.header.seen_classes, images)):
            self.notes.append(seen_note(name, seen, "eval"))
        if embedder.header and embedder.is_checkpoint:
            self.notes.extend(untrained_notes(name, embedder.header, Path(embedder.path)))

    def _variants(self, model: Model, rows: Rows, labels: Tensor, protocol: Protocol | None) -> tuple[Variant, ...]:
        """With whole embeddings, with the prefixes that were trained (Matryoshka), and with both as smaller vectors."""
        if len(rows.embeddings) > _VARIANTS_OF:
            self.notes.append(f"{model.name}: smaller vectors are not measured on more than {_VARIANTS_OF:,} images")
            return ()
        size = rows.embeddings.shape[1]
        trained = model.run.settings.get("matryoshka") or () if model.run else ()
        sizes = sorted({size, *(one for one in trained if one < size)}, reverse=True)
        recall = recall_at_k(rows.embeddings, labels, (1,), protocol=protocol)
        whole = Variant(None, size, rows.kind, vector_bytes(rows.kind, size), recall)
        smaller = measure_variants(rows, rows, None, (labels, protocol), sizes, ("float", "int8", "binary"), (1,))
        return (whole, *smaller)

    def _cost(self, network: EmbeddingNet | ExportedNet, header: Header, candidate: Candidate) -> Cost:
        """The cost, measured once for networks that differ only in their weights."""
        if isinstance(network, ExportedNet):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # onnxruntime takes as many
            try:
                cost = measure_cost(open_exported(candidate.source), header.image_size, candidate.source, threads=(1,))
            finally:
                torch.set_num_threads(threads)
            return replace(cost, parameters=network.parameter_count())
        key = (header.base, header.embedding_size, header.l2normalize, header.image_size)
        if key not in self._costs:
            self.report(Progress(f"Timing {candidate.name}", 0, 1, "models"))
            self._costs[key] = measure_cost(network, header.image_size, candidate.source)
            self.report(Progress(f"Timing {candidate.name}", 1, 1, "models"))
        return replace(self._costs[key], file_bytes=candidate.source.stat().st_size)

    def _check_recall(self, model: Model) -> None:
        figures = model.run.facts.figures if model.run else {}
        recorded = {int(name[2:]): value for name, value in figures.items() if name.startswith("R@")}
        self.notes.extend(recall_notes(model.name, model.recall, recorded))

    def _compare(self, found: SetReport, spaces: Sequence[Space], images: ImageSet, labels: Tensor | None) -> SetReport:
        """Add galleries, confusions and the map."""
        first = {model.run.facts.identity: model.name for model in reversed(found.models) if model.run}
        one_each = {model.name for model in found.models if not model.run} | {*first.values()}
        spaces, main, teacher = _ordered([space for space in spaces if space.name in one_each], found.models)
        if len(spaces) > _MAX_COMPARED:
            shown = ", ".join(space.name for space in spaces[:_MAX_COMPARED])
            self.notes.append(f"pictures and maps show {_MAX_COMPARED} of the {len(spaces)} models: {shown}")
            spaces = spaces[:_MAX_COMPARED]
        count, seed = self.settings.gallery, self.settings.seed
        other = teacher if teacher is not None or len(spaces) < 2 else 1
        queries = {*images.protocol.queries.tolist()} if images.protocol else None
        galleries = find_galleries(spaces, main, other, teacher, labels, count, seed, queries)
        confusions = [] if labels is None else find_confusions(spaces, main, images, labels, queries)
        pictures = {}
        shown_rows = shown_images(galleries, confusions)
        for number, row in enumerate(shown_rows, 1):
            path = images.paths[row]
            label = images.classes[images.labels[row]] if images.labels is not None else None
            pictures[row] = Picture(thumbnail(path, decoding=images.decoding), "/".join(path.parts[-2:]), label)
            if number % _PROGRESS_EVERY == 0 or number == len(shown_rows):
                self.report(Progress("Making thumbnails", number, len(shown_rows)))
        if unread := [picture.name for picture in pictures.values() if picture.webp is None]:
            self.notes.append(f"{len(unread)} images cannot be read and have no picture, first {unread[0]}")
        rows = draw_points(labels, len(images), seed)
        planes = project(self.settings.map, [(s.name, s.embeddings[rows]) for s in spaces], seed)
        names = None if images.labels is None else tuple(images.classes[images.labels[row]] for row in rows)
        return replace(
            found,
            compared=tuple(space.name for space in spaces),
            main=main,
            galleries=tuple(galleries),
            confusions=tuple(confusions),
            pictures=pictures,
            map=Map(self.settings.map, tuple(planes), names),
        )


def _ordered(spaces: Sequence[Space], models: Sequence[Model]) -> tuple[list[Space], int, int | None]:
    """The teacher of the first run, that run, and the others; and the indices of the run and the teacher."""
    names = {space.name for space in spaces}
    main = next((model for model in models if not model.is_teacher and model.name in names), None)
    name = main.name if main else spaces[0].name
    teacher = main.run.teacher if main and main.run else None
    order = sorted(spaces, key=lambda space: 0 if space.name == teacher else 1 if space.name == name else 2)
    return (order, 1, 0) if order[0].name == teacher else (order, 0, None)


def _learned_directions(checkpoint: Path) -> bool:
    """Whether a student was trained with teacher embeddings of unit length."""
    with suppress(CheckpointError):
        return read_header(checkpoint).teacher_space == "unit"
    return False


def _first_problem(error: RkdError) -> str:
    more = len(error.problems) - 1
    return error.problems[0] + (f" (and {more} more)" if more else "")
