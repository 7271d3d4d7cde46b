"""The only translator from settings to data, networks, losses and optimizers."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rkd_cli import checkpoint, mining
from rkd_cli.checkpoint import Header
from rkd_cli.data import DATASETS, BalancedBatchSampler, ImageSet
from rkd_cli.data.batches import EvalBatches, TrainBatches
from rkd_cli.engine.distill import distill_terms
from rkd_cli.engine.evaluate import evaluate
from rkd_cli.engine.loop import Run
from rkd_cli.engine.rundir import RunDirectory
from rkd_cli.engine.teacher import LabelLoss, teacher_terms
from rkd_cli.errors import SettingsError
from rkd_cli.events import Note, Reporter, RunStarted
from rkd_cli.losses import ContrastiveLoss, RKDAngle, RKDDistance, TripletLoss
from rkd_cli.losses.pairs import Miner
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.runtime import derive_seed, device_name, pick_device, pick_precision, worker_count
from rkd_cli.settings import DistillSettings, EvaluateSettings, TeacherSettings, flag_name

MINERS: dict[str, Miner] = {
    "random": mining.RandomNegative(),
    "hard": mining.HardNegative(),
    "all": mining.AllPairs(),
    "semihard": mining.SemiHardNegative(),
    "distance": mining.DistanceWeighted(),
    "distance-published": mining.DistanceWeighted(published=True),
}


def build_teacher_run(settings: TeacherSettings, report: Reporter) -> Run:
    """Everything that ``rkd train-teacher`` needs before its first batch.

    Raises:
        RkdError: whatever of it cannot be had.
    """
    place = _prepare(settings, report)
    model = _trainee(settings, place.device)
    terms = partial(teacher_terms, model, settings.loss, _label_loss(settings), place.device, place.precision)
    facts = (
        ("network", _describe(model, settings.base)),
        ("loss", f"{settings.loss}, {settings.sample} negatives"),
    )
    return _run(settings, place, "Training a teacher", facts, model, None, terms)


def build_distill_run(settings: DistillSettings, report: Reporter) -> Run:
    """Everything that ``rkd distill`` needs before its first batch.

    Raises:
        RkdError: whatever of it cannot be had.
    """
    header = checkpoint.read_header(settings.teacher_load)
    place = _prepare(settings, report)
    teacher = load_model(settings.teacher_load).requires_grad_(False).to(place.device)
    if header.image_size != settings.image_size:
        report(
            Note(
                f"the teacher was trained on {header.image_size} pixel images, this run shows it "
                f"{settings.image_size}: set --resize and --image-size unless that is meant"
            )
        )
    student = _trainee(settings, place.device)
    relation_losses = {
        name: (ratio, loss)
        for name, ratio, loss in (
            ("distance", settings.dist_ratio, RKDDistance()),
            ("angle", settings.angle_ratio, RKDAngle()),
        )
        if ratio
    }
    triplet = TripletLoss(2, settings.triplet_margin, MINERS[settings.triplet_sample])
    label_losses = {"triplet": (settings.triplet_ratio, triplet)} if settings.triplet_ratio else {}
    terms = partial(distill_terms, student, teacher, relation_losses, label_losses, place.device, place.precision)
    ratios = {name: ratio for name, (ratio, _) in (*relation_losses.items(), *label_losses.items())}
    facts = (
        ("student", _describe(student, settings.base)),
        ("teacher", f"{_describe(teacher, header.base)}, {settings.teacher_load}"),
        ("loss", " + ".join(f"{ratio:g} {name}" for name, ratio in ratios.items())),
    )
    return _run(settings, place, "Distilling", facts, student, teacher, terms)


@dataclass(frozen=True)
class Evaluation:
    """What ``rkd evaluate`` found; recalls are fractions."""

    header: Header
    dataset: str
    parameters: int
    train_recall: dict[int, float]
    eval_recall: dict[int, float]


def evaluate_checkpoint(path: Path, settings: EvaluateSettings, report: Reporter) -> Evaluation:
    """Recall@K of a checkpoint on both splits of a data set.

    Raises:
        RkdError: a file or data set that cannot be had, or flags that contradict the checkpoint.
    """
    header = checkpoint.read_header(path)
    _agree(path, header, settings.base, settings.embedding_size, settings.l2normalize)
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    dataset = settings.dataset or header.dataset
    if dataset not in DATASETS:
        raise SettingsError(f"{path}: was trained on {dataset}, which is unknown here: name a set with --dataset")
    resize, image_size = settings.resize or header.resize, settings.image_size or header.image_size
    if image_size > resize:
        raise SettingsError(f"--image-size {image_size} is larger than --resize {resize}")
    splits = DATASETS[dataset](settings.data, report)
    model = load_model(path).to(device)
    workers = worker_count(settings.workers, device)
    train_recall, eval_recall = (
        evaluate(
            model,
            EvalBatches(split, settings.batch, resize, image_size, workers, pin=device.type == "cuda"),
            settings.recall,
            device,
            precision,
            report,
            f"Evaluating {name} classes",
        )
        for name, split in zip(("training", "unseen"), splits, strict=True)
    )
    return Evaluation(header, dataset, model.parameter_count(), train_recall, eval_recall)


def learning_rate(start: float, gamma: float, milestones: tuple[int, ...], epoch: int) -> float:
    """Of an epoch counted from 1: it falls at the start of each milestone."""
    return start * gamma ** bisect.bisect_right(milestones, epoch)


@dataclass(frozen=True)
class _Place:
    """Where a run computes, what it reads and where it writes: all that can be wrong before weights are fetched."""

    device: torch.device
    precision: str
    train_set: ImageSet
    eval_set: ImageSet
    sampler: BalancedBatchSampler
    directory: RunDirectory


def _prepare(settings: TeacherSettings | DistillSettings, report: Reporter) -> _Place:
    device = pick_device(settings.device)
    train_set, eval_set = DATASETS[settings.dataset](settings.data, report)
    sampler = BalancedBatchSampler(
        train_set.labels, settings.batch, settings.num_image_per_class, settings.iter_per_epoch, settings.seed
    )
    directory = RunDirectory.create(settings.save_dir, settings.overwrite)
    return _Place(device, pick_precision(settings.precision, device), train_set, eval_set, sampler, directory)


def _run(
    settings: TeacherSettings | DistillSettings,
    place: _Place,
    title: str,
    facts: tuple[tuple[str, str], ...],
    model: EmbeddingNet,
    teacher: EmbeddingNet | None,
    terms: partial[dict[str, torch.Tensor]],
) -> Run:
    device, train_set, eval_set = place.device, place.train_set, place.eval_set
    workers, pin = worker_count(settings.workers, device), device.type == "cuda"

    def evaluation(split: ImageSet) -> EvalBatches:
        return EvalBatches(split, settings.batch, settings.resize, settings.image_size, workers, pin)

    place.directory.save_settings(settings.model_dump_json(indent=2))
    return Run(
        started=RunStarted(
            title,
            (
                ("data", f"{settings.dataset}: {_count(train_set)} train, {_count(eval_set)} evaluate"),
                *facts,
                ("device", f"{device_name(device)}, {place.precision}, {workers} decoding workers"),
                ("saving to", str(settings.save_dir)),
            ),
            settings.epochs,
            settings.iter_per_epoch,
        ),
        model=model,
        teacher=teacher,
        terms=terms,
        optimizer=torch.optim.Adam(
            model.parameters(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        ),
        learning_rate=partial(learning_rate, settings.lr, settings.lr_decay_gamma, settings.lr_decay_epochs),
        batches=TrainBatches(train_set, place.sampler, settings.resize, settings.image_size, workers, pin),
        train_eval=evaluation(train_set),
        evaluation=evaluation(eval_set),
        epochs=settings.epochs,
        ks=settings.recall,
        seed=settings.seed,
        device=device,
        precision=place.precision,
        header=Header(
            base=settings.base,
            embedding_size=settings.embedding_size,
            l2normalize=settings.l2normalize,
            resize=settings.resize,
            image_size=settings.image_size,
            mean=tuple(model.mean.flatten().tolist()),
            std=tuple(model.std.flatten().tolist()),
            dataset=settings.dataset,
            epoch=0,
            train_recall={},
            eval_recall={},
        ),
        directory=place.directory,
    )


def _trainee(settings: TeacherSettings | DistillSettings, device: torch.device) -> EmbeddingNet:
    if settings.load:
        header = checkpoint.read_header(settings.load)
        _agree(settings.load, header, settings.base, settings.embedding_size, settings.l2normalize)
        return load_model(settings.load).to(device)
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    return build_model(settings.base, settings.embedding_size, settings.l2normalize, settings.weights).to(device)


def _label_loss(settings: TeacherSettings) -> LabelLoss:
    miner = MINERS[settings.sample]
    if settings.loss == "contrastive":
        return ContrastiveLoss(settings.margin, miner)
    return TripletLoss(2 if settings.loss == "l2_triplet" else 1, settings.margin, miner)


def _agree(path: Path, header: Header, base: str | None, size: int | None, l2normalize: bool | None) -> None:
    asked = {"base": base, "embedding_size": size, "l2normalize": l2normalize}
    wrong = [
        f"{flag_name(name)} {value} contradicts {path}, which holds {getattr(header, name)}: leave the flag out"
        for name, value in asked.items()
        if value is not None and value != getattr(header, name)
    ]
    if wrong:
        raise SettingsError(*wrong)


def _describe(model: EmbeddingNet, base: str) -> str:
    unit = "unit length" if model.l2normalize else "not normalised"
    return f"{base}, {model.parameter_count() / 1e6:.1f} M parameters, {model.embedding_size}-d, {unit}"


def _count(images: ImageSet) -> str:
    return f"{len(images):,} images of {len(images.classes)} classes"
