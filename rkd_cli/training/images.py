"""The data set, splits and batches of a training. No image is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
_COMPARED = 200_000  # images to compare for copies at most: some seconds on a local disk
_FEW_PHOTOS = 100  # in a split; ten random neighbors agree by 10 % there
_TrainSettings = TypeVar("_TrainSettings", TeacherSettings, DistillSettings)


@dataclass(frozen=True)
class Images:
    """The splits of a run, and the batches of ``train``."""

    splits: dict[str, ImageSet]  # train, eval, and val with --select-on val
    seen: tuple[str, ...]  # training classes, from ``seen_classes``
    batch: int
    sampler: BatchSampler


def find_images(settings: _TrainSettings, report: Reporter, is_first: bool) -> tuple[_TrainSettings, Sets]:
    """List the images, and set ``dataset`` and ``fit`` in the settings if they are auto.

    Raises:
        RkdError: there is no such data set, or an output folder is inside it.
    """
    if settings.dataset == "auto":
        settings = settings.model_copy(update={"dataset": find_dataset(settings.data, report)})
        if settings.dataset == "images":
            _refuse_without_labels(settings, "4 or more class folders, or 2 each in train/ and eval/", "Make them")
    if not settings.resume:
        _refuse_inside(settings)
    fit = fit_of(settings.dataset, settings.fit)
    settings = settings.model_copy(update={"fit": fit})
    train, evaluation = (
        images.decoded(settings.max_pixels, fit) for images in load_dataset(settings.dataset, settings.data, report)
    )
    if settings.dataset in ("list", "packed") and train.labels is None:
        _refuse_without_labels(settings, "class labels", "Add them")
        settings = settings.model_copy(update={"labels": False})
    if is_first and not settings.resume:
        _note_copies(settings, (train, evaluation), report)
    return settings, (train, evaluation)


def split_images(
    settings: TeacherSettings | DistillSettings,
    sets: Sets,
    files: Sequence[Vectors],
    ranks: Ranks,
    report: Reporter,
) -> Images:
    """Make the splits and batches of a run, without the images that a teacher's vectors file lacks.

    Raises:
        DataError: a split has no pairs, or none of its images has a teacher embedding.
        SettingsError: the images do not fill a batch.
    """
    train, evaluation = sets
    splits = {"train": train, "eval": evaluation}
    if settings.without_labels:
        for flag, value in (("--fold", settings.fold), ("--select-by", settings.select_by)):
            if value:
                raise SettingsError(f"{flag} {value}: needs class labels, which this run does not use. Omit the flag.")
        splits = {name: images.without_labels() for name, images in splits.items()}
        if settings.select_on == "val":
            splits["train"], splits["val"] = hold_out_photos(splits["train"], settings.data)
    elif settings.select_on == "val":
        splits["train"], splits["val"] = hold_out(train, settings.fold)
    for vectors in files:
        splits = without_vectors(vectors, splits, settings.data, report)
    if settings.without_labels:
        _note_chance(splits, report)
    else:
        _check_pairs(settings.data, splits)
    # --no-labels trains on the images of these classes too
    seen = seen_classes(train if settings.without_labels else splits["train"])
    batch = _fitting_batch(settings, splits["train"], report)
    if batch < 2 * ranks.size:
        raise SettingsError(f"--batch {batch}: less than two images for each of {ranks.size} processes. Increase it.")
    return Images(splits, seen, batch, _sampler(settings, batch, splits["train"]))


def names_digest(splits: Mapping[str, ImageSet]) -> str:
    """Digest of the names and labels of all images."""
    found, before = hashlib.sha256(), ""
    for images in splits.values():
        for index, path in enumerate(images.paths):
            label = images.labels[index] if images.labels else "-"
            found.update(f"{before}{path.parent.name}/{path.name} {label}".encode())
            before = "\n"
    return found.hexdigest()


def _fitting_batch(settings: TeacherSettings | DistillSettings, images: ImageSet, report: Reporter) -> int:
    """``--batch``, or by default no more than the images fill."""
    each = settings.num_image_per_class
    most = len(images) if images.labels is None else largest_batch(images.labels, each)
    if "batch" in settings.model_fields_set or not 2 <= most < settings.batch:
        return settings.batch
    no_more = f"there are {most} training photos" if images.labels is None else f"{each} images per class fill no more"
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
                f"{data}: no {images.name} class has two images, so there are no pairs. Add images, or distil without "
                "classes (--no-labels)."
            )


def _refuse_without_labels(settings: TeacherSettings | DistillSettings, needs: str, how: str) -> None:
    """Raise an error if the training needs the class labels that its images do not have."""
    if isinstance(settings, TeacherSettings):
        raise DataError(
            f"{settings.data}: `rkd train-teacher` needs {needs}. {how}, or train with `rkd distill`, which needs no "
            "classes."
        )
    if settings.triplet_ratio:
        raise SettingsError(
            f"--triplet-ratio {settings.triplet_ratio:g}: needs {needs}, which {settings.data} does not have. Omit the "
            "flag."
        )


def _refuse_inside(settings: TeacherSettings | DistillSettings) -> None:
    for folder in image_folders(settings.dataset, settings.data):
        for flag, path in (("--save-dir", settings.save_dir), ("--cache-dir", settings.cache_dir)):
            if path and path.resolve().is_relative_to(folder.resolve()):
                raise SettingsError(
                    f"{flag} {path}: is inside the image folder {folder}. Choose a folder outside of it."
                )


def _note_copies(settings: TeacherSettings | DistillSettings, sets: Sets, report: Reporter) -> None:
    count = sum(map(len, sets))
    if count > _COMPARED:
        report(Note(f"{count:,} images are not checked for copies. `rkd check-data` does that."))
        return
    if settings.without_labels:
        sets = sets[0].without_labels(), sets[1].without_labels()
    for note in copy_notes(*sets, settings.data):
        report(Note(note))


def _note_chance(splits: Mapping[str, ImageSet], report: Reporter) -> None:
    """Warn of splits so small that random neighbors agree too."""
    for name in ("eval", "val"):
        count = len(splits.get(name, ()))
        if 0 < count <= _FEW_PHOTOS:
            by_chance = 100 * 10 / max(10, count - 1)
            report(Note(f"{name}: only {count} photos: ten random neighbors would agree by {by_chance:.0f} %"))
