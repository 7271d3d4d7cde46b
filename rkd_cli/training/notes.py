"""Notes before a training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rkd_cli.data import ImageSet
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.embedding.embedder import Embedder
from rkd_cli.events import NetworkFacts, Note, Reporter
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import untrained_notes
from rkd_cli.models.sources import is_pretrained
from rkd_cli.schemas import Header, fit_of
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.recipes import recipe_settings, student_recipe

LENGTHS_OPEN = (
    "--no-l2normalize: only directions count for {}, but evaluation and `rkd search` use Euclidean distance. Pass "
    "--l2normalize to compare by cosine."
)
_AS_LARGE = 0.9  # of the teacher's parameters
_EQUAL = 0.05  # of the mean; CUB's teachers have 0.09 to 0.14, and 0.03 whitened
_SMALLER, _NEEDS_SMALLER = "mobilenet_v3_small", range(2_000_000, 12_500_000)  # parameters of the teacher


def tell_of_teacher(
    settings: DistillSettings, source: Embedder, splits: Mapping[str, ImageSet], report: Reporter
) -> None:
    """Note where the teacher was trained differently from this run."""
    header = source.header
    if header is None or is_pretrained(source.name):
        return
    notes = untrained_notes(f"the teacher {source.name}", header, Path(source.path))
    if header.image_size != settings.image_size:
        notes.append(
            f"the teacher was trained on {header.image_size} pixel images, this run uses {settings.image_size}. Set "
            "--resize and --image-size unless that is intended."
        )
    if header.fit != settings.fit:
        notes.append(
            f"the teacher was trained with --fit {header.fit}, this run uses --fit {settings.fit}. Set --fit unless "
            "that is intended."
        )
    for note in notes:
        report(Note(note))
    tell_of_seen(f"the teacher {source.name}", header, splits, report)
    if settings.select_on == "val" and header.select_on == "eval" and not settings.without_labels:
        report(
            Note(
                "the teacher's best epoch was picked on the evaluation classes, which biases this student's figures "
                "too. Train the teacher with --select-on val as well."
            )
        )


def tell_of_distances(rows: Tensor, report: Reporter) -> None:
    """Note that (N, D) embeddings are about equally far from each other, as whitened ones are."""
    if len(rows) < 3:
        return
    distances = torch.pdist(rows.float())
    spread = float(distances.std() / distances.mean())  # not a number for equal rows
    if spread < _EQUAL:
        report(
            Note(
                "the distances between the teacher's embeddings are nearly equal (their standard deviation is "
                f"{spread:.1%} of their mean): RKD has little to learn from them. If they are whitened, use those "
                "before whitening."
            )
        )


def tell_of_seen(who: str, header: Header, splits: Mapping[str, ImageSet], report: Reporter) -> None:
    """Note the measured classes that ``who`` was trained on."""
    for split in ("eval", "val"):
        if split in splits and (classes := overlap(header.seen_classes, splits[split])):
            report(Note(seen_note(who, classes, splits[split].name)))


def tell_of_size(settings: DistillSettings, student: EmbeddingNet, teacher: NetworkFacts, report: Reporter) -> None:
    """Note that a student is as large as its teacher, except in self-distillation (the same network)."""
    count = student.parameter_count()
    same = (settings.base, settings.embedding_size) == (teacher.base, teacher.embedding_size)
    if same or not teacher.parameters or count < _AS_LARGE * teacher.parameters:
        return
    is_known = settings.base != _SMALLER and teacher.parameters >= _NEEDS_SMALLER.start
    report(
        Note(
            f"the student {settings.base} has {count / 1e6:.1f} M parameters, the teacher {teacher.base} "
            f"{teacher.parameters / 1e6:.1f} M. Choose a smaller --base{f', such as {_SMALLER},' if is_known else ''} "
            "unless that is intended."
        )
    )


def flags_of_next(settings: TeacherSettings | DistillSettings, model: EmbeddingNet) -> dict[str, object]:
    """The flags that a student of this run, or another command on its images, needs."""
    names = ["dataset", "data", "resize", "image_size", "max_pixels", "skip_damaged", "select_on", "fold"]
    usual = {name: field.default for name, field in DistillSettings.model_fields.items()}
    found: dict[str, object] = {}
    recipe = student_recipe(dict(settings)) if isinstance(settings, TeacherSettings) else None
    if recipe:
        found["config"], usual = recipe, usual | recipe_settings(recipe)
    elif model.parameter_count() in _NEEDS_SMALLER:
        found["base"] = _SMALLER  # the default is as large
    values = {name: getattr(settings, name) for name in names}
    if settings.fit != fit_of(settings.dataset):
        values["fit"] = settings.fit
    if settings.weights == "none":  # a weights file does not fit the next network
        values["weights"] = "none"
    return found | {name: value for name, value in values.items() if value != usual[name]}
