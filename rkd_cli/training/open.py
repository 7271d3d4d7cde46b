"""From a plan to a run: optimizer, caches and batches. The run's directory is created here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.data.augment import Augmentation
from rkd_cli.data.cache import make_cache
from rkd_cli.data.decode import random_crops, resized_crops
from rkd_cli.data.loader import Batch, CachedViews, DrawCrops, EvalLoader, PixelReader, TrainLoader, pick_reader
from rkd_cli.embedding.batches import evaluation_batch
from rkd_cli.embedding.store import cached_rows
from rkd_cli.embedding.views import VectorReader, ViewCache
from rkd_cli.events import NetworkFacts, Reporter, RunStarted
from rkd_cli.losses import ArcFace, NormalizedSoftmax, ProxyAnchor
from rkd_cli.models.backbones import compute_out_of_place
from rkd_cli.models.checkpoint import read_checksum, save_model
from rkd_cli.models.embedding_net import EmbeddingNet, Head, header_of, to_device, with_frozen_norms
from rkd_cli.models.joined import TEACHERS, JoinedSpace
from rkd_cli.models.sources import digest_of
from rkd_cli.runtime.context import device_name
from rkd_cli.runtime.files import default_cache_folder
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.training.first_layer import class_directions, least_squares_layer, principal_layer
from rkd_cli.training.loop import Run, learner
from rkd_cli.training.notes import flags_of_next, tell_of_distances
from rkd_cli.training.plan import Given, Plan, Teaching, content_of, plan_run
from rkd_cli.training.samples import Samples
from rkd_cli.training.schedule import LearningRate, cosine_rate, step_rate, warmed_up
from rkd_cli.training.step import DistillStep, TeacherStep
from rkd_cli.training.teachers import CachedTeacher, LiveTeacher

_FEATURES_AT_ONCE = 4096
_FEATURES, _TEACHERS_VIEWS = "Computing features", "Computing the teacher's views"  # work in progress


def open_run(plan: Plan, report: Reporter, samples: Samples | None = None) -> Run:
    """Make a run from a plan: restore a resumed one, and fill the caches. ``samples`` replace them in a dry run.

    Raises:
        RkdError: damaged images, files that cannot be written, or a damaged resume state.
    """
    settings, context, model = plan.settings, plan.context, plan.model
    splits, sides, ranks = plan.images.splits, settings.sides, context.ranks
    directory = plan.directory
    if not samples:
        directory.make()
        if ranks.is_first and "content" not in directory.inputs:
            directory = replace(directory, inputs={**directory.inputs, "content": content_of(splits, report)})
    optimizer = _optimizer(plan)
    directory.restore(learner(model, plan.losses), optimizer)  # before a cache is made
    make = samples.make_cache if samples else make_cache
    where, sets = (settings.cache, settings.cache_dir), tuple(splits.values())
    pixels = pick_reader(*where, sets, *sides, context.device, settings.workers, report, make)
    caches = _Caches(plan, pixels, report, samples)

    compute_out_of_place(model.base)
    network = with_frozen_norms(model) if settings.freeze_bn else model
    if settings.freeze_bn and settings.compile:  # a copy is not compiled
        network.compile()
    embedder: nn.Module = model
    trained: nn.Module = network
    teacher, draw = None, _crops(plan)
    batch = evaluation_batch(settings.batch, settings.chunk, context.device)
    measured = {name: images for name, images in splits.items() if name != "train" or settings.eval_train}
    trained_on: PixelReader | VectorReader = pixels
    readers: dict[str, PixelReader | VectorReader] = dict.fromkeys(measured, pixels)
    step: Callable[[Batch, int], dict[str, Tensor]]
    if isinstance(settings, DistillSettings):
        assert plan.teaching
        teacher, draw = _teacher(caches, settings, plan.teaching)
        if plan.teaching.header and not samples:
            digest = read_checksum(directory.path / TEACHERS)
            directory = replace(directory, inputs={**directory.inputs, "space": digest})
        objectives = plan.teaching.objectives
        step = DistillStep(network, teacher, objectives, settings.hint_epochs, context, settings.chunk)
    else:
        if settings.freeze_base:  # train on cached features in place of pixels
            embedder = trained = Head(model)
            batch = _FEATURES_AT_ONCE
            trained_on, readers, draw = _features(caches, settings, list(measured))
        step = TeacherStep(trained, settings.loss, plan.losses[0], context, settings.chunk)
    _start_layer(caches, teacher)
    loader = TrainLoader(splits["train"], plan.images.sampler, *sides, trained_on, draw, ranks)

    return Run(
        started=_started(plan, loader),
        context=context,
        model=model,
        embedder=embedder,
        trained=trained,
        losses=plan.losses,
        teacher=teacher,
        step=step,
        optimizer=optimizer,
        learning_rate=_schedule(plan),
        loader=loader,
        augment=Augmentation(settings.jitter, settings.mixup if isinstance(settings, DistillSettings) else 0.0, ranks),
        evaluation={
            name: EvalLoader(images, batch, *sides, readers[name], ranks=ranks) for name, images in measured.items()
        },
        freeze_bn=settings.freeze_bn,
        pictured=EvalLoader(splits["eval"], settings.batch, *sides, pixels),
        epochs=settings.epochs,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        keep_state=settings.keep_state,
        ks=settings.recall,
        select_by=settings.selecting_figure,
        patience=settings.patience,
        header=header_of(
            model,
            settings.base,
            *sides,
            settings.dataset,
            settings.select_on,
            plan.images.seen,
            splits["eval"].decoding.fit,
        ),
        directory=directory,
    )


def build_run(
    settings: TeacherSettings | DistillSettings,
    report: Reporter,
    given: Given = Given(),  # noqa: B008  # frozen
) -> Run:
    """``plan_run`` and ``open_run``."""
    return open_run(plan_run(settings, report, given), report)


def _optimizer(plan: Plan) -> torch.optim.Optimizer:
    settings, model = plan.settings, plan.model
    plan.losses.to(plan.context.device)
    of_losses = settings.proxy_lr_ratio if isinstance(settings, TeacherSettings) else 1.0
    ratios: list[tuple[nn.Module, float]] = [(model, 1.0), (plan.losses, of_losses)]
    if settings.backbone_lr:
        ratios[:1] = [(model.base, settings.backbone_lr / settings.lr), (model.linear, 1.0)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr_ratio": ratio} for module, ratio in ratios
    ]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    groups = [group for group in groups if group["params"]]
    return kind(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def _schedule(plan: Plan) -> LearningRate:
    settings = plan.settings
    steps = settings.iter_per_epoch
    schedule: LearningRate = partial(step_rate, settings.lr, settings.lr_decay_gamma, settings.lr_decay_epochs)
    if settings.schedule == "cosine":
        schedule = partial(cosine_rate, settings.lr, settings.warmup + 1, settings.epochs, steps)
    return partial(warmed_up, schedule, settings.warmup, steps) if settings.warmup else schedule


def _crops(plan: Plan) -> DrawCrops:
    settings = plan.settings
    return partial(resized_crops, min_area=settings.crop_scale) if settings.crop == "resized" else random_crops


def _views(plan: Plan, count: int) -> CachedViews:
    settings = plan.settings
    min_area = settings.crop_scale if settings.crop == "resized" else None
    return CachedViews(len(plan.images.splits["train"]), count, settings.sides, settings.seed, min_area)


@dataclass(frozen=True)
class _Caches:
    """Makes the cached views of a run; in a dry run ``samples`` replace them."""

    plan: Plan
    pixels: PixelReader
    report: Reporter
    samples: Samples | None

    def of(self, network: nn.Module, size: int, digest: str) -> ViewCache:
        settings, context = self.plan.settings, self.plan.context
        folder = settings.cache_dir or default_cache_folder()
        rows = self.samples.cached_rows if self.samples else cached_rows
        return ViewCache(network, size, digest, *settings.sides, self.pixels, folder, context, self.report, rows)

    def of_teacher(self, teaching: Teaching, teacher: LiveTeacher) -> ViewCache:
        return self.of(teacher.network, teacher.network.embedding_size, teaching.digest)

    def of_features(self) -> ViewCache:
        """Pooled features of the backbone to train, as it is before the first step."""
        model, settings = self.plan.model, self.plan.settings
        size = int(model.get_parameter("linear.weight").shape[1])
        backbone = EmbeddingNet(model.base, size, None, l2normalize=False, normalization=model.normalization).eval()
        to_device(backbone, self.plan.context.device)
        digest = digest_of(backbone, header_of(backbone, settings.base, *settings.sides, settings.dataset))
        return self.of(backbone, size, digest)


def _teacher(
    caches: _Caches, settings: DistillSettings, teaching: Teaching
) -> tuple[CachedTeacher | LiveTeacher, DrawCrops]:
    """The teacher, and the function that draws training crops: its cached views, if it has any."""
    plan, teacher, what = caches.plan, teaching.teacher, _TEACHERS_VIEWS
    train = plan.images.splits["train"]
    if isinstance(teacher, CachedTeacher):
        _fit_space(caches, teaching, lambda: teacher.center["train"])
        if settings.dist_ratio or settings.angle_ratio:
            tell_of_distances(teacher.rows("train", len(train) // 1000 + 1), caches.report)  # not all of a large set
        return teacher, _crops(plan)
    views_of = caches.of_teacher(teaching, teacher)
    _fit_space(caches, teaching, lambda: views_of.center(train, what))
    if not settings.teacher_views:
        return teacher, _crops(plan)
    views = _views(plan, settings.teacher_views)
    dtype = torch.float16 if settings.views_precision == "fp16" else torch.float32
    cached = views_of.views(train, views, dtype, what)
    center = {name: views_of.center(images, what) for name, images in plan.images.splits.items()}
    return CachedTeacher(plan.context.store(cached), center, plan.context, teacher.form), views.draw


def _fit_space(caches: _Caches, teaching: Teaching, rows: Callable[[], Tensor]) -> None:
    """Fit the space of several teachers to their embeddings of the training images; a resumed run has read it."""
    plan, samples = caches.plan, caches.samples
    space, path, ranks = teaching.teacher.form, plan.directory.path / TEACHERS, plan.context.ranks
    if not teaching.header or not isinstance(space, JoinedSpace) or plan.directory.resumed:
        return
    with ranks.first():
        if not samples and not ranks.is_first:
            space.read(path)
            return
        space.fit(rows())
        if not samples:
            save_model(path, space.state_dict(), teaching.header)


def _start_layer(caches: _Caches, teacher: CachedTeacher | LiveTeacher | None) -> None:
    """Set the embedding layer and the proxies as ``--init`` says; a resumed run has read them."""
    plan = caches.plan
    train, layer = plan.images.splits["train"], plan.model.linear
    if plan.settings.init == "random" or plan.directory.resumed:
        return
    assert isinstance(layer, nn.Linear)
    features = caches.of_features().center(train, _FEATURES)
    targets = None
    if plan.settings.init == "teacher":
        assert teacher and plan.teaching
        if isinstance(teacher, LiveTeacher):
            targets = caches.of_teacher(plan.teaching, teacher).center(train, _TEACHERS_VIEWS)
        else:
            targets = teacher.center["train"]
        if teacher.form:
            targets = teacher.form(plan.context.to_device(targets).float()).cpu()
    if caches.samples:  # a dry run computes only some rows
        return
    size = layer.out_features
    found = principal_layer(features, size) if targets is None else least_squares_layer(features, targets)
    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.bias), found, strict=True):
            parameter[: len(value)] = value  # dimensions beyond the principal components stay random
        for loss in plan.losses.modules():
            if isinstance(loss, (ArcFace, NormalizedSoftmax, ProxyAnchor)):
                assert train.labels is not None  # the sampler has seen to that
                _start_proxies(loss.proxies, features, layer, train.labels)


def _start_proxies(proxies: Tensor, features: Tensor, layer: nn.Linear, labels: Sequence[int]) -> None:
    """Point proxies at their classes' mean embeddings, keeping their norms; those of a mean of 0 stay random."""
    classes, size = proxies.shape  # of the first dimensions, with --matryoshka
    start = layer.weight[:size].cpu(), layer.bias[:size].cpu()
    means = class_directions(features, *start, labels, classes).to(proxies)
    proxies.copy_(torch.where(means.any(dim=1, keepdim=True), proxies.norm(dim=1, keepdim=True) * means, proxies))


def _features(
    caches: _Caches, settings: TeacherSettings, measured: list[str]
) -> tuple[VectorReader, dict[str, PixelReader | VectorReader], DrawCrops]:
    """Features of the frozen backbone for training views and measured splits, and the function that draws views."""
    plan, views_of = caches.plan, caches.of_features()
    splits, views = plan.images.splits, _views(plan, settings.views)
    features = VectorReader(plan.context.store(views_of.views(splits["train"], views, torch.float32, _FEATURES)))
    center = {name: VectorReader(views_of.center(splits[name], _FEATURES)[:, None]) for name in measured}
    return features, dict(center), views.draw


def _precisions(plan: Plan) -> str:
    """Of the steps, and of what computes without gradients if that differs."""
    context, teacher = plan.context, plan.teaching.teacher if plan.teaching else None
    frozen = {"evaluation": plan.model} | ({"teacher": teacher.network} if isinstance(teacher, LiveTeacher) else {})
    found = {what: context.inference_precision(network) for what, network in frozen.items()}
    others = [f"{what} {precision}" for what, precision in found.items() if precision != context.precision]
    return ", ".join([context.precision, *others])


def _started(plan: Plan, loader: TrainLoader) -> RunStarted:
    settings, context, resumed = plan.settings, plan.context, plan.directory.resumed
    model, ranks = plan.model, plan.context.ranks
    processes = f"{ranks.size} processes, " if ranks.size > 1 else ""
    return RunStarted(
        command=settings.command,
        dataset=settings.dataset,
        splits=tuple(images.facts for images in plan.images.splits.values()),
        network=NetworkFacts(settings.base, model.parameter_count(), model.embedding_size, model.l2normalize),
        teacher=plan.teaching.facts if plan.teaching else None,
        objectives=tuple(plan.terms),
        sample=plan.sample,
        device=f"{processes}{device_name(context.device)}",
        precision=_precisions(plan),
        reader=loader.what,
        save_dir=settings.save_dir,
        epochs=settings.epochs,
        steps_per_epoch=settings.iter_per_epoch,
        resumed_at=(resumed.epoch, resumed.step) if resumed else None,
        shared=flags_of_next(settings, model),
    )
