"""Everything that needs no pixels is checked before the first image is decoded, which for large sets takes hours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

from flags import over
from rkd_cli.data import decode, load_dataset
from rkd_cli.data.splits import relative_names
from rkd_cli.embedding.vectors import write_vectors
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.embedding_net import header_of
from rkd_cli.runtime.files import default_cache_folder

Rkd = Callable[..., tuple[int, str, str]]
SHARED = [
    "--base", "timm:test_resnet", "--weights", "none", "--resize", "36", "--image-size", "32", "--workers", "0",
    "--device", "cpu",
    "--batch", "8", "--num-image-per-class", "2", "--iter-per-epoch", "1", "--epochs", "1", "--embedding-size", "8",
    "--cache", "disk",
]  # fmt: skip
TEACHER = ["train-teacher", *SHARED]
STUDENT = ["distill", *SHARED]
TAUGHT = over(STUDENT, "--teacher", "{tmp}/teacher.safetensors")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each image that is decoded, in this process."""
    found: list[object] = []
    square = decode._square

    def counted(image: Image.Image, *arguments: Any) -> np.ndarray:
        found.append(image)
        return square(image, *arguments)

    monkeypatch.setattr(decode, "_square", counted)
    return found


@pytest.fixture
def place(tiny_set: Path, tmp_path: Path) -> Iterator[Path]:
    """Teachers, good and bad, and directories that a run cannot use."""
    data = shutil.copytree(tiny_set, tmp_path / "set")
    network = build_model("shufflenet_v2_x0_5", 5, True)
    header = header_of(network, "shufflenet_v2_x0_5", 36, 32, "cub200", "eval").model_copy(update={"epoch": 1})
    save_model(tmp_path / "teacher.safetensors", network.state_dict(), header)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    cut = (tmp_path / "teacher.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(cut[:-100])
    names = [name for images in load_dataset("cub200", data) for name in relative_names(images.paths, data)]
    rows = np.random.default_rng(0).normal(size=(len(names), 5)).astype(np.float32)
    write_vectors(tmp_path / "vectors.npz", rows, names)
    write_vectors(tmp_path / "elsewhere.npz", rows, [f"elsewhere/{name}" for name in names])
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/metrics.jsonl").write_text("")
    (tmp_path / "locked").mkdir()
    with FileLock(tmp_path / "locked/.lock"):
        yield tmp_path


@pytest.mark.parametrize("skip_damaged", [False, True], ids=["", "skip-damaged"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (over(TEACHER, "--base", "resnet81"), "--base resnet81: no such network"),
        (over(TEACHER, "--base", "timm:resnet81"), "--base timm:resnet81: no such network"),
        (over(TEACHER, "--weights", "{tmp}/none.pth"), "none.pth: no such file"),
        (over(TEACHER, "--weights", "{tmp}/file"), "file: cannot be read"),
        (over(TEACHER, "--weights", "{tmp}/other.safetensors"), "other.safetensors: not the weights of a"),
        (over(TEACHER, "--weights", None, "--load", "{tmp}/none.safetensors"), "none.safetensors: no such file"),
        (
            over(TEACHER, "--weights", None, "--load", "{tmp}/teacher.safetensors", "--base", "shufflenet_v2_x0_5"),
            "--embedding-size 8: ",
        ),
        (over(TEACHER, "--base", "densenet121", "--image-size", "8"), "--image-size 8: densenet121 fails on this size"),
        (over(TEACHER, "--save-dir", "{tmp}/used"), "already has a run"),
        (over(TEACHER, "--save-dir", "{tmp}/file"), "file: cannot be used (File exists)"),
        (over(TEACHER, "--save-dir", "{tmp}/file/below"), "below: cannot be used (Not a directory)"),
        (over(TEACHER, "--save-dir", "{tmp}/locked"), "another process is writing to it"),
        (over(TEACHER, "--device", "cuda:99"), "--device cuda:99"),
        (over(TEACHER, "--precision", "tf32"), "--precision tf32: only supported by CUDA devices"),
        (over(TEACHER, "--compile"), "--compile: torch.compile fails on this machine (no compiler)"),
        (over(TEACHER, "--batch", "9"), "a batch of 9 with 2 images per class needs 5 classes"),
        (over(TEACHER, "--select-on", "val", "--data", "{tmp}/few"), "--select-on val: needs 4 training classes"),
        (over(TEACHER, "--log", "tensorboard"), "--log tensorboard: not installed"),
        (over(STUDENT, "--teacher", "{tmp}/none.safetensors"), "none.safetensors: no such file"),
        (over(STUDENT, "--teacher", "{tmp}/cut.safetensors"), "cut.safetensors: "),
        (over(STUDENT, "--teacher", "{tmp}/elsewhere.npz"), "elsewhere.npz: has no embedding of the train images"),
        (over(STUDENT, "--teacher", "{tmp}/vectors.npz", "--at-ratio", "1"), "--at-ratio: {tmp}/vectors.npz is a"),
        (
            over(STUDENT, "--teacher", "{tmp}/vectors.npz", "--mixup", "1"),
            "--mixup: {tmp}/vectors.npz is a",
        ),
        (over(STUDENT, "--teacher", "timm:resnet18", "--teacher-weights", "{tmp}/none.pth"), "none.pth: no such file"),
        (over(TAUGHT, "--csd-ratio", "1"), "--csd-ratio: student embeddings have 8 dimensions, teacher embeddings 5"),
        (
            over(TAUGHT, "--at-ratio", "1", "--base", "timm:vit_tiny_patch16_224"),
            "--at-ratio: feature maps of stage 2 are 2 x 2 in the student",
        ),
        (
            over(TAUGHT, "--at-ratio", "1", "--base", "vit_b_16"),
            "--at-ratio: the student vit_b_16 does not have four stages",
        ),
        (over(TAUGHT, "--save-dir", "{tmp}/used"), "already has a run"),
        (
            over(TAUGHT, "--num-image-per-class", None, "--batch", "25", "--no-labels"),
            "--batch 25: the training split has only 24",
        ),
    ],
    ids=lambda value: " ".join(value[len(TEACHER) :]).replace("{tmp}/", "") if isinstance(value, list) else "",
)
def test_what_needs_no_pixels_is_refused_before_any_are_decoded(
    rkd: Rkd,
    place: Path,
    decoded: list[object],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
    skip_damaged: bool,
) -> None:
    def none(*_: object, **__: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", none)
    monkeypatch.setattr("rkd_cli.screen.loggers.find_spec", lambda name: None)
    few = shutil.copytree(place / "set/images", place / "few")
    for folder in sorted(few.iterdir())[4:]:
        shutil.rmtree(folder)
    if "{tmp}/few" in arguments:
        arguments = [*arguments, "--dataset", "folder"]
    defaults = [("--data", place / "set"), ("--save-dir", place / "run")]
    more = [str(part) for flag, value in defaults if flag not in arguments for part in (flag, value)]
    more += ["--skip-damaged"] if skip_damaged else []
    code, _, err = rkd(*(argument.format(tmp=place) for argument in arguments), *more)
    assert says.format(tmp=place) in err
    assert (code, len(err.splitlines())) == (2, 1)
    assert not decoded


@pytest.mark.parametrize("what", ["state", "teacher", "images"])
def test_a_refused_resume_decodes_nothing(rkd: Rkd, place: Path, decoded: list[object], what: str) -> None:
    flags = ["--data", place / "set", "--save-dir", place / "run", "--keep-state"]
    assert rkd(*(part.format(tmp=place) for part in TAUGHT), *flags)[0] == 0
    assert decoded
    decoded.clear()
    shutil.rmtree(default_cache_folder())
    if what == "state":
        state = (place / "run/state.safetensors").read_bytes()
        (place / "run/state.safetensors").write_bytes(state[:-100])
    elif what == "teacher":
        path = place / "teacher.safetensors"
        tensors = {name: tensor + 1 for name, tensor in load_model(path).state_dict().items()}
        save_model(path, tensors, read_header(path))
    else:
        image = next((place / "set").rglob("*.jpg"))
        image.rename(image.with_name("renamed.jpg"))
        listing = place / "set/images.txt"
        listing.write_text(listing.read_text().replace(image.name, "renamed.jpg"))
    code, _, err = rkd("distill", "--resume", "--save-dir", place / "run", "--epochs", 9)
    assert code == 2
    said = {"state": "state.safetensors: ", "images": "the names or labels of the images changed since"}
    assert said.get(what, "the teacher changed since the run was stopped") in err
    assert not decoded


def test_a_run_resumes_without_the_damaged_images_it_left_out(rkd: Rkd, place: Path) -> None:
    """Their digest is compared after they are left out again."""
    next((place / "set").rglob("*.jpg")).write_bytes(b"")
    flags = over(TEACHER, "--data", place / "set", "--save-dir", place / "run", "--skip-damaged", "--keep-state")
    assert rkd(*flags)[::2] == (0, "")
    assert rkd("train-teacher", "--resume", "--save-dir", place / "run", "--epochs", "2")[::2] == (0, "")
    state = (place / "run/metrics.jsonl").read_text().splitlines()
    assert len(state) == 3
