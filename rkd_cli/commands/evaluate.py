"""What ``rkd evaluate`` measures of networks and of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, get_args

import torch
from torch import Tensor

from rkd_cli.commands.options import check_used, check_weights, note_untrained, open_named, reading_as_trained
from rkd_cli.commands.variants import Rows, Variant, measure_variants
from rkd_cli.config.resolve import agree, read_config
from rkd_cli.data import ImageSet, find_dataset, load_dataset
from rkd_cli.data.found import image_folders, may_hold
from rkd_cli.data.loader import without_damaged
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.embedding.embedder import Embedded, Embedder, NetworkEmbedder
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Reporter
from rkd_cli.geometry import is_unit
from rkd_cli.metrics import at_r, recall_at_k, without_positive
from rkd_cli.models.cost import time_image
from rkd_cli.models.embedding_net import TeacherSpace
from rkd_cli.models.exported import is_exported
from rkd_cli.runtime.context import make_context
from rkd_cli.runtime.distributed import ranks
from rkd_cli.schemas import Header
from rkd_cli.settings import Dataset, EvaluateSettings, ImageSettings

_Settings = TypeVar("_Settings", bound=ImageSettings)
_APART = 0.005  # of a recall: more than what rounding makes
_WORKS = ("Evaluating training classes", "Evaluating unseen classes")


@dataclass(frozen=True)
class SplitMetrics:
    """The metrics of one split, as fractions."""

    recall: dict[int, float]
    r_precision: float
    map_at_r: float
    images: int
    without_positive: int  # queries that every metric leaves out


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one network or file. ``eval`` is of unseen classes, but for those of ``seen``."""

    name: str
    header: Header | None  # None: of embeddings in a file
    size: int
    l2normalize: bool
    dataset: str
    parameters: int
    file_bytes: int | None  # None: of embeddings, or of a network that is no file
    milliseconds: float | None = field(compare=False)  # of one image on the CPU; None: of embeddings
    threads: int  # that this took
    train: SplitMetrics | None  # None: a file without an embedding of these images
    eval: SplitMetrics
    seen: tuple[str, ...] = ()  # evaluation classes that the network was trained on
    variants: tuple[Variant, ...] = ()
    search: dict[str, object] = field(default_factory=dict, compare=False)  # flags of a search among these images


@dataclass(frozen=True)
class _Embedded:
    """A model with its embeddings of both splits, as far as it has them."""

    model: Embedder
    parameters: int
    milliseconds: float | None
    sets: dict[str, Embedded]
    space: TeacherSpace | None = None


def evaluate_models(names: Sequence[str], settings: EvaluateSettings, report: Reporter) -> list[Evaluation]:
    """Recall@K, R-Precision and MAP@R on both splits of a data set, and what smaller vectors or a gallery give.

    Args:
        names: of checkpoints, run directories, pretrained networks, or files of embeddings.
        settings: what is asked for.
        report: is told how far it is.
    Returns:
        One for each name, and one for the gallery's network unless it is among them.
    Raises:
        RkdError: something cannot be had, or flags that contradict it or each other.
    """
    asked = [*names, *([settings.gallery] if settings.gallery else [])]
    check_weights(asked, settings)
    with ranks().first():  # which fetches what is not here
        models: list[Embedder] = [open_named(name, settings, report) for name in asked]
    _check(models, settings)  # before the first minute, not after it
    settings = with_data_of_runs(models, settings.dataset, settings, report)
    sets = [set_of(model, settings.dataset, settings, report) for model in models[: len(names)]]
    if "images" in sets:
        name = models[sets.index("images")].name
        raise SettingsError(f"{name}: Recall@K needs classes, and photos have none: name a set with --dataset")
    if settings.gallery and len(set(sets)) > 1:
        raise SettingsError(f"--gallery: these were trained on {' and '.join(dict.fromkeys(sets))}: name one --dataset")
    context = make_context(settings.device, settings.precision)
    splits = {name: _load(name, settings, report) for name in dict.fromkeys(sets)}

    def embedded(model: Embedder, name: str) -> _Embedded:
        sets = model.embed(splits[name], reading_as_trained(model, settings, context.device), context, report)
        if not isinstance(model, NetworkEmbedder):
            return _Embedded(model, 0, None, sets)
        network, space = model.network.cpu(), model.teacher_space
        milliseconds = time_image(network, model.header.image_size)  # half a second
        model.close()
        return _Embedded(model, network.parameter_count(), milliseconds, sets, space)

    gallery = None
    if settings.gallery:
        gallery = embedded(models.pop(), sets[0])
        if gallery.model.path not in {model.path for model in models}:
            models.append(gallery.model)
            sets.append(sets[0])
    evaluations = []
    for model, name in zip(models, sets, strict=True):
        if gallery and model.path == gallery.model.path:
            evaluation = _evaluate(replace(gallery, model=model), None, name, settings, report)
        else:
            evaluation = _evaluate(embedded(model, name), gallery, name, settings, report)
        note_untrained(model, report)
        for note in _recall_notes(model, evaluation):
            report(Note(note))
        if evaluation.seen:
            report(Note(seen_note(model.name, evaluation.seen, "eval")))
        evaluations.append(evaluation)
    return evaluations


def with_data_of_runs(
    models: Sequence[Embedder], dataset: str | None, settings: _Settings, report: Reporter
) -> _Settings:
    """The settings, where nobody has said so with the folder that the runs of the models had their images in.

    A checkpoint keeps no path: that is of one machine, and stands in the run's directory alone.

    Args:
        models: what embeds.
        dataset: that is asked for; None or auto: each model's own.
        settings: of the command.
        report: is told which folder it is.
    Raises:
        SettingsError: they had them in different ones.
    """
    if "data" in settings.model_fields_set:
        return settings
    found: dict[Path, str] = {}
    dataset = None if dataset == "auto" else dataset
    for model in models:
        run = Path(model.path).with_name("settings.json")
        if not model.is_checkpoint or not run.is_file():
            continue
        with suppress(SettingsError):  # a damaged one is no reason to measure nothing
            saved = read_config(run)
            data = saved.get("data")
            if isinstance(data, str) and saved.get("dataset") == (dataset or own_set(model)):
                found[Path(data)] = model.name
    there = {data: name for data, name in found.items() if data.exists()}
    if len(there) > 1:
        which = " and ".join(f"{name} in {data}" for data, name in there.items())
        raise SettingsError(f"--data: the images of {which}: name one folder")
    for data in there:
        if data != settings.data:
            report(Note(f"--data {data}, as in the run of {there[data]}"))
        return settings.model_copy(update={"data": data})
    return settings


def set_of(model: Embedder, dataset: str | None, settings: ImageSettings, report: Reporter) -> str:
    """The data set that a model is measured on.

    Args:
        model: what embeds.
        dataset: that is asked for; None: the model's own, unless ``--data`` was given and holds another; auto: what
            ``--data`` holds.
        settings: of the command.
        report: is told what was found.
    Raises:
        SettingsError: nobody says.
        DataError: the folder holds no data set.
    """
    if dataset not in (None, "auto"):
        return str(dataset)
    of_model = model.header is not None and model.is_checkpoint and model.header.dataset != ""
    if dataset is None and (of_model or "data" not in settings.model_fields_set):
        own = own_set(model)
        if "data" not in settings.model_fields_set or not settings.data.exists() or may_hold(own, settings.data):
            return own
    return find_dataset(settings.data, report)


def own_set(model: Embedder) -> str:
    """The data set that a model was trained on.

    Raises:
        SettingsError: it does not say, or the set is unknown here.
    """
    if model.header is None or not model.is_checkpoint:
        raise SettingsError(f"{model.name}: was trained on no data set known here: name one with --dataset")
    if model.header.dataset not in get_args(Dataset):
        raise SettingsError(
            f"{model.name}: was trained on {model.header.dataset}, unknown here: name a set with --dataset"
        )
    return model.header.dataset


def _check(models: Sequence[Embedder], settings: EvaluateSettings) -> None:
    """Compare flags with what each model is.

    Raises:
        SettingsError: they contradict.
    """
    check_used(models, settings)
    # beside a checkpoint, which says itself, it is meant for the others
    unit = settings.l2normalize if all(model.is_checkpoint for model in models) else None
    for model in models:
        if model.header:
            agree(Path(model.path), model.header, settings.base, settings.embedding_size, unit)
        elif settings.base or settings.embedding_size not in (None, model.size):
            flag = f"--base {settings.base}" if settings.base else f"--embedding-size {settings.embedding_size}"
            raise SettingsError(f"{flag}: {model.name} holds {model.size}-d embeddings. Omit the flag.")
        if settings.dims and settings.dims[-1] > model.size:
            raise SettingsError(f"--dims {settings.dims[-1]}: {model.name} has {model.size} dimensions: name fewer")
        if settings.gallery and model.vectors and model.vectors.kind == "binary":
            raise SettingsError(
                f"--gallery: {model.name} holds signs alone, which floats are not compared with: leave --gallery out"
            )
        if settings.gallery and model.size != models[-1].size and not _is_projected(model, models[-1].size):
            raise SettingsError(
                f"--gallery {settings.gallery}: has {models[-1].size} dimensions and {model.name} has {model.size}: "
                "both have to be of one space"
            )


def _is_projected(model: Embedder, size: int) -> bool:
    """Whether a file holds the projection of its whole embeddings into a space of ``size`` dimensions."""
    header = model.header
    return header is not None and header.teacher_size == size and model.size in header.projections


def _load(name: str, settings: EvaluateSettings, report: Reporter) -> dict[str, ImageSet]:
    splits = load_dataset(name, settings.data, report)
    if settings.skip_damaged:
        train, evaluation = (images.decoded(settings.max_pixels) for images in splits)
        splits = without_damaged((train, evaluation), settings.workers, report)
    return dict(zip(_WORKS, splits, strict=True))


def _evaluate(
    embedded: _Embedded, gallery: _Embedded | None, dataset: str, settings: EvaluateSettings, report: Reporter
) -> Evaluation:
    model = embedded.model
    train, unseen = (embedded.sets.get(work) for work in _WORKS)
    if unseen is None:
        raise DataError(f"{model.name}: has no embedding of an unseen image, and those are what is measured")
    ks, sizes = settings.recall, settings.dims or (model.size,)
    rows = Rows(unseen.embeddings, model.unit)
    variants = [*measure_variants(rows, rows, None, unseen.labels, sizes, settings.vectors, ks)]
    if gallery:
        queries, others, labels = _paired(model, unseen, gallery)
        name, space = gallery.model.name, _space_of(embedded, gallery)
        if space:
            queries, others = _in_space(space, queries, others, model, settings, report)
        variants += measure_variants(queries, others, name, labels, sizes, settings.vectors, ks, space)
    return Evaluation(
        name=model.name,
        header=model.header,
        size=model.size,
        l2normalize=model.unit,
        dataset=dataset,
        parameters=embedded.parameters,
        file_bytes=Path(model.path).stat().st_size if embedded.milliseconds and model.is_checkpoint else None,
        milliseconds=embedded.milliseconds,
        threads=torch.get_num_threads(),
        train=_metrics(train, ks) if train else None,
        eval=_metrics(unseen, ks),
        seen=tuple(overlap(model.header.seen_classes, unseen.images)) if model.header else (),
        variants=tuple(variants),
        search=_search(unseen.images, dataset, settings) if model.is_checkpoint else {},
    )


def _recall_notes(model: Embedder, evaluation: Evaluation) -> list[str]:
    """Of a checkpoint that was measured as in its run."""
    header = model.header
    if not header or not model.is_checkpoint or is_exported(Path(model.path)) or header.dataset != evaluation.dataset:
        return []
    if model.made_by != model.digest:  # it was given other images
        return []
    return recall_notes(model.name, evaluation.eval.recall, header.eval_recall)


def recall_notes(name: str, now: Mapping[int, float], then: Mapping[int, float]) -> list[str]:
    """That a model's recalls, in percent with two decimals, are not those of its run, and why."""
    changed = [k for k in sorted(now.keys() & then.keys()) if f"{100 * now[k]:.2f}" != f"{100 * then[k]:.2f}"]
    if not changed:
        return []
    k = changed[0]
    why = "the images are others, or embedded otherwise"
    if max(abs(now[k] - then[k]) for k in changed) <= _APART:
        why = "neighbors at nearly equal distances change places with the machine, its threads, precision or batch"
    return [f"{name}: Recall@{k} is {100 * now[k]:.2f} here and was {100 * then[k]:.2f} in its run: {why}"]


def _search(unseen: ImageSet, dataset: str, settings: EvaluateSettings) -> dict[str, object]:
    """Flags of ``rkd search`` for the first of the images."""
    folders = image_folders(dataset, settings.data) or (unseen.paths[0].parent,)
    found = {"gallery": folders[-1], "query": unseen.paths[0]}
    return found | ({"skip_damaged": True} if settings.skip_damaged else {})


def _metrics(embedded: Embedded, ks: Sequence[int]) -> SplitMetrics:
    embeddings, labels = embedded.embeddings, embedded.labels
    return SplitMetrics(
        recall_at_k(embeddings, labels, ks, ranks()),
        *at_r(embeddings, labels, ranks()),
        len(labels),
        without_positive(labels),
    )


def _space_of(embedded: _Embedded, gallery: _Embedded) -> TeacherSpace | None:
    """The teacher's space, where a gallery can be of it."""
    space, model = embedded.space, embedded.model
    own = gallery.model.vectors and gallery.model.vectors.model == model.digest  # its own, in a file
    return None if own or not space or space.size != gallery.model.size else space


def _in_space(
    space: TeacherSpace, queries: Rows, gallery: Rows, model: Embedder, settings: EvaluateSettings, report: Reporter
) -> tuple[Rows, Rows]:
    """Both as they are compared in the teacher's space, but for a projection of the queries."""
    if space.unit and not is_unit(gallery.embeddings):
        report(Note(f"--gallery {settings.gallery}: compared at unit length, as {model.name} learned it"))
    if _is_projected(model, space.size):
        report(Note(f"{model.name}: its queries are projected to the {space.size} dimensions of --gallery"))
        if lost := [str(size) for size in settings.dims if size not in space.projections]:
            report(Note(f"--dims {','.join(lost)}: {model.name} has no projection of them, so they query no --gallery"))
    if model.size not in space.projections:
        queries = Rows(space.scale(queries.embeddings), queries.unit or space.unit)
    return queries, Rows(space.scale(gallery.embeddings), gallery.unit or space.unit)


def _paired(model: Embedder, unseen: Embedded, gallery: _Embedded) -> tuple[Rows, Rows, Tensor]:
    """Queries and gallery, row by row of the same image, and the labels.

    Raises:
        DataError: they have no image in common.
    """
    other = gallery.sets.get(_WORKS[1])
    row = {path: index for index, path in enumerate(other.images.paths)} if other else {}
    pairs = [(index, row[path]) for index, path in enumerate(unseen.images.paths) if path in row]
    if not other or not pairs:
        raise DataError(f"--gallery {gallery.model.name}: has no embedding of an unseen image that {model.name} has")
    mine, its = torch.tensor(pairs, device=unseen.labels.device).unbind(dim=1)
    queries = Rows(unseen.embeddings[mine], model.unit)
    return queries, Rows(other.embeddings[its], gallery.model.unit), unseen.labels[mine]
