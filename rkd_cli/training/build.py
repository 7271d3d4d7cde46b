"""From settings to networks, losses and optimizers: beside ``place.py`` all of a training that knows settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rkd_cli.config.recipes import recipe_settings, student_recipe
from rkd_cli.config.resolve import agree
from rkd_cli.data import ImageSet
from rkd_cli.data.augment import Augmentation
from rkd_cli.data.cache import default_cache_folder, make_cache
from rkd_cli.data.decode import random_crops, resized_crops
from rkd_cli.data.loader import (
    Batch,
    DrawCrops,
    EvalLoader,
    KeptViews,
    PixelReader,
    TrainLoader,
    pick_reader,
)
from rkd_cli.data.sets.demo import FOLDER
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.embedding.batches import evaluation_batch
from rkd_cli.embedding.embedder import Embedder, open_embedder
from rkd_cli.embedding.store import cached_rows
from rkd_cli.embedding.views import VectorReader, ViewCache
from rkd_cli.errors import CheckpointError, SettingsError, first_line
from rkd_cli.events import NetworkFacts, Note, ObjectiveFacts, Reporter, RunStarted, SplitFacts, silent
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import read_header, untrained_notes
from rkd_cli.models.embedding_net import Head, expose_stages, freeze, freeze_statistics, header_of, to_device
from rkd_cli.models.sources import Network, digest_of, is_pretrained, located
from rkd_cli.models.sync_norm import synchronize
from rkd_cli.runtime.context import Context, device_name, naming_memory
from rkd_cli.runtime.distributed import ranks
from rkd_cli.schemas import Header, fit_of
from rkd_cli.settings import DistillSettings, TeacherSettings, flag_name
from rkd_cli.training.dry_run import DryRun, Samples, measure
from rkd_cli.training.loop import Run, learner
from rkd_cli.training.objective import STAGES, View, objectives, teacher_loss, teacher_space
from rkd_cli.training.place import Place, prepare, readable
from rkd_cli.training.schedule import Rate, cosine_rate, step_rate, warmed_up
from rkd_cli.training.step import DistillStep, TeacherStep, views
from rkd_cli.training.teachers import (
    KeptTeacher,
    LiveTeacher,
    Teacher,
    join_vectors,
)

_LENGTHS_OPEN = (
    "--no-l2normalize: for {} only directions count, and lengths stay open; but figures are by Euclidean distance, as "
    "in `rkd search`: --l2normalize compares by cosine"
)
_FEATURES_AT_ONCE = 4096
_AS_LARGE = 0.9  # of a teacher: a student of so much is not small
_SMALLER, _NEEDS_SMALLER = "mobilenet_v3_small", range(2_000_000, 12_500_000)  # parameters of such a teacher
_USUAL_SIDE = 224  # pixels; what every network of ImageNet takes
_TrainSettings = TypeVar("_TrainSettings", TeacherSettings, DistillSettings)


def build_run(settings: TeacherSettings | DistillSettings, report: Reporter, samples: Samples | None = None) -> Run:
    """``build_teacher_run`` or ``build_distill_run``, as the settings are."""
    if isinstance(settings, TeacherSettings):
        return build_teacher_run(settings, report, samples)
    return build_distill_run(settings, report, samples)


def build_teacher_run(settings: TeacherSettings, report: Reporter, samples: Samples | None = None) -> Run:
    """Everything that ``rkd train-teacher`` needs before its first batch.

    Args:
        settings: of the run.
        report: told what a user should know.
        samples: for a dry run, what is made in place of files.
    Raises:
        RkdError: whatever of it cannot be had.
    """
    if settings.loss not in ("l2_triplet", "l1_triplet", "contrastive") and not settings.l2normalize:
        report(Note(_LENGTHS_OPEN.format(settings.loss)))
    settings, place = prepare("train-teacher", settings, {}, report, samples)
    model = _learning(_new_model(settings, place, report), settings, place.context, report)
    settings, place = readable(settings, place, report)
    place.context.seed_torch("proxies")
    loss = teacher_loss(settings, len(place.splits["train"].classes))
    if settings.freeze_base:
        model.base.requires_grad_(False)
    begun = _begin(settings, place, model, nn.ModuleList([loss]), report, settings.proxy_lr_ratio)
    learns: nn.Module = model
    batches = _pixel_batches(settings, place, begun.reader, _crops(settings))
    if settings.freeze_base:
        learns, batches = Head(model), _feature_batches(settings, place, begun, report)
    step = TeacherStep(learns, settings.loss, loss, place.context, settings.chunk)
    facts = ObjectiveFacts({settings.loss: 1.0})
    sample = settings.sample if settings.loss in ("l2_triplet", "l1_triplet", "contrastive") else None
    return _run(settings, place, begun, batches, learns, step, [facts], sample)


def build_distill_run(settings: DistillSettings, report: Reporter, samples: Samples | None = None) -> Run:
    """Everything that ``rkd distill`` needs before its first batch.

    Args:
        settings, report, samples: as ``build_teacher_run``.
    Raises:
        RkdError: whatever of it cannot be had.
    """
    source = open_embedder(
        located(settings.teacher), settings.teacher_weights, image_size=settings.image_size, report=report
    )
    if source.vectors and source.vectors.kind == "binary":
        raise SettingsError(
            f"--teacher {source.name}: holds signs alone, which teach no distances: name floats or int8"
        )
    settings = _with_unit_student(settings, report)
    settings, place = prepare("distill", settings, {"teacher": source.digest}, report, samples, source.vectors)
    for note in _teacher_notes(settings, source, place):
        report(Note(note))
    facts, student = _teacher_facts(source), _new_model(settings, place, report)
    if note := _size_note(settings, student, facts):
        report(Note(note))
    if isinstance(source.network, EmbeddingNet):
        freeze(source.network)
    _expose_stages(settings, source, student)
    teacher = _teacher(settings, source, place, report)
    if settings.teacher_views and source.vectors:
        report(Note(f"--teacher-views {settings.teacher_views}: has no effect, {source.name} holds embeddings"))
    if settings.mixup and isinstance(teacher, KeptTeacher):
        raise SettingsError(f"--mixup: {source.name} holds embeddings, of no blends: name a network as --teacher")
    student = _learning(student, settings, place.context, report)
    learned, taught = _first_views(settings, student, teacher, place.context)
    place.context.seed_torch("hints")
    stages = objectives(settings, learned, taught, place.context.device, place.context.ranks)
    losses = nn.ModuleList(stage.losses for stage in stages)
    student.teacher_space = teacher_space(settings, stages[-1], taught.embeddings.shape[1])
    settings, place = readable(settings, place, report)
    if source.vectors and settings.skip_damaged:
        teacher = join_vectors(source.vectors, place.splits, settings.data, place.context, teacher.unit)
    begun = _begin(settings, place, student, losses, report)
    draw = _crops(settings)
    if settings.teacher_views and isinstance(teacher, LiveTeacher):
        network, views = teacher.network, _views(settings, place, settings.teacher_views)
        keeper = _keeper(settings, place, begun.reader, network, network.embedding_size, source.digest, report)
        dtype = torch.float16 if settings.views_precision == "fp16" else torch.float32
        what = "Computing the teacher's views"
        kept, draw = keeper.views(place.splits["train"], views, dtype, what), views.draw
        center = {name: keeper.center(images, what) for name, images in place.splits.items()}
        teacher = KeptTeacher(kept, center, place.context, teacher.unit)
    step = DistillStep(student, teacher, stages, settings.hint_epochs, place.context, settings.chunk)
    epochs = [settings.hint_epochs, None][-len(stages) :]
    terms = [ObjectiveFacts(stage.ratios, count) for stage, count in zip(stages, epochs, strict=True)]
    sample = settings.triplet_sample if settings.triplet_ratio else None
    batches = _pixel_batches(settings, place, begun.reader, draw)
    return _run(settings, place, begun, batches, student, step, terms, sample, (teacher, facts))


def dry_run(every: Sequence[TeacherSettings | DistillSettings], report: Reporter) -> DryRun:
    """What trainings would be and take; nothing is written, the first is tried for some steps.

    Args:
        every: settings of runs that differ by their seeds and directories alone.
        report: told what a user should know.
    Raises:
        RkdError: whatever the runs would be refused for.
    """
    samples, first = Samples(), every[0]
    absent = first.dataset == "demo" and not (first.data / FOLDER).exists()
    with TemporaryDirectory() if absent else nullcontext(first.data) as data:
        first, *rest = (settings.model_copy(update={"data": Path(data)}) for settings in every)
        with ranks().first():
            others = [build_run(settings, silent, samples).directory for settings in rest]
            run = build_run(first, report, samples)
        weights = "of the run" if run.directory.resumed else str(first.load or first.weights)
        return measure(run, [run.directory, *others], samples, weights, report)


@dataclass(frozen=True)
class _Begun:
    """What learns, taken to where its run stood, and the pixels it learns from."""

    model: EmbeddingNet
    losses: nn.Module
    optimizer: torch.optim.Optimizer
    reader: PixelReader


def _begin(
    settings: TeacherSettings | DistillSettings,
    place: Place,
    model: EmbeddingNet,
    losses: nn.Module,
    report: Reporter,
    rate_ratio: float = 1.0,
) -> _Begun:
    """Make the optimizer, go to where the run stood, and only then decode images.

    ``rate_ratio`` is that of the weights of the losses' own to the network's.
    """
    losses.to(place.context.device)
    rates: list[tuple[nn.Module, float]] = [(model, 1.0), (losses, rate_ratio)]
    if settings.backbone_lr:
        rates[:1] = [(model.base, settings.backbone_lr / settings.lr), (model.linear, 1.0)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in module.parameters() if p.requires_grad], "rate_ratio": ratio} for module, ratio in rates
    ]
    groups = [group for group in groups if group["params"]]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    place.directory.restore(learner(model, losses), optimizer)  # before a cache is made
    sets, samples = tuple(place.splits.values()), place.listed.samples
    device, workers, make = place.context.device, settings.workers, samples.make_cache if samples else make_cache
    reader = pick_reader(settings.cache, settings.cache_dir, sets, *settings.sides, device, workers, report, make)
    return _Begun(model, losses, optimizer, reader)


@dataclass(frozen=True)
class _Batches:
    """What is trained on, and what is measured of each split."""

    train: TrainLoader
    evaluation: dict[str, EvalLoader]


def _measured(settings: TeacherSettings | DistillSettings, place: Place) -> dict[str, ImageSet]:
    return {name: images for name, images in place.splits.items() if name != "train" or settings.eval_train}


def _pixel_batches(
    settings: TeacherSettings | DistillSettings,
    place: Place,
    reader: PixelReader,
    draw: DrawCrops,
) -> _Batches:
    batch = evaluation_batch(settings.batch, settings.chunk, place.context.device)
    ranks = place.context.ranks
    return _Batches(
        TrainLoader(place.splits["train"], place.sampler, *settings.sides, reader, draw, ranks),
        {
            name: EvalLoader(images, batch, *settings.sides, reader, ranks=ranks)
            for name, images in _measured(settings, place).items()
        },
    )


def _feature_batches(settings: TeacherSettings, place: Place, begun: _Begun, report: Reporter) -> _Batches:
    """Features of the frozen backbone in place of pixels: a batch of them costs next to nothing."""
    model, views, what = begun.model, _views(settings, place, settings.views), "Computing features"
    size = int(model.get_parameter("linear.weight").shape[1])
    header = header_of(model, settings.base, *settings.sides, settings.dataset)
    digest = digest_of(model.base.eval(), header, without=("embedding_size", "l2normalize"))  # those of its head
    keeper = _keeper(settings, place, begun.reader, model.features, size, digest, report)
    features = VectorReader(keeper.views(place.splits["train"], views, torch.float32, what))
    center = {
        name: VectorReader(keeper.center(images, what)[:, None]) for name, images in _measured(settings, place).items()
    }
    ranks = place.context.ranks
    return _Batches(
        TrainLoader(place.splits["train"], place.sampler, *settings.sides, features, views.draw, ranks),
        {
            name: EvalLoader(place.splits[name], _FEATURES_AT_ONCE, *settings.sides, reader, ranks=ranks)
            for name, reader in center.items()
        },
    )


def _views(settings: TeacherSettings | DistillSettings, place: Place, count: int) -> KeptViews:
    min_area = settings.crop_scale if settings.crop == "resized" else None
    return KeptViews(len(place.splits["train"]), count, settings.sides, settings.seed, min_area)


def _keeper(
    settings: TeacherSettings | DistillSettings,
    place: Place,
    reader: PixelReader,
    compute: Callable[[Tensor], Tensor],
    size: int,
    digest: str,
    report: Reporter,
) -> ViewCache:
    folder, samples = settings.cache_dir or default_cache_folder(), place.listed.samples
    keep = samples.keep_vectors if samples else cached_rows
    return ViewCache(compute, size, digest, *settings.sides, reader, folder, place.context, report, keep)


def _run(
    settings: TeacherSettings | DistillSettings,
    place: Place,
    begun: _Begun,
    batches: _Batches,
    embedder: nn.Module,
    step: Callable[[Batch, int], dict[str, Tensor]],
    objectives: Sequence[ObjectiveFacts],
    sample: str | None,
    teacher: tuple[Teacher | None, NetworkFacts | None] = (None, None),
) -> Run:
    context, splits, resumed = place.context, place.splits, place.directory.resumed
    model, ranks = begun.model, context.ranks
    processes = f"{ranks.size} processes, " if ranks.size > 1 else ""
    started = RunStarted(
        command=place.listed.command,
        dataset=settings.dataset,
        splits=tuple(SplitFacts(name, len(images), len(images.classes)) for name, images in splits.items()),
        network=_network_facts(model, settings.base),
        teacher=teacher[1],
        objectives=tuple(objectives),
        sample=sample,
        device=f"{processes}{device_name(context.device)}",
        precision=context.precision,
        reader=batches.train.what,
        save_dir=settings.save_dir,
        epochs=settings.epochs,
        steps_per_epoch=settings.iter_per_epoch,
        resumed_at=(resumed.epoch, resumed.step) if resumed else None,
        shared=_shared(settings, model),
    )
    return Run(
        started=started,
        context=context,
        model=model,
        embedder=embedder,
        losses=begun.losses,
        teacher=teacher[0],
        step=step,
        optimizer=begun.optimizer,
        learning_rate=_schedule(settings),
        loader=batches.train,
        augment=Augmentation(settings.jitter, settings.mixup if isinstance(settings, DistillSettings) else 0.0, ranks),
        evaluation=batches.evaluation,
        freeze_bn=settings.freeze_bn,
        pictured=EvalLoader(splits["eval"], settings.batch, *settings.sides, begun.reader),
        epochs=settings.epochs,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        ks=settings.recall,
        header=header_of(
            model,
            settings.base,
            *settings.sides,
            settings.dataset,
            settings.select_on,
            place.seen,
            splits["eval"].decoding.fit,
        ),
        directory=place.directory,
    )


def _shared(settings: TeacherSettings | DistillSettings, model: EmbeddingNet) -> dict[str, object]:
    """What a student of the run, or another command on its images, has to be told."""
    names = ["dataset", "data", "resize", "image_size", "max_pixels", "skip_damaged", "select_on"]
    usual = {name: field.default for name, field in DistillSettings.model_fields.items()}
    found: dict[str, object] = {}
    recipe = student_recipe(dict(settings)) if isinstance(settings, TeacherSettings) else None
    if recipe:
        found["config"], usual = recipe, usual | recipe_settings(recipe)
        if usual["d3_ratio"]:
            names.append("embedding_size")  # that of the teacher, in whose space the student is
    elif model.parameter_count() in _NEEDS_SMALLER:
        found["base"] = _SMALLER  # the usual one would be as large
    values = {name: getattr(settings, name) for name in names}
    if settings.fit != fit_of(settings.dataset):
        values["fit"] = settings.fit
    if settings.weights == "none":  # where none can be fetched, or are wanted; a file is of one network
        values["weights"] = "none"
    return found | {name: value for name, value in values.items() if value != usual[name]}


def _expose_stages(settings: DistillSettings, source: Embedder, student: EmbeddingNet) -> None:
    """Have teacher and student give feature maps, where a term compares them.

    Raises:
        SettingsError: one has none.
    """
    if not (settings.at_ratio or settings.fitnet_ratio):
        return
    flag = "--at-ratio" if settings.at_ratio else "--fitnet-ratio"
    if source.network is None:
        raise SettingsError(f"{flag}: {source.name} holds embeddings, and no feature maps: name a network as --teacher")
    for name, base, network in (("teacher", source.name, source.network), ("student", settings.base, student)):
        if not isinstance(network, EmbeddingNet) or not expose_stages(network):
            raise SettingsError(f"{flag}: the {name}, {base}, has no four stages of feature maps; ResNets have")


def _with_unit_student(settings: DistillSettings, report: Reporter) -> DistillSettings:
    """The settings, where nobody has said so with a student of unit length if all of its losses see directions alone:
    lengths that nothing learns would be measured otherwise."""
    flags = [flag for flag in settings.direction_flags if flag != "--relaxed-ratio"]  # which sees the student's lengths
    if not flags or settings.l2normalize:
        return settings
    active = {
        flag_name(name) for name in type(settings).model_fields if name.endswith("_ratio") and getattr(settings, name)
    }
    named = ", ".join(flags)
    if active <= {*flags, "--at-ratio"} and not settings.load and "l2normalize" not in settings.model_fields_set:
        report(Note(f"--l2normalize: for {named} only directions count, so the student's embeddings have unit length"))
        return settings.model_copy(update={"l2normalize": True})
    report(Note(_LENGTHS_OPEN.format(named)))
    return settings


def _teacher(settings: DistillSettings, source: Embedder, place: Place, report: Reporter) -> KeptTeacher | LiveTeacher:
    unit = bool(settings.direction_flags) and not source.unit
    if unit:
        flags = ", ".join(settings.direction_flags)
        report(
            Note(
                f"the teacher's embeddings have other lengths than 1, and for {flags} only directions count: they are "
                "scaled to unit length for all losses and figures"
            )
        )
    if source.vectors:
        return join_vectors(source.vectors, place.splits, settings.data, place.context, unit)
    assert source.network is not None  # a source has the one or the other
    if isinstance(source.network, EmbeddingNet):
        network = _ready(source.network, settings, source.name, place.context, report)
        return LiveTeacher(network, place.context, settings.chunk, unit)
    side = source.network.facts.header.image_size
    if side != settings.image_size:
        raise SettingsError(f"--image-size {settings.image_size}: {source.name} takes images of {side} pixels alone")
    return LiveTeacher(source.network, place.context, settings.chunk, unit)


def _schedule(settings: TeacherSettings | DistillSettings) -> Rate:
    steps = settings.iter_per_epoch
    rate: Rate = partial(step_rate, settings.lr, settings.lr_decay_gamma, settings.lr_decay_epochs)
    if settings.schedule == "cosine":
        rate = partial(cosine_rate, settings.lr, settings.warmup + 1, settings.epochs, steps)
    return partial(warmed_up, rate, settings.warmup, steps) if settings.warmup else rate


def _crops(settings: TeacherSettings | DistillSettings) -> DrawCrops:
    return partial(resized_crops, min_area=settings.crop_scale) if settings.crop == "resized" else random_crops


def _new_model(settings: TeacherSettings | DistillSettings, place: Place, report: Reporter) -> EmbeddingNet:
    """The network that is going to learn."""
    size = settings.image_size
    if place.directory.resumed:  # its weights are in the state
        with suppress(CheckpointError):  # a run that was stopped very early has no model yet
            size = read_header(settings.save_dir / "last.safetensors").input_size or size
        return build_model(settings.base, settings.embedding_size, settings.l2normalize, image_size=size)
    if settings.load is None:
        place.context.seed_torch("weights")
        return build_model(settings.base, settings.embedding_size, settings.l2normalize, settings.weights, size, report)
    header = read_header(settings.load)
    agree(settings.load, header, settings.base, settings.embedding_size, settings.l2normalize)
    for note in _seen_notes(str(settings.load), header, place):
        report(Note(note))
    model = load_model(settings.load)
    model.teacher_space = None  # what this run learns, its losses say
    return model


def _learning(
    model: EmbeddingNet, settings: TeacherSettings | DistillSettings, context: Context, report: Reporter
) -> EmbeddingNet:
    """``_ready``, its batch norms of all processes if asked for."""
    model = _ready(model, settings, settings.base, context, report)
    if settings.freeze_bn and not freeze_statistics(model):
        raise SettingsError(f"--freeze-bn: {settings.base} has no batch norm: leave it out")
    if settings.sync_bn:
        synchronize(model, settings.base, context.ranks, context.device)
    return model


def _ready(
    model: EmbeddingNet,
    settings: TeacherSettings | DistillSettings,
    base: str,
    context: Context,
    report: Reporter,
) -> EmbeddingNet:
    """On the device, sure to take the images of this run, compiled if asked for."""
    side = model.normalization.input_size
    if side and side != settings.image_size:
        report(Note(f"{base} takes images of {side} pixels alone: those of {settings.image_size} are resized to that"))
    try:
        with naming_memory(f"{base} with one image of {settings.image_size} pixels", "choose a smaller --base"):
            to_device(model, context.device).eval()
            _pass_zeros(model, settings.image_size, context.device)
    except RuntimeError as error:
        _pass_zeros(model, _USUAL_SIDE, context.device)  # whatever else may be wrong is no matter of size
        reason = first_line(error)
        raise SettingsError(f"--image-size {settings.image_size}: {base} cannot take such images ({reason})") from None
    if settings.compile:
        model.compile()
    return model


@torch.inference_mode()
def _pass_zeros(model: EmbeddingNet, side: int, device: torch.device) -> None:
    model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))


def _first_views(
    settings: DistillSettings, student: EmbeddingNet, teacher: Teacher, context: Context
) -> tuple[View, View]:
    """What both make of one empty image.

    Raises:
        SettingsError: their feature maps are to be compared and differ in height or width.
    """
    with_stages = bool(settings.at_ratio or settings.fitnet_ratio)
    images = torch.zeros(1, 3, settings.image_size, settings.image_size, dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        learned, taught = views(student, teacher, Batch(images, zero, zero, zero), with_stages, context)
    for stage in STAGES if with_stages else ():
        ours, theirs = learned.stages[stage].shape[2:], taught.stages[stage].shape[2:]
        if ours != theirs:
            flag = "--at-ratio" if settings.at_ratio else "--fitnet-ratio"
            raise SettingsError(
                f"{flag}: the feature maps of stage {stage + 1} are {ours[0]} x {ours[1]} in the student and "
                f"{theirs[0]} x {theirs[1]} in the teacher: choose networks that shrink their images alike"
            )
    return learned, taught


def _teacher_notes(settings: DistillSettings, source: Embedder, place: Place) -> list[str]:
    """What a user should know of a teacher before it teaches."""
    header = source.header
    if header is None or is_pretrained(source.name):
        return []
    notes = untrained_notes(f"the teacher {source.name}", header)
    if header.image_size != settings.image_size:
        notes.append(
            f"the teacher was trained on {header.image_size} pixel images, this run shows it {settings.image_size}: "
            "set --resize and --image-size unless that is meant"
        )
    if header.fit != settings.fit:
        notes.append(
            f"the teacher was trained with --fit {header.fit}, this run shows it images with --fit {settings.fit}: set "
            "--fit unless that is meant"
        )
    notes += _seen_notes(f"the teacher {source.name}", header, place)
    if settings.select_on == "val" and header.select_on == "eval" and not settings.without_labels:
        notes.append(
            "the teacher's own best epoch was picked on the evaluation classes, so this student's figures on them are "
            "not untouched by them: train the teacher with --select-on val too"
        )
    return notes


def _size_note(settings: DistillSettings, student: EmbeddingNet, teacher: NetworkFacts) -> str:
    """That a student is as large as its teacher, unless it is the same network: self-distillation."""
    count = student.parameter_count()
    same = (settings.base, settings.embedding_size) == (teacher.base, teacher.embedding_size)
    if same or not teacher.parameters or count < _AS_LARGE * teacher.parameters:
        return ""
    return (
        f"the student {settings.base} has {count / 1e6:.1f} M parameters, and its teacher {teacher.base} has "
        f"{teacher.parameters / 1e6:.1f} M: choose a smaller --base, for example {_SMALLER}, unless that is meant"
    )


def _seen_notes(who: str, header: Header, place: Place) -> list[str]:
    """What ``who`` was trained on and this run measures."""
    measured = [place.splits[split] for split in ("eval", "val") if split in place.splits]
    found = [(overlap(header.seen_classes, images), images.name) for images in measured]
    return [seen_note(who, classes, split) for classes, split in found if classes]


def _network_facts(model: Network, base: str, path: Path | None = None) -> NetworkFacts:
    return NetworkFacts(base, model.parameter_count(), model.embedding_size, model.l2normalize, path)


def _teacher_facts(source: Embedder) -> NetworkFacts:
    path = None if is_pretrained(source.name) else Path(source.name)
    if source.vectors:
        return NetworkFacts("embeddings", 0, source.vectors.size, source.unit, path)
    assert source.network is not None and source.header is not None
    return _network_facts(source.network, source.header.base, path)
