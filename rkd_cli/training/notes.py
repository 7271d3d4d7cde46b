"""What a user should know before a training begins, and stops nothing."""

from __future__ import annotations

from collections.abc import Mapping

from rkd_cli.config.recipes import recipe_settings, student_recipe
from rkd_cli.data import ImageSet
from rkd_cli.data.splits import overlap, seen_note
from rkd_cli.embedding.embedder import Embedder
from rkd_cli.events import NetworkFacts, Note, Reporter
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import untrained_notes
from rkd_cli.models.sources import is_pretrained
from rkd_cli.schemas import Header, fit_of
from rkd_cli.settings import DistillSettings, TeacherSettings

LENGTHS_OPEN = (
    "--no-l2normalize: for {} only directions count, and lengths stay open; but figures are by Euclidean distance, as "
    "in `rkd search`: --l2normalize compares by cosine"
)
_AS_LARGE = 0.9  # of a teacher's parameters: such a student is not small
_SMALLER, _NEEDS_SMALLER = "mobilenet_v3_small", range(2_000_000, 12_500_000)  # parameters of such a teacher


def tell_of_teacher(
    settings: DistillSettings, source: Embedder, splits: Mapping[str, ImageSet], report: Reporter
) -> None:
    """Say where a teacher was trained otherwise than its student will be."""
    header = source.header
    if header is None or is_pretrained(source.name):
        return
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
    for note in notes:
        report(Note(note))
    tell_of_seen(f"the teacher {source.name}", header, splits, report)
    if settings.select_on == "val" and header.select_on == "eval" and not settings.without_labels:
        report(
            Note(
                "the teacher's own best epoch was picked on the evaluation classes, so this student's figures on them "
                "are not untouched by them: train the teacher with --select-on val too"
            )
        )


def tell_of_seen(who: str, header: Header, splits: Mapping[str, ImageSet], report: Reporter) -> None:
    """Name the classes that ``who`` was trained on and this run measures."""
    for split in ("eval", "val"):
        if split in splits and (classes := overlap(header.seen_classes, splits[split])):
            report(Note(seen_note(who, classes, splits[split].name)))


def tell_of_size(settings: DistillSettings, student: EmbeddingNet, teacher: NetworkFacts, report: Reporter) -> None:
    """Say that a student is as large as its teacher, unless it is the same network: self-distillation."""
    count = student.parameter_count()
    same = (settings.base, settings.embedding_size) == (teacher.base, teacher.embedding_size)
    if same or not teacher.parameters or count < _AS_LARGE * teacher.parameters:
        return
    report(
        Note(
            f"the student {settings.base} has {count / 1e6:.1f} M parameters, and its teacher {teacher.base} has "
            f"{teacher.parameters / 1e6:.1f} M: choose a smaller --base, for example {_SMALLER}, unless that is meant"
        )
    )


def flags_of_next(settings: TeacherSettings | DistillSettings, model: EmbeddingNet) -> dict[str, object]:
    """The flags that a student of this run, or another command on its images, has to be given."""
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
