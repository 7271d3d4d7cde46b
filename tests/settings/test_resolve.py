"""Settings: defaults of the paper, every wrong value named in one go, configuration files under the flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rkd_cli.errors import SettingsError
from rkd_cli.settings import DistillSettings, EvaluateSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve

TEACHER = {"teacher": "t.safetensors"}
TEACHERS = {"teacher", "combine", "teacher_weights", "teacher_views", "views_precision"}


# every default that decides what is computed, as the paper and its published scripts have it
PROTOCOL: dict[str, Any] = {
    "dataset": "auto", "resize": 256, "image_size": 224, "weights": "imagenet", "load": None, "batch": 128,
    "num_image_per_class": 5, "iter_per_epoch": 100, "optimizer": "adam", "weight_decay": 1e-5, "schedule": "step",
    "warmup": 0, "crop": "random", "crop_scale": 0.25, "jitter": 0, "recall": (1, 2, 4, 8), "eval_every": 1,
    "eval_train": True, "select_on": "eval", "fold": None, "select_by": None, "patience": None, "jobs": 1,
    "skip_damaged": False, "labels": True, "matryoshka": (), "chunk": 0,
    "sync_bn": False, "init": "random", "freeze_bn": False, "backbone_lr": None, "fit": "auto",
}  # fmt: skip
TEACHER_PROTOCOL = PROTOCOL | {
    "base": "resnet50", "embedding_size": 512, "l2normalize": True, "loss": "l2_triplet", "sample": "distance",
    "margin": 0.2, "freeze_base": False, "views": 8, "ms_alpha": 2, "ms_beta": 50, "ms_base": 0.5, "ms_epsilon": 0.1,
    "proxy_alpha": 32, "proxy_margin": 0.1, "proxy_lr_ratio": 100, "softmax_temperature": 0.05, "arcface_scale": 64,
    "arcface_margin": 0.5, "ap_temperature": 0.01, "lr": 1e-5,
    "lr_decay_epochs": (25, 30, 35), "lr_decay_gamma": 0.5, "epochs": 40,
}  # fmt: skip
STUDENT_PROTOCOL = PROTOCOL | {
    "base": "resnet18", "embedding_size": 64, "l2normalize": False, "dist_ratio": 1, "angle_ratio": 2,
    "triplet_ratio": 0, "triplet_sample": "distance", "triplet_margin": 0.2, "dark_ratio": 0, "dark_alpha": 3,
    "dark_beta": 3, "at_ratio": 0, "fitnet_ratio": 0, "hint_epochs": 0, "relaxed_ratio": 0, "pkt_ratio": 0,
    "mixup": 0, "match_ratio": 0, "match_kind": "cosine", "csd_ratio": 0, "csd_temperature": 1,
    "csd_teacher_temperature": 0.01, "csd_neighbors": 255, "queue_ratio": 0, "queue_temperature": 0.07, "d3_ratio": 0,
    "d3_neighbors": 9, "d3_feature": 100, "d3_inconsistent": 5, "d3_consistent": 1, "queue_size": None,
    "lr": 1e-4, "lr_decay_epochs": (40, 60), "lr_decay_gamma": 0.1, "epochs": 80,
}  # fmt: skip
# of the machine and the moment, not of the experiment
ELSEWHERE = {
    "data", "nproc", "workers", "cache", "cache_dir", "seed", "save_dir", "overwrite", "resume", "save_every",
    "keep_state", "device",
    "log", "precision", "compile", "max_pixels",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "protocol", "required"),
    [
        (TeacherSettings(), TEACHER_PROTOCOL, set()),
        (DistillSettings(teacher="t.safetensors"), STUDENT_PROTOCOL, TEACHERS),
    ],
)
def test_defaults_are_the_papers(
    settings: TeacherSettings | DistillSettings, protocol: dict[str, Any], required: set[str]
) -> None:
    assert {name: getattr(settings, name) for name in protocol} == protocol
    assert set(type(settings).model_fields) == set(protocol) | ELSEWHERE | required, "a default that is pinned nowhere"


def test_flags_are_parsed_by_type() -> None:
    flags = {
        "lr": "5e-4",
        "lr_decay_epochs": "5, 7",
        "batch": "64",
        "l2normalize": False,
        "data": "2024",
        "recall": "10",
    }
    settings = resolve(TeacherSettings, flags)
    assert (settings.lr, settings.lr_decay_epochs, settings.batch, settings.l2normalize) == (5e-4, (5, 7), 64, False)
    assert settings.data == Path("2024")
    assert resolve(TeacherSettings, {"recall": "10"}).recall == (1, 10)
    assert resolve(TeacherSettings, {"lr_decay_epochs": ""}).lr_decay_epochs == ()
    assert resolve(TeacherSettings, {"workers": "0"}).workers == 0


def test_every_wrong_value_is_named_at_once() -> None:
    flags = {
        "batch": "0",
        "lr": "fast",
        "base": "a b",
        "epochs": "1.5",
        "margin": "nan",
        "lr_decay_epochs": "7,5",
        "device": "gpu",
        "recall": "0",
        "workers": "100000",
    }
    with pytest.raises(SettingsError) as caught:
        resolve(TeacherSettings, flags)
    problems = dict(problem.split(": ", 1) for problem in caught.value.problems)
    assert set(problems) == {f"--{name.replace('_', '-')}" for name in flags}
    assert problems["--batch"] == "must be at least 2, got 0"
    assert problems["--lr"] == "must be a number, got fast"
    assert problems["--epochs"] == "must be a whole number, got 1.5"
    assert problems["--base"] == "must be the name of a network, got a b"
    assert problems["--device"] == "must be auto, cpu, cuda or cuda:N, got gpu"
    assert problems["--lr-decay-epochs"] == "must be in ascending order, got 7,5"
    assert "\n" not in "".join(problems.values())


def test_what_contradicts_itself() -> None:
    with pytest.raises(SettingsError, match="--image-size 300: must be at most --resize 256"):
        resolve(TeacherSettings, {"image_size": "300"})
    with pytest.raises(SettingsError, match="Set at least one"):
        resolve(DistillSettings, TEACHER | {"dist_ratio": "0", "angle_ratio": "0"})
    with pytest.raises(SettingsError, match=r"--teacher: is required \(Teacher: a run directory"):
        resolve(DistillSettings, {})
    with pytest.raises(SettingsError, match=r"--save-dir run: contains the teacher run/best.safetensors"):
        resolve(DistillSettings, {"teacher_load": "run/best.safetensors", "save_dir": "run"})
    with pytest.raises(SettingsError, match=r"contains the teacher"):
        resolve(DistillSettings, {"teacher_load": "run/best.safetensors", "save_dir": str(Path("run").resolve())})
    for name in ("timm:resnet18", "hf:org/name"):  # not a file in the current folder
        assert resolve(DistillSettings, {"teacher": name, "save_dir": "."}).teacher == name
    with pytest.raises(SettingsError, match=r"--mixup: blended images have no label for --triplet-ratio"):
        resolve(DistillSettings, TEACHER | {"mixup": "1", "triplet_ratio": "0.1"})
    with pytest.raises(SettingsError, match=r"--warmup 5: must be less than --epochs 5"):
        resolve(TeacherSettings, {"warmup": "5", "epochs": "5"})
    for batch, images in (("4", "1"), ("4", "5")):
        with pytest.raises(SettingsError, match="contains no triplets"):
            resolve(TeacherSettings, {"batch": batch, "num_image_per_class": images})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        TeacherSettings().batch = 3  # type: ignore[misc]


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_configuration_file_lies_under_the_flags(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c.{suffix}"
    path.write_text(
        '{"batch": 60, "lr": 1, "recall": [1, 5]}' if suffix == "json" else "batch = 60\nlr = 1\nrecall = [1, 5]"
    )
    settings = resolve(TeacherSettings, {"batch": "70"}, path)
    assert (settings.batch, settings.lr, settings.recall) == (70, 1.0, (1, 5))


def test_saved_settings_come_back(tmp_path: Path) -> None:
    settings = resolve(DistillSettings, TEACHER | {"batch": "60", "workers": "1", "overwrite": True})
    path = tmp_path / "settings.json"
    path.write_text(settings.model_dump_json())
    assert "overwrite" not in json.loads(path.read_text())
    assert resolve(DistillSettings, {"overwrite": True}, path) == settings


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("c.toml", "btach = 60", "c.toml: unknown key btach. Did you mean batch?"),
        ("c.toml", "batch = '60'", "c.toml: batch must be a whole number, got 60"),
        ("c.toml", "batch = ", "c.toml: not TOML"),
        ("c.json", "{", "c.json: not JSON"),
        ("c.json", "[1]", "c.json: must contain one object"),
        ("c.json", '{"dist_ratio": 1}', "c.json: unknown key dist_ratio"),
        ("c.json", "\udcff", "c.json: not JSON"),
    ],
)
def test_wrong_configuration_is_one_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SettingsError) as caught:
        resolve(TeacherSettings, {}, path)
    (problem,) = caught.value.problems
    assert says in problem
    assert "\n" not in problem


def test_an_absent_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent.toml: no such file. `rkd recipes` lists"):
        resolve(EvaluateSettings, {}, tmp_path / "absent.toml")
