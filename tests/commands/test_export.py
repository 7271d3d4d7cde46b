"""rkd export: the file, how it compares, and that nothing is left behind where it does not; ONNX files as MODEL."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import rkd_cli
from rkd_cli.cli import main
from rkd_cli.commands import export
from rkd_cli.commands.evaluate import Evaluation, evaluate_models
from rkd_cli.commands.export import ExportResult, export_file
from rkd_cli.data import load_dataset
from rkd_cli.data.splits import seen_classes
from rkd_cli.embedding.embedder import NetworkEmbedder, open_embedder
from rkd_cli.errors import RkdError, RunError, SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import build_model, load_model
from rkd_cli.models.checkpoint import read_header, save_model
from rkd_cli.models.convert import to_onnx
from rkd_cli.models.embedding_net import EmbeddingNet, TeacherSpace, header_of, tensors_of
from rkd_cli.models.exported import open_exported, read_exported, read_program
from rkd_cli.runtime.signals import Stopped
from rkd_cli.settings import DistillSettings, EvaluateSettings, ExportSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.open import build_run
from rkd_cli.training.teachers import LiveTeacher

NAME = "timm:test_resnet"  # small, with batch norms
PRETRAINED = "squeezenet1_1"


@pytest.fixture(scope="module")
def run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, of a network with statistics under which its embeddings differ."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "student"
    path.mkdir()
    model = build_model(NAME, 8, l2normalize=True).train()
    for _ in range(30):
        model(torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 32, 32))
    seen = seen_classes(load_dataset("folder", tiny_set / "images")[0])
    header = header_of(model, NAME, 37, 32, "folder", "eval", seen).model_copy(update={"epoch": 3})
    save_model(path / "best.safetensors", model.state_dict(), header)
    (path / "settings.json").write_text(json.dumps({"dataset": "folder", "data": str(tiny_set / "images")}))
    return path


@pytest.fixture(autouse=True)
def _converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that a test before has converted is not converted again, which takes seconds."""
    monkeypatch.setattr(export, "to_onnx", converted)


CONVERTED: dict[object, bytes] = {}


def converted(model: EmbeddingNet, side: int, *how: bool) -> bytes:
    tensors = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    key = str(model), model.l2normalize, model.normalization, side, tensors, how
    if key not in CONVERTED:
        CONVERTED[key] = to_onnx(model, side, *how)
    return CONVERTED[key]


@pytest.fixture(scope="module")
def onnx_file(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("exported") / "m.onnx").path


def exported(model: Path | str, out: Path, report: Any = silent, **more: str | bool) -> ExportResult:
    flags: dict[str, str | bool] = {"out": str(out), "workers": "0", "cache": "none"}
    settings = resolve(ExportSettings, flags | more)
    return export_file(str(model), settings, report)


def evaluated(model: Path, data: Path) -> Evaluation:
    flags = {"batch": "7", "workers": "0", "device": "cpu", "cache": "none", "data": str(data)}
    return evaluate_models([str(model)], resolve(EvaluateSettings, flags), silent)[0]


def refused(kind: type[RkdError], says: str, model: Path | str, out: Path, **more: str | bool) -> None:
    """One line, and nothing where the file would be."""
    before = sorted(out.parent.iterdir()) if out.parent.exists() else []
    with pytest.raises(kind, match=says) as caught:
        exported(model, out, **more)
    assert len(str(caught.value).splitlines()) == 1
    assert (sorted(out.parent.iterdir()) if out.parent.exists() else []) == before


def test_evaluating_the_file_is_evaluating_the_checkpoint(run: Path, onnx_file: Path, tiny_set: Path) -> None:
    due, found = evaluated(run, tiny_set / "images"), evaluated(onnx_file, tiny_set / "images")
    assert due.parameters > 0
    assert found == replace(due, name=str(onnx_file), file_bytes=onnx_file.stat().st_size)


def test_the_file_embeds_as_the_checkpoint(run: Path, onnx_file: Path, tiny_set: Path) -> None:
    files = sorted(tiny_set.glob("images/*/*.jpg"))[:5]
    model = rkd_cli.load(onnx_file, device="cpu", batch=2)
    due, found = rkd_cli.load(run, device="cpu").embed(files), model.embed(files)
    assert found == pytest.approx(due, abs=1e-4)
    assert not np.allclose(found[0], found[1], atol=1e-2)
    assert model.header == read_header(run / "best.safetensors")


def test_a_student_is_exported_into_its_teachers_space(run: Path, tiny_set: Path, tmp_path: Path) -> None:
    model, weight = load_model(run / "best.safetensors"), torch.randn(5, 8)
    model.teacher_space = TeacherSpace(5, True, {8: weight})
    save_model(tmp_path / "s.safetensors", tensors_of(model), header_of(model, NAME, 37, 32, "folder"))
    data = str(tiny_set / "images")
    result = exported(tmp_path / "s.safetensors", tmp_path / "m.onnx", teacher_space=True, data=data)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        due = F.normalize(model(images) @ weight.T)
    torch.testing.assert_close(open_exported(result.path)(images), due, atol=1e-4, rtol=1e-4)
    facts = read_exported(result.path).facts
    assert (facts.projected_from, facts.header) == (8, result.header)
    assert (result.header.embedding_size, result.header.l2normalize) == (5, True)
    assert (result.header.teacher_space, result.header.teacher_size, result.header.projections) == ("unit", 5, ())


@pytest.mark.parametrize(("size", "says"), [(5, (None, None, ())), (8, ("unit", 8, ()))])
def test_an_export_without_the_projection_names_no_space_that_it_does_not_reach(
    run: Path, tmp_path: Path, size: int, says: tuple[str | None, int | None, tuple[int, ...]]
) -> None:
    model = load_model(run / "best.safetensors")
    model.teacher_space = TeacherSpace(size, True, {4: torch.randn(size, 4)})
    save_model(tmp_path / "s.safetensors", tensors_of(model), header_of(model, NAME, 37, 32, "folder"))
    settings = resolve(ExportSettings, {"out": str(tmp_path / "m.onnx")})
    embedder = open_embedder(str(tmp_path / "s.safetensors"))
    assert isinstance(embedder, NetworkEmbedder)
    _, header, projected_from = export._in_space(embedder, settings, silent)
    assert (header.teacher_space, header.teacher_size, header.projections, projected_from) == (*says, None)


def test_a_network_of_no_teachers_space_is_not_exported_there(run: Path, tmp_path: Path) -> None:
    refused(
        SettingsError,
        "--teacher-space: .* was not trained in its teacher's space",
        run,
        tmp_path / "m.pt2",
        teacher_space=True,
    )


def test_the_figures_are_those_of_the_file(run: Path, tiny_set: Path, tmp_path: Path) -> None:
    notes: list[Event] = []
    result = exported(run, tmp_path / "m.onnx", notes.append, int8=True, calibration_images="9")
    checkpoint, floats, small = result.candidates
    assert [one.what for one in result.candidates] == ["torch", "onnx", "int8"]
    assert checkpoint.bytes == (run / "best.safetensors").stat().st_size
    assert small.bytes == (tmp_path / "m.onnx").stat().st_size < floats.bytes / 3
    assert read_exported(tmp_path / "m.onnx").facts.weights == "int8"
    for form, path in ((checkpoint, run), (small, tmp_path / "m.onnx")):
        assert form.recall == evaluated(path, tiny_set / "images").eval.recall
    unseen = load_dataset("folder", tiny_set / "images")[1]
    due, found = (rkd_cli.load(path, device="cpu").embed(unseen.paths) for path in (run, tmp_path / "m.onnx"))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(due, found, strict=True)]
    assert small.worst_cosine == pytest.approx(min(cosines), abs=1e-5)
    assert floats.worst_cosine == pytest.approx(1, abs=1e-5)
    assert result.images == len(unseen) == 24
    assert all(set(form.latency) == {1, 32} and min(form.latency.values()) > 0 for form in result.candidates)
    assert [note.text for note in notes if isinstance(note, Note)] == [
        f"--data {tiny_set / 'images'}, as in the run of {run}"
    ]


def test_only_training_images_calibrate(
    run: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given = export._calibration, list[torch.Tensor]()

    def watched(*arguments: Any) -> Iterator[torch.Tensor]:
        for batch in real(*arguments):
            given.append(batch)
            yield batch

    monkeypatch.setattr(export, "_calibration", watched)
    exported(run, tmp_path / "m.onnx", int8=True, calibration_images="20")
    train, unseen = (
        {rkd_pixels(path) for path in split.paths} for split in load_dataset("folder", tiny_set / "images")
    )
    seen = [image.numpy().tobytes() for batch in given for image in batch.permute(0, 2, 3, 1)]
    assert len(set(seen)) == 20
    assert set(seen) <= train
    assert not set(seen) & unseen


def rkd_pixels(path: Path) -> bytes:
    """By torchvision's own evaluation transform."""
    from PIL import Image

    with Image.open(path) as image:
        square = torchvision.transforms.Resize((37, 37))(image.convert("RGB"))
        return np.array(torchvision.transforms.CenterCrop(32)(square)).tobytes()


def test_a_program_of_torch_export(run: Path, tmp_path: Path) -> None:
    result = exported(run, tmp_path / "deeper/m.pt2")
    assert [one.what for one in result.candidates] == ["torch", "program"]
    assert result.candidates[0].recall == result.candidates[1].recall
    network, facts = read_program(tmp_path / "deeper/m.pt2")
    assert facts.header == read_header(run / "best.safetensors")
    assert network(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape == (3, 8)
    with pytest.raises(RkdError, match="may contain pickles"):
        evaluated(tmp_path / "deeper/m.pt2", tmp_path)


def test_where_parity_is_broken_nothing_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = build_model(NAME, 8, True).eval()
    with torch.no_grad():
        nn.init.normal_(another.linear.weight)  # type: ignore[arg-type]  # a layer's
    monkeypatch.setattr(export, "to_onnx", lambda model, side, *how: converted(another, side))
    says = r"gives other embeddings: the worst cosine on 24 images is -?0\.\d{6}, below 0\.999\. Nothing was written\.$"
    refused(RunError, says, run, tmp_path / "m.onnx")
    refused(RunError, says, run, tmp_path / "m.onnx", int8=True)
    assert RunError.exit_code == 1


def test_embeddings_that_are_no_numbers_are_no_parity(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: EmbeddingNet, side: int, *how: bool) -> bytes:
        made = onnx.ModelProto.FromString(converted(model, side))
        for tensor in made.graph.initializer:
            if tensor.name == "linear.bias":
                tensor.raw_data = np.full(8, np.nan, np.float32).tobytes()
        return bytes(made.SerializeToString())

    monkeypatch.setattr(export, "to_onnx", broken)
    refused(RunError, "not finite|other embeddings", run, tmp_path / "m.onnx")


def test_a_signal_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)

    def stop(*arguments: object) -> None:
        assert len(list(temporary.iterdir())) == 1
        raise Stopped(2)

    monkeypatch.setattr(export, "_latencies", stop)
    with pytest.raises(Stopped):
        exported(run, tmp_path / "out/m.onnx")
    assert not list((tmp_path / "out").iterdir())
    assert not list(temporary.iterdir())


def test_a_file_that_is_there(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("mine")
    refused(SettingsError, "already exists. Name another file, or pass --overwrite", run, out)
    assert out.read_text() == "mine"
    exported(run, out, overwrite=True)
    assert read_exported(out).facts.weights == "float"
    (tmp_path / "d.onnx").mkdir()
    refused(SettingsError, "already exists", run, tmp_path / "d.onnx", overwrite=True)


def test_without_images_noise_is_compared(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "settings.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = exported(moved, tmp_path / "m.onnx")
        says = "^--int8: needs training images. data: no such folder"
        refused(SettingsError, says, moved, tmp_path / "int8.onnx", int8=True)
    assert result.missing and "data" in result.missing
    assert result.images == 64
    assert result.candidates[1].worst_cosine == pytest.approx(1, abs=1e-5)
    assert result.candidates[1].recall == {}
    refused(RkdError, "gone", moved, tmp_path / "other.onnx", data=str(tmp_path / "gone"))  # it was asked for


def test_a_pretrained_network(tmp_path: Path, tiny_set: Path) -> None:
    torch.save(torchvision.models.get_model(PRETRAINED).state_dict(), tmp_path / "w.pth")
    flags: dict[str, str | bool] = {"weights": str(tmp_path / "w.pth"), "resize": "40", "image_size": "32"}
    result = exported(f"torchvision:{PRETRAINED}", tmp_path / "m.onnx", **flags)
    assert result.missing == f"torchvision:{PRETRAINED}: does not say which data set to use. Choose one with --dataset."
    header = read_exported(tmp_path / "m.onnx").facts.header
    assert (header.base, header.resize, header.image_size) == (f"torchvision:{PRETRAINED}", 40, 32)
    assert header.l2normalize
    data = str(tiny_set / "images")
    raw = tmp_path / "raw.onnx"
    result = exported(f"torchvision:{PRETRAINED}", raw, **flags, dataset="folder", data=data, l2normalize=False)
    assert set(result.candidates[1].recall) == {1, 2, 4, 8}
    assert not read_exported(raw).facts.header.l2normalize


def test_photos_have_no_recall(run: Path, tiny_set: Path, tmp_path: Path) -> None:
    result = exported(run, tmp_path / "m.onnx", dataset="images", data=str(tiny_set / "images"))
    assert result.missing is None
    assert [one.recall for one in result.candidates] == [{}, {}]
    assert result.candidates[1].worst_cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"out": "m.bin"}, "--out m.bin: must end in .onnx or .pt2"),
        ({"out": "m.onnx", "to": "torch"}, "--out m.onnx: must end in .pt2 with --to torch"),
        ({"out": "m.pt2", "to": "onnx"}, "--out m.pt2: must end in .onnx with --to onnx"),
        ({"out": "m.pt2", "int8": True}, "--int8: needs ONNX"),
        (
            {"out": "m.onnx", "to": "tflite"},
            "--to: must be one of onnx, torch, timm or sentence-transformers, got tflite",
        ),
        ({}, "--out: is required"),
        ({"to": "timm", "out": "m.onnx"}, "--out m.onnx: must be a folder with --to timm"),
        ({"to": "timm", "out": "m", "int8": True}, "--int8: needs ONNX"),
        ({"out": "m.pt2", "fp16": True}, "--fp16: needs ONNX"),
        ({"out": "m.pt2", "input": "float"}, "--input: needs ONNX"),
        ({"out": "m.onnx", "fp16": True, "int8": True}, "--int8, --fp16: exclude each other"),
        ({"to": "timm", "out": "m", "int8_weights": True}, "--int8-weights: needs ONNX"),
        ({"out": "m.onnx", "snippet": "js"}, "--out: has no effect with --snippet"),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, str | bool], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        resolve(ExportSettings, flags)


def test_what_cannot_be_exported(run: Path, onnx_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    refused(SettingsError, "is already exported. Name the checkpoint", onnx_file, out)
    refused(SettingsError, "--l2normalize False: ", run, out, l2normalize=False)
    refused(SettingsError, "--image-size 48: is larger than --resize 37", run, out, image_size="48", resize="37")
    np.savez(tmp_path / "v.npz", embeddings=np.ones((1, 2), np.float32), paths=["a"])
    refused(SettingsError, "is a vectors file without a network", tmp_path / "v.npz", out)


def test_an_exported_file_takes_one_size(onnx_file: Path, tiny_set: Path) -> None:
    flags = {"data": str(tiny_set / "images"), "workers": "0", "device": "cpu", "image_size": "30"}
    with pytest.raises(SettingsError, match=rf"--image-size 30: {onnx_file} only takes 32 pixel images"):
        evaluate_models([str(onnx_file)], resolve(EvaluateSettings, flags), silent)


def test_an_exported_file_teaches(run: Path, onnx_file: Path, tiny_set: Path, tmp_path: Path) -> None:
    flags: dict[str, str | bool] = {
        "dataset": "folder", "data": str(tiny_set / "images"), "cache_dir": str(tmp_path), "weights": "none",
        "base": NAME, "embedding_size": "8", "resize": "37", "image_size": "32", "batch": "8", "workers": "0",
        "num_image_per_class": "2", "iter_per_epoch": "1", "epochs": "1", "device": "cpu",
    }  # fmt: skip

    def taught(teacher: Path, **more: str | bool) -> torch.Tensor:
        settings = resolve(DistillSettings, flags | {"teacher": str(teacher), "save_dir": str(tmp_path / "s")} | more)
        built = build_run(settings, silent)
        assert isinstance(built.teacher, LiveTeacher)
        batch = next(built.loader.epoch(1))
        shutil.rmtree(tmp_path / "s")
        return built.teacher.view(batch.images, batch, False).embeddings

    torch.testing.assert_close(taught(onnx_file), taught(run), rtol=1e-3, atol=1e-4)
    with pytest.raises(SettingsError, match=rf"--image-size 36: {onnx_file} only takes 32 pixel images"):
        taught(onnx_file, image_size="36")
    with pytest.raises(SettingsError, match=f"--at-ratio: the teacher {onnx_file} does not have four stages"):
        taught(onnx_file, at_ratio="1")


def test_the_command(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["export", str(run), "--workers", "0", "--cache", "none", *arguments])
        output = capfd.readouterr()
        return int(end.value.code or 0), output.out, output.err

    code, out, err = said("--int8", "--calibration-images", "8", "--out", str(tmp_path / "m.onnx"), "--quiet")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["form", "MB", "ms", "x1", "ms", "x32", "worst", "cosine", "R@1", "R@2", "R@4", "R@8"] in lines
    assert [line[0] for line in lines if line and line[0] in ("torch", "onnx", "int8")][:3] == ["torch", "onnx", "int8"]
    assert "takes uint8 RGB (N, 3, 32, 32), center crop of 37 pixels (--fit square), gives 8-d, unit length" in out
    assert "compared on 24 evaluation images" in out
    assert "int8 costs" in out and "x smaller" in out
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert following.startswith(f"next: rkd evaluate {tmp_path / 'm.onnx'} --data ")
    with pytest.raises(SystemExit) as end:  # as it is printed
        main([*shlex.split(following)[2:], "--workers", "0"])
    assert not end.value.code and "next: rkd search" in capfd.readouterr().out
    code, out, err = said("--out", str(tmp_path / "j.onnx"), "--json")
    facts = json.loads(out)
    assert (code, err, facts["header"]["base"], facts["images"]) == (0, "", NAME, 24)
    assert [one["what"] for one in facts["candidates"]] == ["torch", "onnx"]
    assert facts["candidates"][1]["recall"]["1"] == facts["candidates"][0]["recall"]["1"]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = said("--out", str(tmp_path / "k.onnx"))
    assert (code, out) == (2, "")
    assert err == "rkd: error: rkd export: onnxscript is not installed. Run `pip install 'rkd-cli[export]'`.\n"
    assert not (tmp_path / "k.onnx").exists()


def test_a_full_disk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[..., int] = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if ".part" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(RunError, r"m\.onnx: cannot be written \(No space left on device\)", run, tmp_path / "m.onnx")
