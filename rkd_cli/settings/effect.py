"""Flags that have an effect only together with others.

Without them, a flag on the command line is an error; a setting in a configuration file is not. A new flag must be
listed here, or in ``tests/settings/test_effect.py`` as always effective.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from pydantic import BaseModel

from rkd_cli.settings.distillation import DistillSettings
from rkd_cli.settings.inference import EmbedSettings, EvaluateSettings, ExportSettings, ReportSettings, SearchSettings
from rkd_cli.settings.names import flag_name
from rkd_cli.settings.training import TeacherSettings, TrainSettings
from rkd_cli.settings.utilities import BenchSettings, CacheSettings, CompareSettings, DownloadSettings

_Condition = Collection[object]
_Rule = Mapping[str, _Condition]


def _each(flags: str, rule: _Rule) -> dict[str, _Rule]:
    return dict.fromkeys(flags.split(), rule)


class _Several(tuple[str, ...]):
    """Any list of several names."""

    def __contains__(self, value: object) -> bool:
        return "," in str(value)


_ON: tuple[object, ...] = ()  # any true value
_CACHED: dict[str, _Condition] = {"cache": ("auto", "disk", "device")}

# {settings: {flag: {setting: values}}}: the flag has an effect if any of these settings has one of its values
NEEDS: dict[type[BaseModel], dict[str, _Rule]] = {
    TrainSettings: {
        "crop_scale": {"crop": ("resized",)},
        "lr_decay_gamma": {"lr_decay_epochs": _ON},
        "sync_bn": {"nproc": range(2, 10**5)},
        "cache_dir": _CACHED
        | {"freeze_base": _ON, "teacher_views": _ON, "init": ("pca", "teacher")},  # cached there too
    },
    TeacherSettings: {
        "views": {"freeze_base": _ON},
        **_each("sample margin", {"loss": ("l2_triplet", "l1_triplet", "contrastive")}),
        **_each("ms_alpha ms_beta ms_base ms_epsilon", {"loss": ("multi_similarity",)}),
        **_each("proxy_alpha proxy_margin", {"loss": ("proxy_anchor",)}),
        "proxy_lr_ratio": {"loss": ("proxy_anchor", "softmax", "arcface")},
        "softmax_temperature": {"loss": ("softmax",)},
        **_each("arcface_scale arcface_margin", {"loss": ("arcface",)}),
        "ap_temperature": {"loss": ("smooth_ap",)},
    },
    DistillSettings: {
        "combine": {"teacher": _Several(["A,B"])},
        "views_precision": {"teacher_views": _ON},
        **_each("triplet_sample triplet_margin", {"triplet_ratio": _ON}),
        **_each("dark_alpha dark_beta", {"dark_ratio": _ON}),
        "match_kind": {"match_ratio": _ON},
        **_each("csd_temperature csd_teacher_temperature csd_neighbors", {"csd_ratio": _ON}),
        "queue_temperature": {"queue_ratio": _ON},
        **_each("d3_neighbors d3_feature d3_inconsistent d3_consistent", {"d3_ratio": _ON}),
        "queue_size": {"csd_ratio": _ON, "queue_ratio": _ON, "d3_ratio": _ON},
    },
    EvaluateSettings: {
        "cache_dir": _CACHED,
        "query": {"gallery": _ON},
        "bootstrap_seed": {"bootstrap": _ON},
    },
    EmbedSettings: {"cache_dir": _CACHED, "half_whiten": {"pca": _ON}},
    ReportSettings: {"cache_dir": _CACHED},
    ExportSettings: {"cache_dir": _CACHED, "calibration_images": {"int8": _ON}},
    SearchSettings: {
        "threshold": {"duplicates": _ON},
        **_each("top exact", {"query": _ON}),
        "overwrite": {"html": _ON},
    },
    CompareSettings: {"overwrite": {"csv": _ON, "html": _ON}, **_each("data device", {"concatenate": _ON})},
    BenchSettings: {
        "dataset": {"parts": ("step", "epoch", "loader", "gpu")},
        "data": {"parts": ("step", "epoch", "loader", "gpu", "recipe")},
        **_each(
            "resize image_size workers teacher_base base batch num_image_per_class lr",
            {"parts": ("step", "epoch")},
        ),
        "freeze_bn": {"parts": ("step", "epoch", "gpu")},
        "iter_per_epoch": {"parts": ("epoch",)},
        "repeats": {"parts": ("angle", "distance", "miners", "recall", "loader", "step", "epoch")},
        **_each("precision compile", {"parts": ("step", "epoch", "recipe", "gpu")}),
    },
}

# the same for flags that have no effect with a setting
UNUSED_WITH: dict[type[BaseModel], dict[str, _Rule]] = {
    TrainSettings: {
        "weights": {"load": _ON},
        "freeze_bn": {"weights": ("none",)},
        "init": {"weights": ("none",), "load": _ON},
        **_each("lr_decay_epochs lr_decay_gamma", {"schedule": ("cosine",)}),
        **_each("sync_bn compile", {"freeze_base": _ON}),
    },
    DistillSettings: {
        "labels": {"dataset": ("images",)},
        **_each("num_image_per_class recall", {"labels": (False,), "dataset": ("images",)}),
    },
    EvaluateSettings: {"dataset": {"query": _ON}},
    ExportSettings: {
        **_each(
            "to input int8 int8_weights fp16 calibration_images dataset data resize image_size fit max_pixels workers "
            "cache skip_damaged batch weights l2normalize recall teacher_space",
            {"snippet": _ON},
        ),
        "overwrite": {"to": ("timm", "sentence-transformers"), "snippet": _ON},
    },
    CacheSettings: {"cache_dir": {"folders": _ON}},
    DownloadSettings: {"url": {"archive": _ON}},
}


def without_effect(model: type[BaseModel], values: Mapping[str, object], flags: Iterable[str]) -> dict[str, str]:
    """{flag: reason} of the flags that have no effect with these values; dependencies on other settings are ignored."""
    found = {}
    for flag in flags:
        if not values.get(flag, True) and values[flag] == model.model_fields[flag].default:
            continue  # off by default
        for kind in model.__mro__:
            needed = NEEDS.get(kind, {}).get(flag, {})
            known = {name: some for name, some in needed.items() if name in values}
            if known and not any(_holds(values[name], some) for name, some in known.items()):
                without = " or ".join(_shown(name, some) for name, some in known.items())
                found[flag] = f"has no effect without {without}. Add it, or omit {flag_name(flag)}."
            for name, some in UNUSED_WITH.get(kind, {}).get(flag, {}).items():
                # unless that setting has no effect itself, as --weights with --load
                if name in values and _holds(values[name], some) and not without_effect(model, values, [name]):
                    found[flag] = f"has no effect with {_shown(name, some)}. Omit one of them."
    return found


def _holds(value: object, some: _Condition) -> bool:
    if isinstance(value, list | tuple) and some:
        return any(one in some for one in value)
    return value in some if some else bool(value)


def _shown(name: str, some: _Condition) -> str:
    flag = flag_name(name)
    if isinstance(some, range):
        return f"{flag} {some.start} or more"
    if some == (False,):
        return flag.replace("--", "--no-", 1)
    *most, last = map(str, some) if some else [""]
    values = f"{', '.join(most)} or {last}" if most else last
    words = {"parts": f"PART {values}", "folders": "FOLDER"}
    return words.get(name) or f"{flag} {values}".strip()
