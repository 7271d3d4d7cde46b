"""The only translator from settings to data, networks, losses and optimizers."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from rkd_cli.data import BalancedBatchSampler, ImageSet, hold_out, load_dataset
from rkd_cli.data.loader import EvalLoader, PixelReader, TrainLoader, find_damaged, pick_reader
from rkd_cli.errors import SettingsError
from rkd_cli.events import Note, Reporter, RunStarted
from rkd_cli.losses import ContrastiveLoss, TripletLoss
from rkd_cli.models import checkpoint
from rkd_cli.models.checkpoint import Header
from rkd_cli.models.embedding_net import EmbeddingNet, build_model, freeze, load_model, placed
from rkd_cli.runtime.device import check_compiler, derive_seed, device_name, pick_device, pick_precision
from rkd_cli.settings import DistillSettings, ImportSettings, TeacherSettings, flag_name
from rkd_cli.training.loop import Run, Terms
from rkd_cli.training.miners import MINERS
from rkd_cli.training.objective import distill_stages
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.step import distill_terms
from rkd_cli.training.teacher import LabelLoss, teacher_terms


def build_teacher_run(settings: TeacherSettings, report: Reporter) -> Run:
    """Everything that ``rkd train-teacher`` needs before its first batch.

    Raises:
        RkdError: whatever of it cannot be had.
    """
    place = _prepare(settings, report)
    model = _trainee(settings, place)
    terms = partial(teacher_terms, model, settings.loss, _label_loss(settings), place.device, place.precision)
    facts = (
        ("network", _describe(model, settings.base)),
        ("loss", f"{settings.loss}, {settings.sample} negatives"),
    )
    return _run(settings, place, "Training a teacher", facts, model, None, lambda epoch: terms)


def build_distill_run(settings: DistillSettings, report: Reporter) -> Run:
    """Everything that ``rkd distill`` needs before its first batch.

    Raises:
        RkdError: whatever of it cannot be had.
    """
    header = checkpoint.read_header(settings.teacher_load)
    place = _prepare(settings, report)
    place.directory.inputs["teacher"] = checkpoint.read_checksum(settings.teacher_load)
    teacher = load_model(settings.teacher_load)
    teacher_facts = f"{_describe(teacher, header.base)}, {settings.teacher_load}"
    teacher = _ready(freeze(teacher), header.base, settings, place.device)
    if header.image_size != settings.image_size:
        report(
            Note(
                f"the teacher was trained on {header.image_size} pixel images, this run shows it "
                f"{settings.image_size}: set --resize and --image-size unless that is meant"
            )
        )
    student = _trainee(settings, place)
    torch.manual_seed(derive_seed(settings.seed, "hints"))
    hints, terms = distill_stages(settings, student, teacher, place.device)

    def terms_of(epoch: int) -> Terms:
        now = hints if epoch <= settings.hint_epochs else terms
        return partial(distill_terms, student, teacher, now, place.device, place.precision)

    story = [" + ".join(f"{term.ratio:g} {term.name}" for term in stage) for stage in (hints, terms)]
    loss = f"{settings.hint_epochs} epochs {story[0]}, then {story[1]}" if settings.hint_epochs else story[1]
    facts = (
        ("student", _describe(student, settings.base)),
        ("teacher", teacher_facts),
        ("loss", loss),
    )
    return _run(settings, place, "Distilling", facts, student, teacher, terms_of)


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
    val_set: ImageSet | None
    sampler: BalancedBatchSampler
    reader: PixelReader
    directory: RunDirectory


def _prepare(settings: TeacherSettings | DistillSettings, report: Reporter) -> _Place:
    device = pick_device(settings.device)
    train_set, eval_set = load_dataset(settings.dataset, settings.data, report)
    if settings.skip_damaged:
        damaged = find_damaged((train_set, eval_set), settings.workers, report)
        if damaged:
            report(Note(f"{len(damaged)} damaged images are left out, the first of them {next(iter(damaged))}"))
            train_set, eval_set = train_set.without(damaged), eval_set.without(damaged)
    val_set = None
    if settings.select_on == "val":
        train_set, val_set = hold_out(train_set)
    sampler = BalancedBatchSampler(
        train_set.labels, settings.batch, settings.num_image_per_class, settings.iter_per_epoch, settings.seed
    )
    text = settings.model_dump_json(indent=2)
    directory = RunDirectory.prepare(settings.save_dir, text, settings.overwrite, settings.resume)
    directory.inputs["images"] = _digest(train_set, eval_set, val_set)
    precision = pick_precision(settings.precision, device)
    if settings.compile:
        check_compiler(device)
    reader = pick_reader(
        settings.cache,
        settings.cache_dir,
        [images for images in (train_set, eval_set, val_set) if images],
        settings.resize,
        settings.image_size,
        device,
        settings.workers,
        report,
    )
    return _Place(device, precision, train_set, eval_set, val_set, sampler, reader, directory)


def _run(
    settings: TeacherSettings | DistillSettings,
    place: _Place,
    title: str,
    facts: tuple[tuple[str, str], ...],
    model: EmbeddingNet,
    teacher: EmbeddingNet | None,
    terms_of: Callable[[int], Terms],
) -> Run:
    device, train_set, eval_set = place.device, place.train_set, place.eval_set
    sides = settings.resize, settings.image_size
    # a GPU without gradients to keep has room for larger batches
    eval_batch = settings.batch * (4 if device.type == "cuda" else 1)

    def evaluation(split: ImageSet) -> EvalLoader:
        return EvalLoader(split, eval_batch, *sides, place.reader)

    counts = [f"{_count(train_set)} train", f"{_count(eval_set)} evaluate"]
    if place.val_set:
        counts.append(f"{_count(place.val_set)} pick the best epoch")
    return Run(
        started=RunStarted(
            title,
            (
                ("data", f"{settings.dataset}: {', '.join(counts)}"),
                *facts,
                ("device", f"{device_name(device)}, {place.precision}, images {place.reader.what}"),
                ("saving to", str(settings.save_dir)),
                *place.directory.going_on(),
            ),
            settings.epochs,
            settings.iter_per_epoch,
        ),
        model=model,
        teacher=teacher,
        terms_of=terms_of,
        optimizer=torch.optim.Adam(
            model.parameters(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=True,
        ),
        learning_rate=partial(learning_rate, settings.lr, settings.lr_decay_gamma, settings.lr_decay_epochs),
        batches=TrainLoader(train_set, place.sampler, *sides, place.reader),
        train_eval=evaluation(train_set) if settings.eval_train else None,
        evaluation=evaluation(eval_set),
        validation=evaluation(place.val_set) if place.val_set else None,
        epochs=settings.epochs,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        ks=settings.recall,
        seed=settings.seed,
        device=device,
        precision=place.precision,
        header=header_of(settings, model),
        directory=place.directory,
    )


def _trainee(settings: TeacherSettings | DistillSettings, place: _Place) -> EmbeddingNet:
    if place.directory.resumed:  # its weights are in the state
        model = build_model(settings.base, settings.embedding_size, settings.l2normalize)
    elif settings.load:
        header = checkpoint.read_header(settings.load)
        agree(settings.load, header, settings.base, settings.embedding_size, settings.l2normalize)
        model = load_model(settings.load)
    else:
        torch.manual_seed(derive_seed(settings.seed, "weights"))
        model = build_model(settings.base, settings.embedding_size, settings.l2normalize, settings.weights)
    return _ready(model, settings.base, settings, place.device)


def _ready(
    model: EmbeddingNet, base: str, settings: TeacherSettings | DistillSettings, device: torch.device
) -> EmbeddingNet:
    placed(model, device).eval()
    side = settings.image_size
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--image-size {side}: {base} cannot take such images ({reason})") from None
    if settings.compile:
        model.compile()
    return model


def _label_loss(settings: TeacherSettings) -> LabelLoss:
    miner = MINERS[settings.sample]
    if settings.loss == "contrastive":
        return ContrastiveLoss(settings.margin, miner)
    return TripletLoss(2 if settings.loss == "l2_triplet" else 1, settings.margin, miner)


def header_of(settings: TeacherSettings | DistillSettings | ImportSettings, model: EmbeddingNet) -> Header:
    """What a model file says of a network before it is trained."""
    return Header(
        base=settings.base,
        embedding_size=settings.embedding_size,
        l2normalize=settings.l2normalize,
        resize=settings.resize,
        image_size=settings.image_size,
        **asdict(model.normalisation),
        dataset=settings.dataset,
        epoch=0,
        train_recall={},
        eval_recall={},
    )


def agree(path: Path, header: Header, base: str | None, size: int | None, l2normalize: bool | None) -> None:
    """Compare flags with what a checkpoint says of itself; None is no flag.

    Raises:
        SettingsError: they differ.
    """
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


def _digest(*sets: ImageSet | None) -> str:
    names = [
        f"{path.parent.name}/{path.name} {label}"
        for s in sets
        if s
        for path, label in zip(s.paths, s.labels or (), strict=False)
    ]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _count(images: ImageSet) -> str:
    return f"{len(images):,} images of {len(images.classes)} classes"
