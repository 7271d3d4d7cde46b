"""The images of a training: their data set, splits and batches. Nothing is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rkd_cli.data import (
    BalancedBatchSampler,
    ImageSet,
    UniformBatchSampler,
    find_dataset,
    hold_out,
    hold_out_photos,
    load_dataset,
)
from rkd_cli.data.copies import copy_notes
from rkd_cli.data.found import image_folders
from rkd_cli.data.sampler import BatchSampler, largest_batch
from rkd_cli.data.splits import seen_classes
from rkd_cli.embedding.vectors import Vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Reporter
from rkd_cli.runtime.distributed import Ranks
from rkd_cli.schemas import fit_of
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.training.teachers import without_vectors

Sets = tuple[ImageSet, ImageSet]  # training images and evaluation images
_COMPARED = 200_000  # images among which copies are looked for: some seconds on a local disk
_FEW_PHOTOS = 100  # of a split; ten neighbors drawn at random agree by a tenth there
_TrainSettings = TypeVar("_TrainSettings", TeacherSettings, DistillSettings)


@dataclass(frozen=True)
class Images:
    """The splits of a run, and the batches of ``train``."""

    splits: dict[str, ImageSet]  # train, eval, and val where a part of train is held out
    seen: tuple[str, ...]  # classes that are trained on, of ``seen_classes``
    batch: int
    sampler: BatchSampler


def find_images(settings: _TrainSettings, report: Reporter, is_first: bool) -> tuple[_TrainSettings, Sets]:
    """List the images of the data set. The settings then name it, and the fit, where they said auto.

    Raises:
        RkdError: there is no such set, or a directory to write to lies among its images.
    """
    settings = _with_dataset(settings, report)
    if not settings.resume:
        _refuse_inside(settings)
    fit = fit_of(settings.dataset, settings.fit)
    settings = settings.model_copy(update={"fit": fit})
    train, evaluation = (
        images.decoded(settings.max_pixels, fit) for images in load_dataset(settings.dataset, settings.data, report)
    )
    if is_first and not settings.resume:
        _note_copies(settings, (train, evaluation), report)
    return settings, (train, evaluation)


def split_images(
    settings: TeacherSettings | DistillSettings, sets: Sets, vectors: Vectors | None, ranks: Ranks, report: Reporter
) -> Images:
    """Make the splits and the batches of a run.

    Args:
        settings: of ``find_images``.
        sets: likewise.
        vectors: of the teacher, where it is a vectors file.
        ranks: the processes that share a batch.
        report: is told what is left out.
    Raises:
        DataError: a split has no pairs, or the teacher has none of its images.
        SettingsError: a batch that the images do not fill.
    """
    train, evaluation = sets
    splits = {"train": train, "eval": evaluation}
    if settings.without_labels:
        splits = {name: images.without_labels() for name, images in splits.items()}
        if settings.select_on == "val":
            splits["train"], splits["val"] = hold_out_photos(splits["train"], settings.data)
    elif settings.select_on == "val":
        splits["train"], splits["val"] = hold_out(train)
    if vectors:
        splits = without_vectors(vectors, splits, settings.data, report)
    if settings.without_labels:
        _note_chance(splits, report)
    else:
        _check_pairs(settings.data, splits)
    # without labels the classes are trained on all the same, those that a set has
    seen = seen_classes(train if settings.without_labels else splits["train"])
    batch = _fitting_batch(settings, splits["train"], report)
    if batch < 2 * ranks.size:
        raise SettingsError(f"--batch {batch}: leaves {ranks.size} processes without two images each")
    return Images(splits, seen, batch, _sampler(settings, batch, splits["train"]))


def names_digest(splits: Mapping[str, ImageSet]) -> str:
    """The digest of the names and labels of all images."""
    names = [
        f"{path.parent.name}/{path.name} {label}"
        for images in splits.values()
        for path, label in zip(images.paths, images.labels or ("-",) * len(images), strict=True)
    ]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _fitting_batch(settings: TeacherSettings | DistillSettings, images: ImageSet, report: Reporter) -> int:
    """The batch that was asked for, or if none was, at most what the images fill."""
    each = settings.num_image_per_class
    most = len(images) if images.labels is None else largest_batch(images.labels, each)
    if "batch" in settings.model_fields_set or not 2 <= most < settings.batch:
        return settings.batch
    no_more = f"all {most} training photos" if images.labels is None else f"{each} images a class, or all, fill no more"
    report(Note(f"--batch {most} instead of {settings.batch}: {no_more}"))
    return most


def _sampler(settings: TeacherSettings | DistillSettings, batch: int, images: ImageSet) -> BatchSampler:
    if images.labels is None:
        return UniformBatchSampler(len(images), batch, settings.iter_per_epoch, settings.seed)
    each, batches = settings.num_image_per_class, settings.iter_per_epoch
    return BalancedBatchSampler(images.labels, batch, each, batches, settings.seed)


def _check_pairs(data: Path, splits: Mapping[str, ImageSet]) -> None:
    for images in splits.values():
        labels = images.labels or ()
        if len(labels) == len(set(labels)):
            raise DataError(
                f"{data}: no {images.name} class has two images, so there is no pair to learn "
                "from or to measure: add images, or distil without classes by --no-labels"
            )


def _with_dataset(settings: _TrainSettings, report: Reporter) -> _TrainSettings:
    if settings.dataset != "auto":
        return settings
    name = find_dataset(settings.data, report)
    if name == "images" and isinstance(settings, TeacherSettings):
        raise DataError(
            f"{settings.data}: holds images, but not in class folders, which `rkd train-teacher` learns from: make a "
            "folder for each class (4 or more, or 2 each in train/ and eval/), or train by `rkd distill`, which needs "
            "no classes"
        )
    if name == "images" and isinstance(settings, DistillSettings) and settings.triplet_ratio:
        raise SettingsError(
            f"--triplet-ratio {settings.triplet_ratio:g}: learns from labels, and {settings.data} holds images without"
        )
    return settings.model_copy(update={"dataset": name})


def _refuse_inside(settings: TeacherSettings | DistillSettings) -> None:
    """Refuse to write among the images."""
    for folder in image_folders(settings.dataset, settings.data):
        for flag, path in (("--save-dir", settings.save_dir), ("--cache-dir", settings.cache_dir)):
            if path and path.resolve().is_relative_to(folder.resolve()):
                raise SettingsError(
                    f"{flag} {path}: lies in the folder of the images, {folder}: choose one outside of it"
                )


def _note_copies(settings: TeacherSettings | DistillSettings, sets: Sets, report: Reporter) -> None:
    count = sum(map(len, sets))
    if count > _COMPARED:
        report(Note(f"copies are not looked for among {count:,} images: `rkd check-data` does that"))
        return
    if settings.without_labels:
        sets = sets[0].without_labels(), sets[1].without_labels()
    for note in copy_notes(*sets, settings.data):
        report(Note(note))


def _note_chance(splits: Mapping[str, ImageSet], report: Reporter) -> None:
    """Name splits so small that neighbors drawn at random would agree too."""
    for name in ("eval", "val"):
        count = len(splits.get(name, ()))
        if 0 < count <= _FEW_PHOTOS:
            by_chance = 100 * 10 / max(10, count - 1)
            report(Note(f"{name}: of {count} photos, ten neighbors drawn at random would agree by {by_chance:.0f} %"))
