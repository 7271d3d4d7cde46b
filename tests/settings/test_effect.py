"""Flags of the command line: each given once, and none that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from rkd_cli.cli import app
from rkd_cli.errors import SettingsError
from rkd_cli.settings import (
    NEEDS,
    UNUSED_WITH,
    BenchSettings,
    CacheSettings,
    CheckSettings,
    CompareSettings,
    DemoSettings,
    DistillSettings,
    DownloadSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    ImportSettings,
    PushSettings,
    ReportSettings,
    SearchSettings,
    ServeSettings,
    TeacherSettings,
    flag_name,
    without_effect,
)
from rkd_cli.settings.resolve import check_effect, resolve

Rkd = Callable[..., tuple[int, str, str]]

COMMANDS: Any = typer.main.get_command(app)


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_every_option_given_twice_is_refused_by_name(name: str) -> None:
    """By its other spelling too: --flag and --no-flag."""
    command = COMMANDS.commands[name]
    arguments = ["x"] * sum(p.required for p in command.params if p.param_type_name == "argument")
    for option in command.params:
        if option.param_type_name == "option" and not option.is_eager and not option.multiple:
            words = [*option.opts, *option.secondary_opts]
            values = [] if option.is_flag else ["1"]
            with pytest.raises(SettingsError) as caught:
                command.make_context(name, [*arguments, words[0], *values, words[-1], *values])
            (problem,) = caught.value.problems
            assert problem.startswith(words[0]) and ": is given twice. " in problem


def test_all_that_are_given_twice_are_named_at_once(rkd: Rkd) -> None:
    words = ["--teacher", "A", "--seed", "1", "--recall", "1", "--teacher", "B", "--seed", "2", "--recall", "2"]
    code, _, err = rkd("distill", *words)
    assert code == 2
    assert err.splitlines() == [
        "rkd: error: --seed: is given twice. Omit one.",
        "rkd: error: --recall: is given twice. Give all values at once, separated by commas.",
    ]


def test_one_teacher_is_given_once(rkd: Rkd) -> None:
    code, _, err = rkd("distill", "--teacher", "A", "--teacher-load", "A")
    assert (code, err) == (2, "rkd: error: --teacher: A is given twice. Omit one\n")


@pytest.mark.parametrize("words", [["--teacher", "A", "--teacher", "B"], ["--teacher", "A,B"]])
def test_several_teachers_are_repeated_or_listed(rkd: Rkd, words: list[str]) -> None:
    _, _, err = rkd("distill", *words, "--combine", "averaged", "--csd-ratio", "1")
    assert err == "rkd: error: --csd-ratio: needs one space of all teachers. Use --combine joined.\n"


def test_a_name_that_json_holds_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"batch": 60, "lr": 1, "batch": 80}')
    with pytest.raises(SettingsError, match=r"c\.json: not JSON \(batch given twice\)"):
        resolve(TeacherSettings, {}, tmp_path / "c.json")


# what a command cannot be resolved without
REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    DistillSettings: {"teacher": "t"},
    EmbedSettings: {"out": "o.npz"},
    ExportSettings: {"out": "o.onnx"},
    SearchSettings: {"gallery": "g", "query": "q"},
    ServeSettings: {"gallery": "g"},
}
MODELS: tuple[type[BaseModel], ...] = (
    TeacherSettings, DistillSettings, EvaluateSettings, EmbedSettings, ExportSettings, SearchSettings, ServeSettings,
    CheckSettings, CompareSettings, ReportSettings, PushSettings, CacheSettings, ImportSettings, DemoSettings,
    BenchSettings, DownloadSettings,
)  # fmt: skip

# flags that change what is computed, read, written or shown, whatever the others are; or of which the others are an
# error, with a line of its own
ALWAYS: dict[type[BaseModel], str] = {
    TeacherSettings: (
        "dataset data labels resize image_size fit max_pixels crop jitter workers cache skip_damaged base "
        "embedding_size l2normalize "
        "load matryoshka optimizer lr schedule warmup weight_decay epochs iter_per_epoch batch num_image_per_class "
        "chunk seed save_dir overwrite resume save_every keep_state log device "
        "nproc precision recall eval_every eval_train "
        "select_on fold select_by patience jobs freeze_base backbone_lr loss"
    ),
    DistillSettings: (
        "dataset data resize image_size fit max_pixels crop jitter workers cache skip_damaged base embedding_size "
        "l2normalize load "
        "matryoshka optimizer lr schedule warmup weight_decay epochs iter_per_epoch batch chunk seed save_dir "
        "overwrite resume save_every keep_state log device "
        "nproc precision compile eval_every eval_train select_on fold "
        "select_by patience jobs teacher "
        "teacher_weights teacher_views mixup dist_ratio angle_ratio triplet_ratio dark_ratio at_ratio "
        "fitnet_ratio hint_epochs relaxed_ratio pkt_ratio match_ratio csd_ratio queue_ratio d3_ratio "
        "backbone_lr"
    ),
    EvaluateSettings: (
        "data resize image_size fit max_pixels workers cache skip_damaged batch weights l2normalize device precision "
        "base "
        "embedding_size gallery nproc dims vectors recall bootstrap"
    ),
    EmbedSettings: (
        "data resize image_size fit max_pixels workers cache skip_damaged batch weights l2normalize device precision "
        "dataset pca out "
        "overwrite nproc vectors"
    ),
    ExportSettings: "snippet out",
    SearchSettings: (
        "data resize image_size fit max_pixels workers cache cache_dir skip_damaged batch weights l2normalize device "
        "precision "
        "gallery query duplicates asymmetric html"
    ),
    ServeSettings: (
        "data resize image_size fit max_pixels workers cache cache_dir skip_damaged batch weights l2normalize device "
        "precision gallery top threshold asymmetric host port token max_upload"
    ),
    CheckSettings: "dataset data max_pixels workers",
    CompareSettings: "csv html concatenate",
    ReportSettings: "data max_pixels workers cache skip_damaged batch gallery map seed out overwrite device precision",
    PushSettings: "private",
    CacheSettings: "cache_dir clear",
    ImportSettings: "base embedding_size l2normalize resize image_size dataset output overwrite",
    DemoSettings: "data workers seed save_dir overwrite device",
    BenchSettings: "seed quick out device",
    DownloadSettings: "data archive md5",
}


def chosen(model: type[BaseModel], flags: dict[str, Any], config: Path | None = None) -> None:
    """As the command line does."""
    check_effect(resolve(model, flags, config), flags)


def rules(model: type[BaseModel], tables: Mapping[type[BaseModel], Mapping[str, Any]]) -> dict[str, Any]:
    """Those of a command, its own and those that it shares."""
    return {
        flag: rule
        for kind in model.__mro__
        for flag, rule in tables.get(kind, {}).items()
        if any(name in model.model_fields or name == "parts" for name in rule)
    }


@pytest.mark.parametrize("model", MODELS)
def test_each_flag_is_known_to_have_an_effect_always_or_beside_others(model: type[BaseModel]) -> None:
    """A new one has to be put there: into the tables of settings/effect.py, or above."""
    ruled = rules(model, NEEDS) | rules(model, UNUSED_WITH)
    assert set(ruled) & set(ALWAYS[model].split()) == set()
    assert set(ruled) | set(ALWAYS[model].split()) == set(model.model_fields)


def test_every_command_is_looked_at() -> None:
    found = {tuple(sorted(model.model_fields)) for model in MODELS}
    for name, command in COMMANDS.commands.items():
        options = {p.name for p in command.params if p.param_type_name == "option"}
        fields = tuple(sorted(options - {"config", "dry_run", "quiet", "json", "help", "help_all"}))
        assert not fields or fields in found, name


def on(name: str) -> Any:
    """A value that turns a setting on."""
    return {"html": Path("h"), "csv": Path("c"), "query": Path("q"), "load": Path("l"), "archive": Path("a")}.get(
        name, (5,) if name == "lr_decay_epochs" else 1
    )


CASES = [
    pytest.param(model, flag, name, some, unused, id=f"{model.__name__} {flag} {name}")
    for tables, unused in ((NEEDS, False), (UNUSED_WITH, True))
    for model in MODELS
    for flag, rule in rules(model, tables).items()
    for name, some in rule.items()
    if name in model.model_fields or name == "parts"
]


@pytest.mark.parametrize(("model", "flag", "name", "some", "unused"), CASES)
def test_a_flag_without_effect_is_refused_and_one_with_is_not(
    model: type[BaseModel], flag: str, name: str, some: Any, unused: bool
) -> None:
    """Beside each value of each setting that its rule names, all other settings as if none had an effect."""
    off: dict[str, Any] = {
        other: ["none of them"] if other == "parts" else "other" if values and len(values) else 0
        for table in (NEEDS, UNUSED_WITH)
        for other, values in rules(model, table).get(flag, {}).items()
    } | ({"labels": True} if unused else {})
    if "lr_decay_epochs" in off:
        off["lr_decay_epochs"] = (5,) if unused else ()
    if unused:  # what it needs is there
        off |= {other: next(iter(v)) if v else on(other) for other, v in rules(model, NEEDS).get(flag, {}).items()}
    given = {flag: "given"}
    for value in islice(some, 9) if some else [on(name)]:
        beside = {name: [value] if name == "parts" else value}
        complaints = [without_effect(model, off | given | what, [flag]) for what in ({}, beside)]
        expected, refused = complaints if not unused else complaints[::-1]
        assert set(expected) == {flag}, "without"
        assert refused == {}, "with"
        shown = "PART" if name == "parts" else flag_name(name).removeprefix("--")
        assert shown in expected[flag]
        assert "\n" not in expected[flag]


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        (TeacherSettings, {"crop_scale": "0.5"}, "--crop-scale: has no effect without --crop resized. Add it, or"),
        (TeacherSettings, {"proxy_lr_ratio": "10"}, "without --loss proxy_anchor, softmax or arcface. Add it"),
        (TeacherSettings, {"margin": "0.2", "loss": "softmax"}, "--margin: has no effect without --loss l2_triplet"),
        (TeacherSettings, {"views": "8"}, "--views: has no effect without --freeze-base"),
        (TeacherSettings, {"lr_decay_gamma": "0.1", "schedule": "cosine"}, "has no effect with --schedule cosine"),
        (TeacherSettings, {"sync_bn": True}, "--sync-bn: has no effect without --nproc 2 or more"),
        (TeacherSettings, {"weights": "none", "load": "l"}, "--weights: has no effect with --load. Omit one of them"),
        (DistillSettings, {"triplet_margin": "0.3"}, "--triplet-margin: has no effect without --triplet-ratio"),
        (DistillSettings, {"queue_size": "9"}, "without --csd-ratio or --queue-ratio or --d3-ratio. Add it"),
        (DistillSettings, {"num_image_per_class": "3", "labels": False}, "has no effect with --no-labels"),
        (DistillSettings, {"num_image_per_class": "3", "dataset": "images"}, "has no effect with --dataset images"),
        (DistillSettings, {"cache_dir": "c", "cache": "none"}, "--cache-dir: has no effect without --cache auto, disk"),
        (ExportSettings, {"calibration_images": "8"}, "--calibration-images: has no effect without --int8"),
        (
            ExportSettings,
            {"overwrite": True, "to": "timm", "out": "o"},
            "no effect with --to timm or sentence-transformers",
        ),
        (SearchSettings, {"threshold": "0.9"}, "--threshold: has no effect without --duplicates"),
        (CompareSettings, {"overwrite": True}, "--overwrite: has no effect without --csv or --html"),
        (DownloadSettings, {"url": "u", "archive": "a"}, "--url: has no effect with --archive. Omit one of them."),
    ],
)
def test_what_a_command_line_is_refused_for(model: type[BaseModel], flags: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        chosen(model, REQUIRED.get(model, {}) | flags)
    (problem,) = caught.value.problems
    assert says in problem


def test_flags_that_have_an_effect_or_turn_off_what_is_off_are_taken() -> None:
    taken: list[dict[str, Any]] = [
        {"crop_scale": "0.5", "crop": "resized"},
        {"sync_bn": True, "nproc": "2"},
        {"sync_bn": False},
        {"cache_dir": "c", "cache": "none", "freeze_base": True},
        {"proxy_lr_ratio": "10", "loss": "arcface"},
    ]
    for flags in taken:
        chosen(TeacherSettings, flags)


def test_synchronized_batch_norms_are_taken_of_processes_that_torchrun_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "localhost"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    chosen(TeacherSettings, {"sync_bn": True})


@pytest.mark.parametrize("model", [TeacherSettings, DistillSettings])
def test_a_configuration_file_may_hold_what_has_no_effect(tmp_path: Path, model: type[BaseModel]) -> None:
    """As settings.json does, and recipes."""
    path = tmp_path / "settings.json"
    path.write_text(resolve(model, REQUIRED.get(model, {})).model_dump_json())
    assert len(json.loads(path.read_text())) > 40
    chosen(model, {"epochs": "99"}, path)


def test_what_a_part_of_a_benchmark_does_not_use_is_refused(rkd: Rkd) -> None:
    code, _, err = rkd("bench", "angle", "--iter-per-epoch", "3", "--batch", "8", "--quick")
    assert code == 2
    assert "--iter-per-epoch: has no effect without PART epoch" in err
    assert "--batch: has no effect without PART step or epoch" in err
