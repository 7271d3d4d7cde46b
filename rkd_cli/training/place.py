"""Where a training computes, what it reads and where it writes: all that can be wrong before weights are fetched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
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
from rkd_cli.data.loader import without_damaged
from rkd_cli.data.sampler import BatchSampler, largest_batch
from rkd_cli.data.splits import content_digest, seen_classes
from rkd_cli.embedding.vectors import Vectors
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.runtime.context import Context, check_compiler, make_context
from rkd_cli.schemas import fit_of
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.training.dry_run import Once, Samples
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.teachers import without_vectors

_COMPARED = 200_000  # images among which copies are looked for: some seconds on a local disk
_FEW_PHOTOS = 100  # of a split; ten neighbors drawn at random agree by a tenth there
_TrainSettings = TypeVar("_TrainSettings", TeacherSettings, DistillSettings)


@dataclass(frozen=True)
class _Listed:
    """What a run is asked to be made of."""

    command: str
    context: Context
    sets: tuple[ImageSet, ImageSet]
    inputs: dict[str, str]  # what it reads beside images, each with a digest
    vectors: Vectors | None  # of the teacher
    samples: Samples | None  # of a dry run


@dataclass(frozen=True)
class Place:
    """Where a run computes, what it reads and where it writes: all that can be wrong before weights are fetched."""

    listed: _Listed
    splits: dict[str, ImageSet]  # train, eval, and val where a part of train is held out
    seen: tuple[str, ...]  # classes that are trained on, of ``seen_classes``
    sampler: BatchSampler
    directory: RunDirectory

    @property
    def context(self) -> Context:
        """Of the process."""
        return self.listed.context


def prepare(
    command: str,
    settings: _TrainSettings,
    inputs: dict[str, str],
    report: Reporter,
    samples: Samples | None,
    vectors: Vectors | None = None,
) -> tuple[_TrainSettings, Place]:
    """Look at everything that a run is asked to be made of, but for networks and pixels.

    Args:
        command: of the run.
        settings: of the run.
        inputs: what it reads beside images, each with a digest.
        report: told what a user should know.
        samples: of a dry run.
        vectors: of the teacher, where it is a file of embeddings.
    Returns:
        The settings, with a batch that the images fill and a fit that is not auto, and the place.
    Raises:
        RkdError: whatever of it cannot be had.
    """
    context = make_context(settings.device, settings.precision, settings.seed)
    if settings.compile:
        check_compiler(context.device)
    settings = _with_dataset(settings, report)
    if not settings.resume:
        _refuse_inside(settings)
    train, evaluation = load_dataset(settings.dataset, settings.data, report)
    fit = fit_of(settings.dataset, settings.fit)
    settings = settings.model_copy(update={"fit": fit})
    sets = train.decoded(settings.max_pixels, fit), evaluation.decoded(settings.max_pixels, fit)
    if context.ranks.is_first and not settings.resume:
        _note_copies(settings, sets, report)
    listed = _Listed(command, context, sets, inputs, vectors, samples)
    if settings.skip_damaged:  # ``readable`` will tell of what is left, and compare it with a run to go on with
        return settings, _placed(settings, listed, silent, images_known=False)[1]
    return _placed(settings, listed, report)


def readable(settings: _TrainSettings, place: Place, report: Reporter) -> tuple[_TrainSettings, Place]:
    """The same without damaged images, where those are to be left out.

    That decodes all of them: by then flags, networks, weights and losses are known to be right.

    Raises:
        RkdError: as ``prepare``.
    """
    if not settings.skip_damaged:
        return settings, place
    listed, start = place.listed, place.context.clock()
    sets = without_damaged(listed.sets, settings.workers, report)
    if listed.samples:
        checked = Once(sum(map(len, listed.sets)), "images", place.context.clock() - start)
        listed.samples.add("looking for damaged images", checked)
    return _placed(settings, replace(listed, sets=sets), report)


def _placed(
    settings: _TrainSettings, listed: _Listed, report: Reporter, images_known: bool = True
) -> tuple[_TrainSettings, Place]:
    vectors, (train_set, eval_set) = listed.vectors, listed.sets
    ranks = listed.context.ranks
    splits = {"train": train_set, "eval": eval_set}
    if settings.without_labels:
        splits = {name: images.without_labels() for name, images in splits.items()}
        if settings.select_on == "val":
            splits["train"], splits["val"] = hold_out_photos(splits["train"], settings.data)
    elif settings.select_on == "val":
        splits["train"], splits["val"] = hold_out(train_set)
    if vectors:
        splits = without_vectors(vectors, splits, settings.data, report)
    if settings.without_labels:
        _note_chance(splits, report)
    else:
        _check_pairs(settings.data, splits)
    # without labels the classes are trained on all the same, those that a set has
    seen = seen_classes(train_set if settings.without_labels else splits["train"])
    settings = _with_fitting_batch(settings, splits["train"], report)
    if settings.batch < 2 * ranks.size:
        raise SettingsError(f"--batch {settings.batch}: leaves {ranks.size} processes without two images each")
    sampler = _sampler(settings, splits["train"])
    inputs = dict(listed.inputs)
    if images_known:
        inputs["images"] = _digest(splits)
        if ranks.is_first and (settings.resume or not listed.samples):  # a dry run stores none
            inputs["content"] = content_digest([path for images in splits.values() for path in images.paths], report)
    text, make = settings.model_dump_json(indent=2), listed.samples is None and ranks.is_first
    directory = RunDirectory.prepare(settings.save_dir, text, inputs, settings.overwrite, settings.resume, make)
    if directory.resumed and "content" in inputs.keys() - directory.resumed.inputs.keys():
        report(
            Note(
                f"{settings.save_dir}: was begun by an earlier version, which stored no digest of the images' content: "
                "their names and labels alone are compared"
            )
        )
    return settings, Place(listed, splits, seen, sampler, replace(directory, writes=ranks.is_first))


def _with_fitting_batch(settings: _TrainSettings, images: ImageSet, report: Reporter) -> _TrainSettings:
    """The settings, where nobody has chosen a batch with one that the images fill."""
    each = settings.num_image_per_class
    most = len(images) if images.labels is None else largest_batch(images.labels, each)
    if "batch" in settings.model_fields_set or not 2 <= most < settings.batch:
        return settings
    no_more = f"all {most} training photos" if images.labels is None else f"{each} images a class, or all, fill no more"
    report(Note(f"--batch {most} instead of {settings.batch}: {no_more}"))
    return settings.model_copy(update={"batch": most})


def _sampler(settings: TeacherSettings | DistillSettings, images: ImageSet) -> BatchSampler:
    batch, batches, seed = settings.batch, settings.iter_per_epoch, settings.seed
    if images.labels is None:
        return UniformBatchSampler(len(images), batch, batches, seed)
    return BalancedBatchSampler(images.labels, batch, settings.num_image_per_class, batches, seed)


def _check_pairs(data: Path, splits: dict[str, ImageSet]) -> None:
    """That some class of each split has two images.

    Raises:
        DataError: none has.
    """
    for images in splits.values():
        labels = images.labels or ()
        if len(labels) == len(set(labels)):
            raise DataError(
                f"{data}: no {images.name} class has two images, so there is no pair to learn "
                "from or to measure: add images, or distil without classes by --no-labels"
            )


def _with_dataset(settings: _TrainSettings, report: Reporter) -> _TrainSettings:
    """The settings with the data set that the folder holds, where that is left to us.

    Raises:
        DataError: it holds none, or one without the classes that are to be learned from.
    """
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


def _refuse_inside(settings: _TrainSettings) -> None:
    """That nothing is written among the images.

    Raises:
        SettingsError: a directory to write to lies there.
    """
    for folder in image_folders(settings.dataset, settings.data):
        for flag, path in (("--save-dir", settings.save_dir), ("--cache-dir", settings.cache_dir)):
            if path and path.resolve().is_relative_to(folder.resolve()):
                raise SettingsError(
                    f"{flag} {path}: lies in the folder of the images, {folder}: choose one outside of it"
                )


def _note_copies(settings: _TrainSettings, sets: tuple[ImageSet, ImageSet], report: Reporter) -> None:
    count = sum(map(len, sets))
    if count > _COMPARED:
        report(Note(f"copies are not looked for among {count:,} images: `rkd check-data` does that"))
        return
    if settings.without_labels:
        sets = sets[0].without_labels(), sets[1].without_labels()
    for note in copy_notes(*sets, settings.data):
        report(Note(note))


def _note_chance(splits: dict[str, ImageSet], report: Reporter) -> None:
    """Where so few photos are measured that neighbors drawn at random would agree too."""
    for name in ("eval", "val"):
        count = len(splits.get(name, ()))
        if 0 < count <= _FEW_PHOTOS:
            share = 10 / max(10, count - 1)
            report(Note(f"{name}: of {count} photos, ten neighbors drawn at random would agree by {100 * share:.0f} %"))


def _digest(splits: dict[str, ImageSet]) -> str:
    """Of the names and labels."""
    names = [
        f"{path.parent.name}/{path.name} {label}"
        for images in splits.values()
        for path, label in zip(images.paths, images.labels or ("-",) * len(images), strict=True)
    ]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
