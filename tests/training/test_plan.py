"""Checks before the first batch: evaluation classes that were trained on, networks and images that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data import hold_out, load_dataset
from rkd_cli.data.decode import load_crops, resized_crops
from rkd_cli.data.loader import Batch
from rkd_cli.data.splits import seen_classes
from rkd_cli.errors import DataError, RkdError, RunError, SettingsError
from rkd_cli.events import Event, Note, ObjectiveFacts, silent
from rkd_cli.models import EmbeddingNet, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import build_model, header_of
from rkd_cli.runtime.seeds import derive_seed
from rkd_cli.schemas import OWN_FIT
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.loop import Run, train
from rkd_cli.training.open import build_run
from rkd_cli.training.teachers import LiveTeacher

Flags = dict[str, str | bool]
FULL = "CUDA out of memory. Tried to allocate 9 GiB.\nand a long story"


def teacher_run(flags: Flags, **more: str | bool) -> tuple[Run, list[str]]:
    """The run, and the notes."""
    events: list[Event] = []
    run = build_run(resolve(TeacherSettings, flags | more), events.append)
    return run, [event.text for event in events if isinstance(event, Note)]


def distill_run(flags: Flags, teacher: Path, **more: str | bool) -> tuple[Run, list[str]]:
    events: list[Event] = []
    settings = {name: value for name, value in flags.items() if name != "sample"} | {"teacher_load": str(teacher)}
    run = build_run(resolve(DistillSettings, settings | more), events.append)
    return run, [event.text for event in events if isinstance(event, Note)]


@pytest.fixture
def photos(quick: Flags, tiny_set: Path, tmp_path: Path) -> Flags:
    """``quick`` on eight class folders of one's own."""
    data = shutil.copytree(tiny_set / "images", tmp_path / "photos")
    return quick | {"dataset": "folder", "data": str(data), "batch": "4"}


def names_of(photos: Flags) -> list[str]:
    return sorted(path.name for path in Path(str(photos["data"])).iterdir())


@pytest.fixture
def checkpoint(photos: Flags, tmp_path: Path) -> Callable[..., Path]:
    """Makes the checkpoint of a network that was trained on the training classes."""

    def make(select_on: str | None = "eval") -> Path:
        path = tmp_path / f"{select_on}.safetensors"
        model = build_model("timm:test_resnet", 8, True)
        seen = seen_classes(load_dataset("folder", Path(str(photos["data"])))[0])
        header = header_of(model, "timm:test_resnet", 36, 32, "folder", select_on, seen)  # type: ignore[arg-type]
        header = header.model_copy(update={"epoch": 3, "fit": OWN_FIT})
        save_model(path, model.state_dict(), header)
        return path

    return make


def add_two_classes(photos: Flags) -> str:
    """Move the split; gives the class that was trained on and is an evaluation class now."""
    names = names_of(photos)
    for number in (1, 2):
        made = shutil.copytree(Path(str(photos["data"])) / names[-1], Path(str(photos["data"])) / f"000.added{number}")
        for path in made.iterdir():
            path.write_bytes(path.read_bytes() + b" " * number)  # images of their own
    return names[3]


@pytest.mark.parametrize("select_on", ["eval", "val"])
def test_model_files_keep_the_classes_they_were_trained_on(photos: Flags, tmp_path: Path, select_on: str) -> None:
    run, _ = teacher_run(photos, select_on=select_on)
    train(run, silent)
    images = load_dataset("folder", Path(str(photos["data"])))[0]
    seen = seen_classes(hold_out(images)[0] if select_on == "val" else images)
    assert len(seen) == {"eval": 4, "val": 2}[select_on]
    for name in ("best.safetensors", "last.safetensors"):
        header = read_header(tmp_path / "run" / name)
        assert (header.seen_classes, header.select_on) == (seen, select_on)


def test_a_teacher_that_knows_evaluation_classes_is_named(photos: Flags, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    assert distill_run(photos, path)[1] == []
    moved = add_two_classes(photos)
    assert distill_run(photos, path)[1] == [
        f"the teacher {path} was trained on 1 of the evaluation classes ({moved}), so its recall is too high"
    ]


def test_a_network_to_start_from_that_knows_evaluation_classes_is_named(
    photos: Flags, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint()
    assert teacher_run(photos, load=str(path))[1] == []
    moved = add_two_classes(photos)
    says = f"{path} was trained on 1 of the evaluation classes ({moved}), so its recall is too high"
    assert teacher_run(photos, load=str(path))[1] == [says]
    assert distill_run(photos, path, load=str(path), l2normalize=True)[1] == [f"the teacher {says}", says]


def test_trained_validation_classes_are_named(photos: Flags, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("val")
    held_out = ", ".join(names_of(photos)[2:4])
    says = f"{path} was trained on 2 of the validation classes ({held_out}), so its recall is too high"
    assert teacher_run(photos, load=str(path), select_on="val")[1] == [says]
    assert distill_run(photos, path, select_on="val")[1] == [f"the teacher {says}"]


@pytest.mark.parametrize(
    ("of_teacher", "of_student", "noted"),
    [
        ("eval", "val", True),
        ("eval", "eval", False),
        ("val", "val", False),
        ("val", "eval", False),
        (None, "val", False),
    ],
)
def test_a_teacher_picked_on_evaluation_classes_is_noted(
    photos: Flags, checkpoint: Callable[..., Path], of_teacher: str | None, of_student: str, noted: bool
) -> None:
    """What an earlier version or another program made does not say how it was picked."""
    _, notes = distill_run(photos, checkpoint(of_teacher), select_on=of_student)
    says = [note for note in notes if "picked on the evaluation classes" in note]
    assert len(says) == noted
    assert all("Train the teacher with --select-on val as well" in note for note in says)


@pytest.mark.parametrize(("fit", "used"), [("auto", OWN_FIT), ("square", "square"), ("crop", "crop"), ("pad", "pad")])
def test_a_run_stores_how_its_images_became_squares(photos: Flags, tmp_path: Path, fit: str, used: str) -> None:
    run, _ = teacher_run(photos, fit=fit)
    assert run.header.fit == used
    assert json.loads(run.directory.settings)["fit"] == used
    wide = Path(str(photos["data"])) / names_of(photos)[0] / "wide.png"
    Image.new("RGB", (90, 30), "red").save(wide)
    run, _ = teacher_run(photos | {"save_dir": str(tmp_path / "other")}, fit=fit)
    assert "fit" in run.started.shared if used != OWN_FIT else "fit" not in run.started.shared
    images = run.loader._images
    pixels = run.evaluation["train"].pixels([images.paths.index(wide)])[0]
    shown = (pixels[0] > 200) & (pixels[1] < 50)
    assert shown.all() == (used != "pad")


def test_published_data_sets_are_squashed_unless_told(quick: Flags) -> None:
    assert teacher_run(quick)[0].header.fit == "square"
    run, _ = teacher_run(quick, fit="crop", overwrite=True)
    assert (run.header.fit, run.started.shared["fit"]) == ("crop", "crop")


def test_a_teacher_of_another_fit_is_named(photos: Flags, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    given = "crop" if read_header(path).fit != "crop" else "pad"
    (note,) = distill_run(photos, path, fit=given)[1]
    assert note == (
        f"the teacher was trained with --fit {OWN_FIT}, this run uses --fit {given}. Set --fit unless that is intended."
    )


def test_a_teacher_of_other_images_is_named(photos: Flags, checkpoint: Callable[..., Path]) -> None:
    (note,) = distill_run(photos, checkpoint(), resize="48", image_size="40")[1]
    assert note.startswith("the teacher was trained on 32 pixel images, this run uses 40")


def test_memory_that_is_full_at_the_first_forward_is_no_matter_of_size(
    quick: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: EmbeddingNet, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(EmbeddingNet, "forward", full)
    with pytest.raises(RunError) as caught:
        teacher_run(quick)
    assert str(caught.value) == (
        "timm:test_resnet with one image of 32 pixels: CUDA out of memory. Tried to allocate 9 GiB. Choose a "
        "smaller --base."
    )


def test_memory_that_holds_no_weights_is_one_line(quick: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: EmbeddingNet, device: torch.device) -> EmbeddingNet:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("rkd_cli.training.plan.to_device", full)
    says = r"timm:test_resnet .*: CUDA out of memory\. Tried to allocate 9 GiB\. Choose a smaller --base\.$"
    with pytest.raises(RunError, match=says):
        teacher_run(quick)


def test_what_fails_at_any_size_is_no_matter_of_size(quick: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: EmbeddingNet, images: Tensor) -> Tensor:
        raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr(EmbeddingNet, "forward", broken)
    with pytest.raises(RuntimeError, match=r"^CUDNN_STATUS_NOT_INITIALIZED$") as caught:
        teacher_run(quick)
    assert not isinstance(caught.value, RkdError)


def test_what_fails_at_this_size_alone_is_one_line(quick: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    real = EmbeddingNet.forward

    def fussy(self: EmbeddingNet, images: Tensor) -> object:
        if images.shape[-1] < 100:
            raise RuntimeError("Kernel size can't be greater than actual input size\nand a long story")
        return real(self, images)

    monkeypatch.setattr(EmbeddingNet, "forward", fussy)
    with pytest.raises(SettingsError) as caught:
        teacher_run(quick)
    assert str(caught.value) == (
        "--image-size 32: timm:test_resnet fails on this size "
        "(Kernel size can't be greater than actual input size). Choose another."
    )


class FullInBackward(torch.autograd.Function):
    """The identity; memory is full when its gradient is due."""

    @staticmethod
    def forward(context: object, value: Tensor) -> Tensor:
        """The value itself."""
        return value.clone()

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        """No gradient.

        Raises:
            OutOfMemoryError: always.
        """
        raise torch.OutOfMemoryError(FULL)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_is_full_within_a_step_names_it(quick: Flags, where: str) -> None:
    run, _ = teacher_run(quick, iter_per_epoch="2", epochs="3")
    steps: list[int] = []

    def step(batch: Batch, epoch: int) -> dict[str, Tensor]:
        steps.append(epoch)
        loss = run.model(batch.images).sum()
        if len(steps) == 4:
            if where == "forward":
                raise torch.OutOfMemoryError(FULL)
            loss = FullInBackward.apply(loss)
        return {"sum": loss}

    with pytest.raises(RunError) as caught:
        train(replace(run, step=step), silent)
    assert str(caught.value) == (
        "epoch 2, step 2: CUDA out of memory. Tried to allocate 9 GiB. Use a smaller --batch or --image-size."
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [ObjectiveFacts({"dist": 1.0, "angle": 2.0})]),
        ({"hint_epochs": "2", "fitnet_ratio": "3"}, [
            ObjectiveFacts({"fitnet": 3.0}, 2), ObjectiveFacts({"dist": 1.0, "angle": 2.0})
        ]),
        ({"fitnet_ratio": "3"}, [ObjectiveFacts({"fitnet": 3.0, "dist": 1.0, "angle": 2.0})]),
    ],
)  # fmt: skip
def test_the_objective_is_told(
    photos: Flags, checkpoint: Callable[..., Path], more: Flags, expected: list[ObjectiveFacts]
) -> None:
    run, _ = distill_run(photos, checkpoint(), epochs="3", **more)
    assert list(run.started.objectives) == expected


def test_resized_crops_are_those_of_the_flags(photos: Flags) -> None:
    run, _ = teacher_run(photos, crop="resized", crop_scale="0.5", seed="7")
    batch = next(run.loader.epoch(3))
    generator = torch.Generator().manual_seed(derive_seed(7, "crops", 3))
    crops = resized_crops(batch.index.tolist(), 36, 32, generator, 0.5)
    paths = load_dataset("folder", Path(str(photos["data"])))[0].paths
    assert torch.equal(batch.images, load_crops(paths, crops, 36, 32))


@pytest.mark.parametrize("ratio", ["at_ratio", "dist_ratio"])
def test_compiled_networks_are_the_ones_that_run(
    photos: Flags, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, ratio: str
) -> None:
    """Teacher and student both, with feature maps and without; the compiler itself is left out."""
    calls: list[int] = []

    def compiled(function: Callable[..., object], **options: object) -> Callable[..., object]:
        def run(*arguments: object, **more: object) -> object:
            calls.append(id(getattr(function, "__self__", None)))
            return function(*arguments, **more)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    no_other = {"dist_ratio": "0", "angle_ratio": "0"}
    run, _ = distill_run(photos, checkpoint(), compile=True, **(no_other | {ratio: "1"}))
    calls.clear()
    losses = run.step(next(run.loader.epoch(1)), 1)
    assert list(losses) == [{"at_ratio": "attention", "dist_ratio": "dist"}[ratio]]
    assert isinstance(run.teacher, LiveTeacher)
    assert calls == [id(run.teacher.network), id(run.model)]


def test_networks_are_compiled_only_where_asked_for(
    photos: Flags, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise AssertionError

    monkeypatch.setattr(torch, "compile", refuse)
    run, _ = distill_run(photos, checkpoint(), at_ratio="1")
    run.step(next(run.loader.epoch(1)), 1)


def test_a_batch_that_nobody_chose_is_one_that_the_images_fill(photos: Flags, tmp_path: Path) -> None:
    chosen = photos | {"num_image_per_class": "5", "keep_state": True}
    flags = {name: value for name, value in chosen.items() if name != "batch"}
    for path in sorted((Path(str(flags["data"])) / names_of(photos)[0]).iterdir())[3:]:
        path.unlink()
    run, notes = teacher_run(flags)
    assert notes == ["--batch 18 instead of 128: 5 images per class fill no more"]
    assert [len(batch.images) for batch in run.loader.epoch(1)] == [3 + 3 * 5]
    train(run, silent)
    assert json.loads((tmp_path / "run/settings.json").read_text())["batch"] == 18
    assert teacher_run({"resume": True, "save_dir": flags["save_dir"], "epochs": "2"})[1] == []
    with pytest.raises(DataError, match="a batch of 128 with 5 images per class needs 26 classes"):
        teacher_run(flags, batch="128", overwrite=True)


def test_a_teacher_that_was_saved_before_training_is_named(photos: Flags, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    save_model(path, load_model(path).state_dict(), read_header(path).model_copy(update={"epoch": 0}))
    says = f"the teacher {path} is from epoch 0, before training: no epoch of its run was better"
    assert distill_run(photos, path)[1] == [says]


@pytest.mark.parametrize(("base", "side"), [("shufflenet_v2_x0_5", None), ("maxvit_t", 224)])
def test_a_network_of_one_input_size_says_to_what_it_resizes(quick: Flags, base: str, side: int | None) -> None:
    says = f"{base} only takes {side} pixel images. Images of 32 pixels are resized."
    assert teacher_run(quick | {"base": base})[1] == ([says] if side else [])
    if side:
        flags: Flags = {"resize": str(side), "image_size": str(side), "batch": "4"}
        assert teacher_run(quick | {"base": base} | flags)[1] == []


def test_classes_of_one_image_each_are_refused_where_labels_are_used(
    photos: Flags, checkpoint: Callable[..., Path]
) -> None:
    teacher = checkpoint()
    for folder in Path(str(photos["data"])).iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()
    with pytest.raises(DataError, match="no train class has two images, so there are no pairs"):
        teacher_run(photos)
    with pytest.raises(DataError, match="no train class has two images"):
        distill_run(photos, teacher)


@pytest.mark.parametrize(("loss", "sample"), [("l2_triplet", "random"), ("contrastive", "random"), ("softmax", None)])
def test_the_header_names_the_sample_of_losses_that_have_one(photos: Flags, loss: str, sample: str | None) -> None:
    run, _ = teacher_run(photos, loss=loss, sample="random")
    assert run.started.sample == sample
