"""Settings of all commands: name, type, default, bounds and help of every flag, and the files under the flags."""

from __future__ import annotations

from rkd_cli.settings.distillation import DistillSettings
from rkd_cli.settings.effect import NEEDS, UNUSED_WITH, without_effect
from rkd_cli.settings.fields import Dataset, Settings
from rkd_cli.settings.help import ADVANCED, choices_of, default_text, help_panels, help_text
from rkd_cli.settings.inference import (
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    GallerySettings,
    ImageSettings,
    InferenceSettings,
    ReportSettings,
    SearchSettings,
    ServeSettings,
)
from rkd_cli.settings.names import SPELLINGS, flag_name, one_spelling
from rkd_cli.settings.training import CHANGE_ON_RESUME, Sample, TeacherSettings
from rkd_cli.settings.utilities import (
    BenchSettings,
    CacheSettings,
    CheckSettings,
    CompareSettings,
    DemoSettings,
    DownloadSettings,
    ImportSettings,
    PushSettings,
)

# in the order of `rkd --help`
COMMANDS: dict[str, type[Settings]] = {
    "train-teacher": TeacherSettings,
    "distill": DistillSettings,
    "demo": DemoSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "report": ReportSettings,
    "bench": BenchSettings,
    "embed": EmbedSettings,
    "export": ExportSettings,
    "search": SearchSettings,
    "serve": ServeSettings,
    "push": PushSettings,
    "check-data": CheckSettings,
    "download-cub": DownloadSettings,
    "import-checkpoint": ImportSettings,
    "cache": CacheSettings,
}

__all__ = [
    "ADVANCED", "CHANGE_ON_RESUME", "COMMANDS", "NEEDS", "SPELLINGS", "UNUSED_WITH", "BenchSettings", "CacheSettings",
    "CheckSettings", "CompareSettings", "Dataset", "DemoSettings", "DistillSettings", "DownloadSettings",
    "EmbedSettings", "EvaluateSettings", "ExportSettings", "GallerySettings", "ImageSettings", "ImportSettings",
    "InferenceSettings", "PushSettings", "ReportSettings", "Sample", "SearchSettings", "ServeSettings",
    "TeacherSettings", "choices_of", "default_text", "flag_name", "help_panels", "help_text", "one_spelling",
    "without_effect",
]  # fmt: skip
