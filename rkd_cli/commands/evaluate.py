"""``rkd evaluate``: measure the retrieval metrics of networks and vectors files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, get_args

import torch
from torch import Tensor

from rkd_cli.commands.options import check_used, check_weights, note_untrained, open_named, reading_as_trained
from rkd_cli.commands.variants import Rows, Variant, kind_of, measure_variants, stored_as
from rkd_cli.compress import vector_bytes
from rkd_cli.data import ImageSet, find_dataset, load_dataset
from rkd_cli.data.found import image_folders, may_hold
from rkd_cli.data.loader import without_damaged
from rkd_cli.data.sets.lists import is_list
from rkd_cli.data.sets.packed import is_packed
from rkd_cli.data.sets.pair import load_pair
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.embedding.embedder import Embedded, Embedder, NetworkEmbedder
from rkd_cli.embedding.vectors import is_vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Reporter
from rkd_cli.geometry import is_unit
from rkd_cli.metrics import (
    Interval,
    Protocol,
    at_r,
    hits_at_k,
    paired_bootstrap,
    protocol_metrics,
    recall_at_k,
    without_positive,
)
from rkd_cli.models.cost import time_image
from rkd_cli.models.embedding_net import TeacherSpace
from rkd_cli.models.exported import is_exported
from rkd_cli.models.sources import bytes_of
from rkd_cli.report.text import split_text
from rkd_cli.runtime.context import make_context
from rkd_cli.runtime.distributed import ranks
from rkd_cli.schemas import Header
from rkd_cli.settings import Dataset, EvaluateSettings, ImageSettings
from rkd_cli.settings.resolve import agree, read_config

_Settings = TypeVar("_Settings", bound=ImageSettings)
_ROUNDING = 0.005  # recall changes less than this from rounding
_WORKS = ("Evaluating train images", "Evaluating eval images")
_PAIR = "query and gallery"


@dataclass(frozen=True)
class SplitMetrics:
    """The metrics of one split, as fractions."""

    recall: dict[int, float]
    r_precision: float
    map_at_r: float
    images: int
    without_positive: int  # queries that the metrics leave out
    map: float | None = None  # None without roles and cameras, like the next three
    minp: float | None = None
    queries: int | None = None
    gallery: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a network or a vectors file (no header, 0 parameters)."""

    name: str
    header: Header | None
    size: int
    l2normalize: bool
    dataset: str
    parameters: int
    file_bytes: int | None  # of a checkpoint
    milliseconds: float | None = field(compare=False)  # per image on the CPU
    threads: int  # for ``milliseconds``
    train: SplitMetrics | None  # None if a vectors file lacks these images
    eval: SplitMetrics
    seen: tuple[str, ...] = ()  # evaluation classes that the network was trained on
    variants: tuple[Variant, ...] = ()
    against: Mapping[str, Interval] = field(default_factory=dict)  # {other model: this Recall@1 minus the other's}
    search: dict[str, object] = field(default_factory=dict, compare=False)  # flags for ``rkd search`` in these images
    vectors: str = "float"  # how the embeddings are stored

    @property
    def vector_bytes(self) -> int:
        """Bytes of an embedding."""
        return vector_bytes(self.vectors, self.size)


@dataclass(frozen=True)
class _Embedded:
    """A model with its embeddings of the splits."""

    model: Embedder
    parameters: int
    milliseconds: float | None
    sets: dict[str, Embedded]
    space: TeacherSpace | None = None


@dataclass(frozen=True)
class _Hits:
    """(Q,) whether each query of the evaluation split is a hit at 1, and (Q,) its label."""

    name: str
    paths: list[Path]  # of the whole split
    hits: Tensor
    labels: Tensor


def evaluate_models(names: Sequence[str], settings: EvaluateSettings, report: Reporter) -> list[Evaluation]:
    """Measure models on both splits of a data set: those in ``names``, and the gallery's unless it is one of them.

    Raises:
        RkdError: a model or the images cannot be read, or flags contradict them or each other.
    """
    pair, settings = _pair(settings, report)
    all_names = [*names, *([settings.gallery] if settings.gallery else [])]
    check_weights(all_names, settings)
    with ranks().first():
        models: list[Embedder] = [open_named(name, settings, report) for name in all_names]
    _check(models, settings)
    if pair:
        sets = [_PAIR] * len(names)
    else:
        settings = with_run_data(models, settings.dataset, settings, report)
        sets = [choose_dataset(model, settings.dataset, settings, report) for model in models[: len(names)]]
    _check_sets(models, sets, settings)
    context = make_context(settings.device, settings.precision)
    splits = {name: pair or load_splits(name, settings, report) for name in dict.fromkeys(sets)}

    def embedded(model: Embedder, name: str) -> _Embedded:
        sets = model.embed(splits[name], reading_as_trained(model, settings, context.device), context, report)
        if not isinstance(model, NetworkEmbedder):
            return _Embedded(model, 0, None, sets)
        network, space = model.network.cpu(), model.teacher_space
        milliseconds = time_image(network, model.header.image_size)
        model.close()
        return _Embedded(model, network.parameter_count(), milliseconds, sets, space)

    gallery = None
    if settings.gallery:
        gallery = embedded(models.pop(), sets[0])
        if gallery.model.path not in {model.path for model in models}:
            models.append(gallery.model)
            sets.append(sets[0])
    evaluations, hits = list[Evaluation](), list[_Hits]()
    for model, name in zip(models, sets, strict=True):
        of_gallery = gallery and model.path == gallery.model.path
        own = replace(gallery, model=model) if gallery and of_gallery else embedded(model, name)
        evaluation = _evaluate(own, None if of_gallery else gallery, name, settings, report)
        if settings.bootstrap:
            hits.append(_hits(own))
        note_untrained(model, report)
        for note in _recall_notes(model, evaluation):
            report(Note(note))
        if evaluation.seen:
            report(Note(seen_note(model.name, evaluation.seen, "eval")))
        evaluations.append(evaluation)
    against = {other.name: _interval(hits[0], other, settings) for other in hits[1:]}
    return [replace(evaluations[0], against=against), *evaluations[1:]]


def _check_sets(models: Sequence[Embedder], sets: Sequence[str], settings: EvaluateSettings) -> None:
    if "images" in sets:
        name = models[sets.index("images")].name
        raise SettingsError(f"{name}: Recall@K needs classes, which photos do not have. Choose another --dataset.")
    if settings.bootstrap and len(models) < 2:
        raise SettingsError(f"--bootstrap {settings.bootstrap}: compares models. Name another, or omit the flag.")
    if (settings.gallery or settings.bootstrap) and len(set(sets)) > 1:
        flag, differing = "--gallery" if settings.gallery else "--bootstrap", " and ".join(dict.fromkeys(sets))
        raise SettingsError(f"{flag}: the models were trained on {differing}. Choose one with --dataset.")


def _hits(embedded: _Embedded) -> _Hits:
    found = embedded.sets[_WORKS[1]]
    if found.images.protocol:
        raise SettingsError("--bootstrap: is for images that are all queries. These have roles or cameras. Omit it.")
    hits, queries = hits_at_k(found.embeddings, found.labels, (1,), ranks())
    return _Hits(embedded.model.name, list(found.images.paths), hits[queries, 0], found.labels[queries])


def _interval(first: _Hits, other: _Hits, settings: EvaluateSettings) -> Interval:
    if first.paths != other.paths:
        raise DataError(f"--bootstrap: {first.name} and {other.name} do not have embeddings of the same images.")
    if (first.labels == first.labels[:1]).all():
        raise DataError("--bootstrap: resamples classes, and there are queries of less than two. Omit the flag.")
    return paired_bootstrap(first.hits, other.hits, first.labels, settings.bootstrap, settings.bootstrap_seed)


def with_run_data(models: Sequence[Embedder], dataset: str | None, settings: _Settings, report: Reporter) -> _Settings:
    """Without ``--data``, the settings with the image folder that the models' runs used.

    The folder comes from ``settings.json`` in the run directory: a checkpoint contains no paths. ``dataset`` is that
    of the command; None or auto: each model's own. Raises a SettingsError if runs used different folders.
    """
    if "data" in settings.model_fields_set:
        return settings
    found: dict[Path, str] = {}
    dataset = None if dataset == "auto" else dataset
    for model in models:
        run = Path(model.path).with_name("settings.json")
        if not model.is_checkpoint or not run.is_file():
            continue
        with suppress(SettingsError):  # without readable settings, --data has its default
            saved = read_config(run)
            data = saved.get("data")
            if isinstance(data, str) and saved.get("dataset") == (dataset or trained_dataset(model)):
                found[Path(data)] = model.name
    existing = {data: name for data, name in found.items() if data.exists() or is_packed(data)}
    if len(existing) > 1:
        which = " and ".join(f"{name} used {data}" for data, name in existing.items())
        raise SettingsError(f"--data: {which}. Name one folder.")
    for data in existing:
        if data != settings.data:
            report(Note(f"--data {data}, as in the run of {existing[data]}"))
        return settings.model_copy(update={"data": data})
    return settings


def choose_dataset(model: Embedder, dataset: str | None, settings: ImageSettings, report: Reporter) -> str:
    """The data set to measure a model on.

    ``dataset`` is that of the command. None: the model's own, unless ``--data`` contains another. auto: the one in
    ``--data``. Raises a SettingsError if none is known, and a DataError if ``--data`` contains none.
    """
    if dataset not in (None, "auto"):
        return str(dataset)
    has_own = model.header is not None and model.is_checkpoint and model.header.dataset != ""
    if dataset is None and (has_own or "data" not in settings.model_fields_set):
        own = trained_dataset(model)
        exists = settings.data.exists() or is_packed(settings.data)
        if "data" not in settings.model_fields_set or not exists or may_hold(own, settings.data):
            return own
    return find_dataset(settings.data, report)


def trained_dataset(model: Embedder) -> str:
    """The data set that a checkpoint was trained on; a SettingsError if it is not known."""
    if model.header is None or not model.is_checkpoint:
        raise SettingsError(f"{model.name}: does not say which data set to use. Choose one with --dataset.")
    if model.header.dataset not in get_args(Dataset):
        raise SettingsError(
            f"{model.name}: was trained on {model.header.dataset!r}, an unknown data set. Choose one with --dataset."
        )
    return model.header.dataset


def _check(models: Sequence[Embedder], settings: EvaluateSettings) -> None:
    """Raise a SettingsError if flags contradict a model."""
    check_used(models, settings)
    if settings.query and "data" in settings.model_fields_set and not any(model.vectors for model in models):
        raise SettingsError("--data: has no effect with --query, unless a vectors file is measured. Omit one of them.")
    # with other models, the flag is for them: a checkpoint stores its own value
    unit = settings.l2normalize if all(model.is_checkpoint for model in models) else None
    for model in models:
        if model.header:
            agree(Path(model.path), model.header, settings.base, settings.embedding_size, unit)
        elif settings.base or settings.embedding_size not in (None, model.size):
            flag = f"--base {settings.base}" if settings.base else f"--embedding-size {settings.embedding_size}"
            raise SettingsError(f"{flag}: {model.name} has {model.size}-d embeddings. Omit the flag.")
        if settings.dims and settings.dims[-1] > model.size:
            raise SettingsError(f"--dims {settings.dims[-1]}: {model.name} has {model.size} dimensions. Use fewer.")
        if settings.gallery and model.vectors and model.vectors.kind == "binary":
            raise SettingsError(
                f"--gallery: {model.name} has binary embeddings, which cannot be compared with floats. Omit --gallery."
            )
        if settings.gallery and model.size != models[-1].size and not _is_projected(model, models[-1].size):
            raise SettingsError(
                f"--gallery {settings.gallery}: has {models[-1].size} dimensions, but {model.name} has {model.size}. "
                "Choose models of the same space."
            )


def _is_projected(model: Embedder, size: int) -> bool:
    """Whether a checkpoint has a projection of its whole embeddings to ``size`` dimensions."""
    header = model.header
    return header is not None and header.teacher_size == size and model.size in header.projections


def _pair(settings: EvaluateSettings, report: Reporter) -> tuple[dict[str, ImageSet], EvaluateSettings]:
    """The images of ``--query`` and ``--gallery`` by the work, empty without --query, and settings without them."""
    gallery = Path(settings.gallery or "")
    if settings.query is None:
        if settings.gallery and (is_list(gallery) or gallery.is_dir()) and not _is_model(gallery):
            raise SettingsError(f"--gallery {gallery}: holds images, not embeddings. Add --query, or name a model.")
        return {}, settings
    images = replace(load_pair(settings.query, gallery, report), name="eval").decoded(settings.max_pixels)
    if settings.skip_damaged:
        (images,) = without_damaged([images], settings.workers, report)
    report(Note(f"{settings.query}, {gallery}: {split_text(images.facts)}"))
    return {_WORKS[1]: images}, settings.model_copy(update={"gallery": None})


def _is_model(path: Path) -> bool:
    """Whether a folder or file is a run directory or a vectors file."""
    return (path / "best.safetensors").is_file() or (path.is_file() and is_vectors(path))


def load_splits(name: str, settings: EvaluateSettings, report: Reporter) -> dict[str, ImageSet]:
    splits: Sequence[ImageSet] = load_dataset(name, settings.data, report)
    if settings.skip_damaged:
        splits = without_damaged([images.decoded(settings.max_pixels) for images in splits], settings.workers, report)
    return dict(zip(_WORKS, splits, strict=True))


def _evaluate(
    embedded: _Embedded, gallery: _Embedded | None, dataset: str, settings: EvaluateSettings, report: Reporter
) -> Evaluation:
    model = embedded.model
    train, evaluation = (embedded.sets.get(work) for work in _WORKS)
    if evaluation is None:
        raise DataError(f"{model.name}: has no embedding of the eval images. Name a file that has them.")
    ks, sizes = settings.recall, (model.size, *(size for size in settings.dims if size != model.size))
    rows = _rows(model, evaluation.embeddings)
    finer = [one for one in settings.vectors if stored_as(one, rows.kind) != one]
    if finer and "vectors" in settings.model_fields_set:
        report(Note(f"{model.name}: stores {rows.kind} vectors, so --vectors {','.join(finer)} is not measured"))
    measured = evaluation.labels, evaluation.images.protocol
    variants = [*measure_variants(rows, rows, None, measured, sizes, settings.vectors, ks)]
    if gallery:
        queries, others, measured = _common_rows(model, evaluation, gallery)
        name, space = gallery.model.name, _space_of(embedded, gallery)
        if space:
            queries, others = _in_space(space, queries, others, model, settings, report)
        variants += measure_variants(queries, others, name, measured, sizes, settings.vectors, ks, space)
    has_folder = model.is_checkpoint and dataset not in (_PAIR, "packed")
    return Evaluation(
        name=model.name,
        header=model.header,
        size=model.size,
        l2normalize=model.unit,
        dataset=dataset,
        parameters=embedded.parameters,
        file_bytes=bytes_of(Path(model.path)) if embedded.milliseconds and model.is_checkpoint else None,
        milliseconds=embedded.milliseconds,
        threads=torch.get_num_threads(),
        train=_metrics(train, ks) if train else None,
        eval=_metrics(evaluation, ks),
        seen=tuple(overlap(model.header.seen_classes, evaluation.images)) if model.header else (),
        variants=tuple(variants),
        search=_search(evaluation.images, dataset, settings) if has_folder else {},
        vectors=rows.kind,
    )


def _rows(model: Embedder, embeddings: Tensor) -> Rows:
    return Rows(embeddings, model.unit, kind_of(model))


def _recall_notes(model: Embedder, evaluation: Evaluation) -> list[str]:
    """``recall_notes`` of a checkpoint on the data set and with the preprocessing of its run."""
    header = model.header
    if not header or not model.is_checkpoint or is_exported(Path(model.path)) or header.dataset != evaluation.dataset:
        return []
    if model.made_by != model.digest:  # other preprocessing
        return []
    return recall_notes(model.name, evaluation.eval.recall, header.eval_recall)


def recall_notes(name: str, now: Mapping[int, float], then: Mapping[int, float]) -> list[str]:
    """A note if recalls, in percent with two decimals, differ from those of the model's run."""
    changed = [k for k in sorted(now.keys() & then.keys()) if f"{100 * now[k]:.2f}" != f"{100 * then[k]:.2f}"]
    if not changed:
        return []
    k = changed[0]
    why = "the images or the way to embed them changed"
    if max(abs(now[k] - then[k]) for k in changed) <= _ROUNDING:
        why = "the order of nearly equal distances depends on the machine, its threads, the precision and the batch"
    return [f"{name}: Recall@{k} is {100 * now[k]:.2f} here and was {100 * then[k]:.2f} in its run: {why}"]


def _search(images: ImageSet, dataset: str, settings: EvaluateSettings) -> dict[str, object]:
    """Flags for ``rkd search`` with the first image as the query."""
    folders = image_folders(dataset, settings.data) or (Path(os.path.commonpath(images.paths)),)
    found = {"gallery": folders[-1], "query": images.paths[0]}
    return found | ({"skip_damaged": True} if settings.skip_damaged else {})


def _metrics(embedded: Embedded, ks: Sequence[int]) -> SplitMetrics:
    embeddings, labels, protocol = embedded.embeddings, embedded.labels, embedded.images.protocol
    if protocol:
        found = protocol_metrics(embeddings, embeddings, labels, protocol, ks, ranks())
        recall, r_precision, map_r, mean_ap, minp, lost = found
        counts = len(protocol.queries), len(protocol.gallery)
        return SplitMetrics(recall, r_precision, map_r, len(labels), lost, mean_ap, minp, *counts)
    return SplitMetrics(
        recall_at_k(embeddings, labels, ks, ranks()),
        *at_r(embeddings, labels, ranks()),
        len(labels),
        without_positive(labels),
    )


def _space_of(embedded: _Embedded, gallery: _Embedded) -> TeacherSpace | None:
    """The teacher's space, if the gallery can be in it."""
    space, model = embedded.space, embedded.model
    own = gallery.model.vectors and gallery.model.vectors.model == model.digest  # the model's own embeddings
    return None if own or not space or space.size != gallery.model.size else space


def _in_space(
    space: TeacherSpace, queries: Rows, gallery: Rows, model: Embedder, settings: EvaluateSettings, report: Reporter
) -> tuple[Rows, Rows]:
    """Queries and gallery, scaled for comparison in the teacher's space. Queries are not projected here."""
    if space.unit and not is_unit(gallery.embeddings):
        report(Note(f"--gallery {settings.gallery}: compared at unit length, as in the training of {model.name}"))
    if _is_projected(model, space.size):
        report(Note(f"{model.name}: its queries are projected to the {space.size} dimensions of --gallery"))
        if lost := [str(size) for size in settings.dims if size not in space.projections]:
            report(Note(f"--dims {','.join(lost)}: {model.name} has no projection of them. --gallery is not searched."))
    if model.size not in space.projections:
        queries = replace(queries, embeddings=space.scale(queries.embeddings), unit=queries.unit or space.unit)
    scaled = space.scale(gallery.embeddings)
    return queries, replace(gallery, embeddings=scaled, unit=gallery.unit or space.unit)


def _common_rows(
    model: Embedder, evaluation: Embedded, gallery: _Embedded
) -> tuple[Rows, Rows, tuple[Tensor, Protocol | None]]:
    """Rows of the images that both have, in the same order, and their labels and protocol."""
    other = gallery.sets.get(_WORKS[1])
    row = {path: index for index, path in enumerate(other.images.paths)} if other else {}
    pairs = [(index, row[path]) for index, path in enumerate(evaluation.images.paths) if path in row]
    if not other or not pairs:
        raise DataError(f"--gallery {gallery.model.name}: has no eval image in common with {model.name}.")
    queries, rows = torch.tensor(pairs, device=evaluation.labels.device).unbind(dim=1)
    return (
        _rows(model, evaluation.embeddings[queries]),
        _rows(gallery.model, other.embeddings[rows]),
        (evaluation.labels[queries], evaluation.images.rows(queries.tolist()).protocol),
    )
