"""``rkd_cli.distill`` and ``rkd_cli.train_teacher``: the runs of the commands, from Python."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import rkd_cli
from rkd_cli.data.members import GIVEN_TABLES
from rkd_cli.errors import DataError, RkdError, SettingsError
from rkd_cli.events import Event, RunDone, RunStarted

Rkd = Callable[..., tuple[int, str, str]]
NAME = "timm:test_resnet"
SMALL: dict[str, Any] = {
    "resize": 36, "image_size": 32, "epochs": 1, "iter_per_epoch": 2, "batch": 12, "num_image_per_class": 3,
    "lr_decay_epochs": (), "device": "cpu", "workers": 0,
}  # fmt: skip
FLAGS = [
    word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value if value != () else "")
]


class Photos(Dataset[tuple[Image.Image, int]]):
    """The images of class folders, as torchvision's ImageFolder gives them, opened when asked for."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(root.glob("*/*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file = self.files[index]
        return Image.open(file), self.classes.index(file.parent.name)


class Small(nn.Module):
    """A network of somebody's, from normalized images to embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Linear(8, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.layers(images).flatten(1))
        return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("api") / "photos", np.random.default_rng(0)
    for label in "abcdefgh":
        (root / label).mkdir(parents=True)
        color = random.integers(0, 256, 3)
        for number in range(4):
            pixels = (color + random.integers(-60, 60, (40, 48, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def teacher(photos: Path) -> rkd_cli.api.TrainedRun:
    pytest.importorskip("timm")
    place = photos.parent / "teacher"
    return rkd_cli.train_teacher(
        NAME, str(photos), weights="none", embedding_size=16, sample="all", save_dir=place, **SMALL
    )


def test_a_run_from_python_is_that_of_the_command(
    rkd: Rkd, photos: Path, teacher: rkd_cli.api.TrainedRun, tmp_path: Path
) -> None:
    """To the bit, with the images as a folder, a torch Dataset or a ``datasets.Dataset``."""
    run = tmp_path / "run"
    flags = ["--weights", "none", "--base", NAME, "--data", photos, "--teacher", teacher.directory, "--save-dir", run]
    code, _, err = rkd("distill", *flags, *FLAGS, "--quiet")
    assert code == 0, err
    due = load_file(run / "last.safetensors")
    given: dict[str, Any] = {"folder": photos, "torch": Photos(photos)}
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=Photos(photos).classes)})
    rows = {"image": [str(file) for file in Photos(photos).files], "label": [n // 4 for n in range(32)]}
    given["datasets"] = datasets.Dataset.from_dict(rows, kinds).select(range(31, -1, -1)).select(range(31, -1, -1))
    for name, images in given.items():
        found = rkd_cli.distill(teacher.model, NAME, images, weights="none", save_dir=tmp_path / name, **SMALL)
        weights = load_file(tmp_path / name / "last.safetensors")
        assert all(torch.equal(weights[key], due[key]) for key in due), name
        assert (tmp_path / name / "README.md").is_file()
        assert found.result.best["eval"].keys() == {"R@1", "R@2", "R@4", "R@8"}
    assert not GIVEN_TABLES  # the data sets are released


def test_the_model_of_a_run_is_its_best_checkpoint(photos: Path, teacher: rkd_cli.api.TrainedRun) -> None:
    files = sorted(photos.glob("*/*.jpg"))[:3]
    loaded = rkd_cli.load(teacher.directory, device="cpu")
    assert np.array_equal(teacher.model.embed(files), loaded.embed(files))
    assert teacher.model.digest == loaded.digest
    assert teacher.directory == photos.parent / "teacher"


def test_a_network_of_yours_is_trained_and_its_teacher_is_not(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teaching, student = Small().train(), Small()
    before, start = copy.deepcopy(teaching.state_dict()), copy.deepcopy(student.state_dict())
    events: list[Event] = []
    run = rkd_cli.distill(teaching, student, photos, save_dir=tmp_path / "s", report=events.append, lr=0.01, **SMALL)
    assert all(torch.equal(before[name], tensor) for name, tensor in teaching.state_dict().items())
    assert not torch.equal(start["last.weight"], load_file(tmp_path / "s/last.safetensors")["base.last.weight"])
    saved = load_file(tmp_path / "s/best.safetensors")
    assert torch.equal(saved["base.last.weight"], student.last.weight)
    assert (run.model.size, run.model.header.base, run.model.header.embedding_size) == (6, "Small", 6)
    # as the manual loads it in another session
    again = Small()
    again.load_state_dict({name.removeprefix("base."): tensor for name, tensor in saved.items()})
    files = sorted(photos.glob("*/*.jpg"))[:3]
    loaded = rkd_cli.load(again, resize=36, image_size=32, l2normalize=False)
    assert np.array_equal(loaded.embed(files), run.model.embed(files))
    assert isinstance(events[0], RunStarted | rkd_cli.events.Note)
    assert isinstance(events[-1], RunDone)
    assert capfd.readouterr() == ("", "")


def test_a_linear_layer_of_the_size_asked_for_is_added(photos: Path, tmp_path: Path) -> None:
    run = rkd_cli.distill(Small(), Small(), photos, embedding_size=4, save_dir=tmp_path / "s", **SMALL)
    assert run.model.size == 4
    assert load_file(tmp_path / "s/best.safetensors")["linear.weight"].shape == (4, 6)
    with pytest.raises(SettingsError, match="embedding_size 3: the network has 4"):
        network = run.model.embedder.network
        assert isinstance(network, nn.Module)
        rkd_cli.train_teacher(network, photos, embedding_size=3, save_dir=tmp_path / "t", sample="all", **SMALL)


def test_a_student_of_timm_is_a_checkpoint_like_all(
    photos: Path, teacher: rkd_cli.api.TrainedRun, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    student = timm.create_model("test_resnet", num_classes=0)
    run = rkd_cli.distill(teacher.directory, student, photos, embedding_size=8, save_dir=tmp_path / "s", **SMALL)
    files = sorted(photos.glob("*/*.jpg"))[:3]
    assert np.array_equal(rkd_cli.load(tmp_path / "s", device="cpu").embed(files), run.model.embed(files))
    again = rkd_cli.distill(teacher.directory, tmp_path / "s", photos, save_dir=tmp_path / "t", **SMALL)
    assert again.model.size == 8  # started from the checkpoint
    with pytest.raises(SettingsError, match=r"has a classifier\. Create it with num_classes=0"):
        rkd_cli.distill(teacher.directory, timm.create_model("test_resnet"), photos, **SMALL)


def test_splits_are_those_of_a_mapping(photos: Path, tmp_path: Path) -> None:
    class Part(Photos):
        def __init__(self, root: Path, classes: str) -> None:
            super().__init__(root)
            self.files = [file for file in self.files if file.parent.name in classes]

    events: list[Event] = []
    images = {"train": Part(photos, "bdfgh"), "test": Part(photos, "ace")}
    rkd_cli.distill(Small(), Small(), images, save_dir=tmp_path / "s", report=events.append, **SMALL)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert [(facts.name, facts.images, facts.classes) for facts in started.splits] == [
        ("train", 20, 5),
        ("eval", 12, 3),
    ]


def test_images_without_labels_distil(tmp_path: Path) -> None:
    images = [Image.effect_noise((12, 12), 60 + n).convert("RGB") for n in range(60)]
    run = rkd_cli.distill(Small(), Small(), images, save_dir=tmp_path / "s", **SMALL | {"num_image_per_class": 5})
    assert "overlap@10" in run.result.best["eval"]


def test_a_run_resumes_with_the_same_data_set_only(photos: Path, tmp_path: Path) -> None:
    teaching, flags = Small(), SMALL | {"save_dir": tmp_path / "s", "keep_state": True}
    torch.manual_seed(3)
    start = Small().state_dict()

    def student() -> Small:
        network = Small()
        network.load_state_dict(start)
        return network

    rkd_cli.distill(teaching, student(), Photos(photos), **flags)
    resumed = flags | {"resume": True, "epochs": 2}
    run = rkd_cli.distill(teaching, student(), Photos(photos), **resumed)
    whole = rkd_cli.distill(teaching, student(), Photos(photos), **flags | {"epochs": 2, "save_dir": tmp_path / "w"})
    assert run.result.final == whole.result.final
    other = Photos(photos)
    other.files = other.files[1:]
    with pytest.raises(SettingsError, match=r"--data given:\w+: the run in .* has given:"):
        rkd_cli.distill(teaching, student(), other, **resumed | {"epochs": 3})
    with pytest.raises(RkdError, match="the teacher changed since the run was stopped"):
        rkd_cli.distill(Small(), student(), Photos(photos), **resumed | {"epochs": 3})


def test_workers_that_are_forks_have_the_data_set(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = SMALL | {"cache": "none", "workers": 1}
    runs = [rkd_cli.distill(Small(), Small(), Photos(photos), save_dir=tmp_path / "fork", **flags)]
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    runs.append(rkd_cli.distill(Small(), Small(), Photos(photos), save_dir=tmp_path / "spawn", **flags))
    texts = [(run.directory / "settings.json").read_text() for run in runs]
    assert ['"workers": 0' in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lr_decy": 1}, "distill(): unknown argument lr_decy. Did you mean --lr-decay-gamma?"),
        ({"batch_size": 8}, "distill(): unknown argument batch_size. Did you mean --batch?"),
        ({"data": "x"}, "distill(): data: is given as images"),
        ({"jobs": 2}, "distill(): jobs: use `rkd distill`"),
        ({"weights": "none"}, "weights: Small has its weights. Omit the argument."),
        ({"image_size": 0}, "--image-size: must be at least 1, got 0"),
        ({"lr": -1}, "--lr: must be above 0.0, got -1"),
        ({"triplet_margin": 0.1}, "--triplet-margin: has no effect without --triplet-ratio."),
    ],
)
def test_a_wrong_argument_is_one_line(photos: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as error:
        rkd_cli.distill(Small(), Small(), photos, **SMALL | flags)
    (line,) = error.value.problems
    assert says in line


def test_training_a_teacher_takes_no_teacher(photos: Path) -> None:
    with pytest.raises(SettingsError, match="unknown argument teacher") as error:
        rkd_cli.train_teacher(Small(), photos, teacher="x")
    assert len(error.value.problems) == 1


def test_a_frozen_network_needs_a_layer_to_train(photos: Path, tmp_path: Path) -> None:
    flags = SMALL | {"freeze_base": True, "views": 1, "sample": "all", "save_dir": tmp_path / "t"}
    with pytest.raises(SettingsError, match="freeze_base: leaves nothing to train"):
        rkd_cli.train_teacher(Small(), photos, **flags)
    network = Small()
    before = network.last.weight.detach().clone()
    assert rkd_cli.train_teacher(network, photos, embedding_size=4, **flags).model.size == 4
    assert torch.equal(network.last.weight, before)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (iter([]), "images: has no length. Pass a path, or a Dataset with __len__ and __getitem__."),
        ({"train": [(None, 1)]}, "images['train'][0]: is of type NoneType. Pass a path, bytes"),
        ([(torch.zeros(3, 8, 8), 1)], "images[0]: is float32 of shape (3, 8, 8). Tensors must be uint8"),
        (["none.jpg"], "none.jpg: no such image"),
    ],
)
def test_what_is_no_data_set_is_one_line(images: Any, says: str) -> None:
    with pytest.raises(DataError) as error:
        rkd_cli.distill(Small(), Small(), images, **SMALL)
    (line,) = error.value.problems
    assert says in line
    assert not GIVEN_TABLES


def test_a_command_says_that_python_gave_the_images(rkd: Rkd, tmp_path: Path) -> None:
    code, _, err = rkd("check-data", "--data", "given:0123")
    assert (code, err) == (
        2, "rkd: error: given:0123: is a data set that Python code gave to a run. Name the images with --data.\n"
    )  # fmt: skip
