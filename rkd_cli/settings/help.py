"""How flags are shown: panels, texts and defaults of ``--help`` and of the manual's page of flags."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rkd_cli.settings.inference import ImageSettings, ReportSettings
from rkd_cli.settings.training import TrainSettings
from rkd_cli.settings.utilities import BenchSettings

ADVANCED = "Advanced"  # panels whose title starts with this are shown by --help-all only

# panels in the order of --help
_PANELS = (
    "Data", "Source", "Model", "Measure", "Loss", "Distillation", "Teacher's space", "Optimization", "Run",
)  # fmt: skip

# flags of trainings that --help shows, in this order; all others are advanced
_COMMON = (
    "teacher", "dataset", "data", "base", "weights", "embedding_size", "l2normalize", "loss", "dist_ratio",
    "angle_ratio", "epochs", "batch", "lr", "save_dir", "resume", "overwrite", "device",
)  # fmt: skip

# advanced flags of the other commands with many flags
_RARE = (
    "resize", "image_size", "workers", "cache", "cache_dir", "skip_damaged", "batch", "precision", "base",
    "embedding_size", "calibration_images", "num_image_per_class", "compile", "nproc", "l2normalize",
    "fit", "max_pixels", "bootstrap_seed", "input", "fp16",
)  # fmt: skip


def _panel(field: FieldInfo) -> str:
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra["panel"])


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The values of a Literal field; empty for other fields."""
    for kind in (field.annotation, *(get_args(field.annotation) if field.default is None else ())):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def default_text(field: FieldInfo) -> str:
    """The default of a field as help and manual show it; empty if there is none."""
    default = "required" if field.is_required() else field.default
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else f"{default}"


def help_text(field: FieldInfo) -> str:
    """The help of a field, with its choices."""
    choices = choices_of(field)
    return f"{field.description} One of {', '.join(choices)}." if choices else f"{field.description}"


def help_panels(model: type[BaseModel]) -> dict[str, str]:
    """{field: panel} of a command's settings, in the order of its help; ``ADVANCED`` panels are for ``--help-all``."""
    of = {name: _panel(field) for name, field in model.model_fields.items()}
    ordered = sorted(of, key=lambda name: _PANELS.index(of[name]))
    if issubclass(model, TrainSettings):
        common = [name for name in _COMMON if name in of]
        return dict.fromkeys(common, "Common") | {
            name: f"{ADVANCED}: {of[name].lower()}" for name in ordered if name not in common
        }
    rare = _RARE if issubclass(model, ImageSettings | BenchSettings | ReportSettings) else ()
    return {name: of[name] for name in ordered if name not in rare} | {
        name: ADVANCED for name in ordered if name in rare
    }
