"""The built-in recipes: what each one computes, against the numbers of the paper and its published scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rkd_cli.commands.compare import read_settings
from rkd_cli.errors import SettingsError
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.recipes import recipe_names, recipe_settings, recipes
from rkd_cli.settings.resolve import resolve

RECIPES = {recipe.name: recipe for recipe in recipes()}
PUBLISHED = {
    "cub200-teacher": 61.24, "cub200-student-16": 48.14, "cub200-student-32": 54.88, "cub200-student-64": 58.68,
    "cub200-student-128": 60.67, "cub200-self-distillation": 65.68, "cub200-fitnet": 51.92, "cub200-attention": 50.81,
    "cub200-darkrank": 56.30, "cars196-teacher": 77.17, "cars196-student-16": 66.04, "cars196-student-32": 74.80,
    "cars196-student-64": 80.17, "cars196-student-128": 82.50, "cars196-self-distillation": 85.65,
    "cars196-fitnet": 70.67, "cars196-attention": 67.24, "cars196-darkrank": 76.20, "sop-teacher": 76.58,
    "sop-self-distillation": 77.61, "sop-student-64": None, "patient": None, "d3still": None, "quick-teacher": None,
    "quick-student": None,
    # Kim et al., CVPR 2021, table of ResNet50-512 to ResNet18-128
    "cub200-proxy-teacher": 69.9, "cars196-proxy-teacher": 87.7, "sop-proxy-teacher": 80.5,
    "cub200-relaxed-student": 66.6, "cars196-relaxed-student": 86.0, "sop-relaxed-student": 78.4,
}  # fmt: skip

# section 4.1 of the paper and the published scripts, as numbers; nothing here comes from the program
COMMON: dict[str, Any] = {
    "resize": 256, "image_size": 224, "crop": "random", "jitter": 0, "weights": "imagenet", "load": None, "batch": 128,
    "num_image_per_class": 5, "optimizer": "adam", "weight_decay": 1e-5, "schedule": "step", "warmup": 0,
    "recall": (1, 2, 4, 8), "eval_every": 1, "eval_train": True, "select_on": "eval",
}  # fmt: skip
TEACHER = COMMON | {
    "base": "resnet50", "embedding_size": 512, "l2normalize": True, "loss": "l2_triplet", "margin": 0.2,
    "sample": "distance-published", "epochs": 40, "lr": 1e-5, "lr_decay_epochs": (25, 30, 35), "lr_decay_gamma": 0.5,
    "iter_per_epoch": 100,
}  # fmt: skip
STUDENT = COMMON | {
    "base": "resnet18", "embedding_size": 64, "l2normalize": False, "dist_ratio": 1, "angle_ratio": 2,
    "triplet_ratio": 0, "dark_ratio": 0, "at_ratio": 0, "fitnet_ratio": 0, "hint_epochs": 0, "relaxed_ratio": 0,
    "pkt_ratio": 0, "mixup": 0, "epochs": 80, "lr": 1e-4, "lr_decay_epochs": (40, 60), "lr_decay_gamma": 0.1,
    "iter_per_epoch": 100,
}  # fmt: skip
TRIPLET = STUDENT | {
    "l2normalize": True, "dist_ratio": 0, "angle_ratio": 0, "triplet_ratio": 1, "triplet_margin": 0.2,
    "triplet_sample": "distance-published",
}  # fmt: skip
SOP = {"epochs": 120, "lr_decay_epochs": (40, 80), "iter_per_epoch": 500}
IN_SPACE = {
    "embedding_size": 512, "l2normalize": True, "dist_ratio": 0, "angle_ratio": 0, "d3_ratio": 0.2, "queue_size": 2048,
}  # fmt: skip
PATIENT = IN_SPACE | {
    "crop": "resized", "crop_scale": 0.5, "optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.01, "schedule": "cosine",
    "warmup": 5, "epochs": 240, "teacher_views": 16,
}  # fmt: skip
PROXY = COMMON | {  # the commands of the repositories of proxy-anchor and of label relaxation
    "base": "resnet50", "embedding_size": 512, "l2normalize": False, "loss": "proxy_anchor", "optimizer": "adamw",
    "lr": 1e-4, "weight_decay": 1e-4, "lr_decay_gamma": 0.5, "freeze_bn": True, "epochs": 60, "batch": 120,
    "proxy_alpha": 32, "proxy_margin": 0.1, "proxy_lr_ratio": 100,
}  # fmt: skip
RELAXED = COMMON | {
    "base": "resnet18", "embedding_size": 128, "l2normalize": False, "dist_ratio": 0, "angle_ratio": 0,
    "relaxed_ratio": 1, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-4, "schedule": "cosine", "epochs": 90,
    "batch": 2 * 90, "num_image_per_class": 2 * 2,
}  # fmt: skip
QUICK = {
    "resize": 182, "image_size": 160, "embedding_size": 128, "batch": 64, "iter_per_epoch": 40, "eval_train": False,
    "schedule": "cosine", "freeze_bn": True, "init": "pca",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "teacher": TEACHER,
    "student-16": STUDENT | {"embedding_size": 16},
    "student-32": STUDENT | {"embedding_size": 32},
    "student-64": STUDENT,
    "student-128": STUDENT | {"embedding_size": 128},
    "self-distillation": STUDENT | {"base": "resnet50", "embedding_size": 512},
    "attention": TRIPLET | {"at_ratio": 50},
    "darkrank": TRIPLET | {"dark_ratio": 1, "dark_alpha": 3, "dark_beta": 3},
    "fitnet": TRIPLET | {"fitnet_ratio": 1, "hint_epochs": 80, "epochs": 120, "lr_decay_epochs": (80,)},
}
EXPECTED = {
    f"{dataset}-{family}": dict(values) for dataset in ("cub200", "cars196") for family, values in FAMILIES.items()
}
EXPECTED |= {
    "sop-teacher": TEACHER | {"iter_per_epoch": 1000},
    "sop-student-64": STUDENT | SOP,
    "sop-self-distillation": FAMILIES["self-distillation"] | SOP,
    "cub200-proxy-teacher": PROXY | {"lr_decay_epochs": tuple(range(5, 60, 5)), "iter_per_epoch": 5864 // 120},
    "cars196-proxy-teacher": PROXY | {"lr_decay_epochs": (10, 20, 30, 40, 50), "iter_per_epoch": 8054 // 120},
    "sop-proxy-teacher": PROXY | {
        "lr_decay_epochs": (20, 40), "iter_per_epoch": 59551 // 120, "l2normalize": True, "lr": 6e-4,
        "lr_decay_gamma": 0.25, "freeze_bn": False,
    },
    "cub200-relaxed-student": RELAXED | {"iter_per_epoch": 5864 // 90},
    "cars196-relaxed-student": RELAXED | {"iter_per_epoch": 8054 // 90},
    "sop-relaxed-student": RELAXED | {"iter_per_epoch": 59551 // 90, "epochs": 150},
    "patient": STUDENT | PATIENT,
    "d3still": STUDENT | IN_SPACE,
    "quick-teacher": COMMON | QUICK | {
        "base": "resnet18", "l2normalize": True, "loss": "multi_similarity", "epochs": 8, "lr": 1e-4,
        "eval_every": 2,
    },
    "quick-student": STUDENT | QUICK | {
        "base": "mobilenet_v3_small", "l2normalize": True, "teacher_views": 8, "epochs": 12, "lr": 1e-4,
        "eval_every": 4,
    },
}  # fmt: skip


def resolved(name: str, flags: Mapping[str, object] | None = None) -> TeacherSettings | DistillSettings:
    if RECIPES[name].command == "train-teacher":
        return resolve(TeacherSettings, flags or {}, Path(name))
    return resolve(DistillSettings, flags or {}, Path(name))


def test_recipes_aim_at_the_papers_figures() -> None:
    assert {name: recipe.published for name, recipe in RECIPES.items()} == PUBLISHED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_is_the_papers_protocol(name: str) -> None:
    settings = resolved(name)
    assert {key: getattr(settings, key) for key in EXPECTED[name]} == EXPECTED[name]
    family = name.split("-")[0] if "-" in name else "cub200"
    assert (settings.dataset, str(settings.save_dir)) == ({"quick": "auto"}.get(family, family), name)
    if isinstance(settings, DistillSettings):
        kind = "-proxy" if "relaxed" in name else ""
        assert settings.teacher == f"{family}{kind}-teacher/best.safetensors"


def test_there_is_no_recipe_that_is_not_pinned_here() -> None:
    assert set(recipe_names()) == set(EXPECTED) == set(PUBLISHED)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_says_of_itself_is_what_it_does(name: str) -> None:
    recipe, settings = RECIPES[name], resolved(name)
    titles = {"cub200": "CUB-200-2011", "cars196": "Cars 196", "sop": "Stanford Online Products"}
    titles["auto"] = "Your photos"
    network = settings.base.replace("resnet", "ResNet")
    role = "teacher" if recipe.command == "train-teacher" else "student"
    assert recipe.what.startswith(f"{titles[settings.dataset]}: {network}-{settings.embedding_size} {role}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_batch_is_nobodys_choice(name: str, tmp_path: Path) -> None:
    """So that a small set can make it smaller, but not what a flag or a file says."""
    settings = resolved(name)
    assert "batch" not in settings.model_fields_set
    assert "batch" in resolved(name, {"batch": "32"}).model_fields_set
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    assert "batch" in resolve(type(settings), {}, tmp_path / "settings.json").model_fields_set


@pytest.mark.parametrize("name", RECIPES)
def test_flags_go_above_a_recipe(name: str) -> None:
    settings = resolved(name, {"batch": "60"})
    assert settings.batch == 60
    assert settings.epochs == EXPECTED[name]["epochs"]


@pytest.mark.parametrize(("flag", "file"), [("teacher", "teacher_load"), ("teacher_load", "teacher")])
def test_a_teacher_by_either_flag_goes_above_the_files(tmp_path: Path, flag: str, file: str) -> None:
    (config := tmp_path / "run.toml").write_text(f'{file} = "filed.safetensors"\n')
    assert resolve(DistillSettings, {flag: "flagged.safetensors"}, config).teacher == "flagged.safetensors"
    assert resolve(DistillSettings, {}, config).teacher == "filed.safetensors"
    with pytest.raises(SettingsError, match="--teacher and --teacher-load are the same flag"):
        resolve(DistillSettings, {"teacher": "a", "teacher_load": "b"}, config)
    config.write_text('teacher = "a"\nteacher_load = "b"\n')
    with pytest.raises(SettingsError, match=r"run.toml: --teacher and --teacher-load are the same flag"):
        resolve(DistillSettings, {}, config)


def test_settings_of_an_older_run_name_the_teacher_by_its_other_spelling(tmp_path: Path) -> None:
    run = resolve(DistillSettings, {"teacher": "t.safetensors", "save_dir": str(tmp_path)})
    saved = run.model_dump(mode="json") | {"teacher": None, "teacher_load": "t.safetensors"}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    assert resolve(DistillSettings, {"resume": True, "save_dir": str(tmp_path)}).teacher == "t.safetensors"
    assert read_settings(tmp_path)["teacher"] == "t.safetensors"


def test_settings_are_a_copy() -> None:
    recipe_settings("cub200-teacher")["epochs"] = 1
    assert recipe_settings("cub200-teacher")["epochs"] == 40


def test_an_unknown_recipe_names_its_neighbors() -> None:
    with pytest.raises(SettingsError, match="Did you mean the recipe cub200-teacher"):
        resolve(TeacherSettings, {}, Path("cub200-teachr"))


@pytest.mark.parametrize(
    ("model", "name", "command"),
    [(TeacherSettings, "cub200-student-64", "distill"), (DistillSettings, "sop-teacher", "train-teacher")],
)
def test_a_recipe_of_another_command_says_whose_it_is(
    model: type[TeacherSettings] | type[DistillSettings], name: str, command: str
) -> None:
    with pytest.raises(SettingsError, match=f"^--config {name}: is a recipe for `rkd {command}`.$"):
        resolve(model, {}, Path(name))


def test_a_directory_may_bear_a_recipes_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cub200-teacher").mkdir()
    assert resolve(TeacherSettings, {}, Path("cub200-teacher")).sample == "distance-published"


def test_a_file_of_a_recipes_name_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cub200-teacher").write_text("batch = 60")
    settings = resolve(TeacherSettings, {}, Path("cub200-teacher"))
    assert (settings.batch, settings.sample) == (60, "distance")
