"""Settings of all commands: fields by concern, files and recipes under the flags."""

from __future__ import annotations

from rkd_cli.settings.training import (
    ADVANCED,
    CHANGE_ON_RESUME,
    COMMANDS,
    NEEDS,
    SPELLINGS,
    UNUSED_WITH,
    BenchSettings,
    CacheSettings,
    CheckSettings,
    CompareSettings,
    Dataset,
    DemoSettings,
    DistillSettings,
    DownloadSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    ImageSettings,
    ImportSettings,
    InferenceSettings,
    PushSettings,
    ReportSettings,
    Sample,
    SearchSettings,
    TeacherSettings,
    choices_of,
    default_text,
    flag_name,
    help_panels,
    help_text,
    one_spelling,
    without_effect,
)

__all__ = [
    "ADVANCED", "CHANGE_ON_RESUME", "COMMANDS", "NEEDS", "SPELLINGS", "UNUSED_WITH", "BenchSettings", "CacheSettings",
    "CheckSettings", "CompareSettings", "Dataset", "DemoSettings", "DistillSettings", "DownloadSettings",
    "EmbedSettings", "EvaluateSettings", "ExportSettings", "ImageSettings", "ImportSettings", "InferenceSettings",
    "PushSettings", "ReportSettings", "Sample", "SearchSettings", "TeacherSettings", "choices_of", "default_text",
    "flag_name", "help_panels", "help_text", "one_spelling", "without_effect",
]  # fmt: skip
