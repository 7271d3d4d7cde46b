"""What other programs make of an export: timm, sentence-transformers, transformers, onnxruntime, and the snippets."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps

import rkd_cli
from rkd_cli.commands.export import ExportResult, export_file
from rkd_cli.embedding.loaded import LoadedModel
from rkd_cli.errors import RunError, SettingsError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import freeze, header_of, load_model
from rkd_cli.models.exported import open_exported, read_exported
from rkd_cli.schemas import Fit
from rkd_cli.settings import DistillSettings, ExportSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.open import build_run
from rkd_cli.training.teachers import LiveTeacher

timm = pytest.importorskip("timm")
NAME = "timm:test_resnet"


def saved(folder: Path, base: str = NAME, fit: Fit = "square", unit: bool = True) -> Path:
    """A run's directory, of a network with statistics under which its embeddings differ."""
    torch.manual_seed(0)
    model = build_model(base, 8, unit).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3
    for _ in range(10):
        coarse = torch.rand(8, 3, 4, 4) * 255
        model(torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear").byte())
    folder.mkdir()
    save_model(folder / "best.safetensors", model.state_dict(), header_of(model, base, 72, 64, "", fit=fit))
    return folder


def exported(model: Path | str, out: Path, report: Any = silent, **more: str | bool) -> ExportResult:
    """An export that is compared on noise, unless ``more`` names images."""
    flags: dict[str, str | bool] = {"out": str(out), "workers": "0", "cache": "none"}
    return export_file(str(model), resolve(ExportSettings, flags | more), report)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth images of other shapes than squares; the second is rotated by its EXIF tag."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, size in enumerate([(120, 80), (90, 130), (75, 75)]):
        coarse = Image.fromarray(generator.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        tags = Image.Exif()
        tags[274] = 6 if number == 1 else 1
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png", exif=tags)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    fits: tuple[Fit, ...] = ("square", "crop", "pad")
    return {fit: saved(folder / fit, fit=fit) for fit in fits}


@pytest.fixture(scope="module")
def told() -> list[Event]:
    """What the exports of ``files`` reported."""
    return []


@pytest.fixture(scope="module")
def files(runs: dict[str, Path], told: list[Event], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX files, each in its own folder, by fit and input."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for fit, kind in (("square", "uint8"), ("crop", "float"), ("pad", "float")):
        (folder / fit).mkdir()
        found[fit] = exported(runs[fit], folder / fit / "m.onnx", told.append, input=kind).path
    return found


def loaded(model: Path) -> LoadedModel:
    return rkd_cli.load(model, device="cpu", precision="fp32")


def opened(photos: Path) -> list[Image.Image]:
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in sorted(photos.iterdir())]


def cosines(one: Any, other: Any) -> np.ndarray:
    one, other = (np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return np.asarray((one * other).sum(1))


@pytest.mark.parametrize(
    ("base", "fit"),
    [(NAME, "square"), (NAME, "crop"), ("mobilenet_v2", "pad"), ("timm:test_vit", "square"),
     ("mobilenet_v3_small", "square")],
)  # fmt: skip
def test_timm_loads_the_folder_and_its_own_transform_gives_our_embeddings(
    base: str, fit: Fit, photos: Path, tmp_path: Path
) -> None:
    run = saved(tmp_path / "run", base, fit, unit=False)
    result = exported(run, tmp_path / "out", to="timm")
    assert [form.what for form in result.candidates] == ["torch", "timm"]
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    with torch.no_grad():
        found = network(torch.stack([transform(image) for image in opened(photos)]))
    due = loaded(run).embed(sorted(photos.iterdir()))
    # the ViT takes 160 pixels alone: we resize to 64 before, timm at once
    assert cosines(found, due).min() > (0.99 if base == "timm:test_vit" else 0.99999)
    assert network.num_classes == found.shape[1] == 8
    if base != "timm:test_vit":
        np.testing.assert_allclose(found, due, rtol=1e-3, atol=1e-3 * np.abs(due).max())
    assert np.array_equal(loaded(tmp_path / "out").header.mean, network.pretrained_cfg["mean"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    if not base.startswith("mobilenet_v3"):  # whose convolution before the classifier is there, and does nothing
        own, theirs = run / "best.safetensors", tmp_path / "out/model.safetensors"
        assert theirs.stat().st_size == pytest.approx(own.stat().st_size, rel=0.05)


@pytest.mark.parametrize("unit", [True, False])
def test_sentence_transformers_loads_the_folder_with_its_own_modules(unit: bool, photos: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    run = saved(tmp_path / "run", unit=unit)
    exported(run, tmp_path / "out", to="sentence-transformers")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert all(type(module).__module__.startswith("sentence_transformers.") for module in model)
    assert not list((tmp_path / "out").rglob("*.py"))
    found, due = model.encode(opened(photos)), loaded(run).embed(sorted(photos.iterdir()))
    np.testing.assert_allclose(found, due, rtol=1e-3, atol=1e-3 * np.abs(due).max())
    there = loaded(tmp_path / "out")
    assert there.embed(sorted(photos.iterdir())) == pytest.approx(due, rel=1e-3, abs=1e-4 * float(np.abs(due).max()))


def test_the_card_is_that_of_the_run_and_says_how_to_use_the_folder(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run")
    (run / "README.md").write_text("---\nlicense: mit\nlibrary_name: rkd\n---\n\n# birds\n")
    exported(run, tmp_path / "out", to="timm")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: timm\n---\n\n# birds\n")
    assert "timm does not scale embeddings to unit length" in card
    code = card.partition("```py\n")[2].partition("```")[0]
    shutil.copy(photos / "1.png", tmp_path / "a.jpg")
    found: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code, found)
    due = loaded(run).embed(photos / "1.png")
    assert found["embedding"].numpy() == pytest.approx(due, abs=1e-4)


def test_a_folder_teaches_as_the_checkpoint_does(runs: dict[str, Path], tiny_set: Path, tmp_path: Path) -> None:
    exported(runs["square"], tmp_path / "out", to="timm")
    flags: dict[str, str | bool] = {
        "dataset": "folder", "data": str(tiny_set / "images"), "cache_dir": str(tmp_path), "weights": "none",
        "base": NAME, "embedding_size": "8", "resize": "72", "image_size": "64", "batch": "8", "workers": "0",
        "num_image_per_class": "2", "iter_per_epoch": "1", "epochs": "1", "device": "cpu",
    }  # fmt: skip

    def taught(teacher: Path) -> torch.Tensor:
        more: dict[str, str | bool] = {"teacher": str(teacher), "save_dir": str(tmp_path / f"student-{teacher.name}")}
        built = build_run(resolve(DistillSettings, flags | more), silent)
        assert isinstance(built.teacher, LiveTeacher)
        batch = next(built.loader.epoch(1))
        return built.teacher.view(batch.images, batch, False).embeddings

    torch.testing.assert_close(taught(tmp_path / "out"), taught(runs["square"]), rtol=1e-3, atol=1e-4)


def test_a_network_that_timm_does_not_have_is_refused_by_name(tmp_path: Path, runs: dict[str, Path]) -> None:
    run = saved(tmp_path / "run", "shufflenet_v2_x0_5")
    with pytest.raises(SettingsError, match="timm has no network with the tensors of shufflenet_v2_x0_5"):
        exported(run, tmp_path / "out", to="timm")
    with pytest.raises(SettingsError, match="already exists"):
        exported(runs["square"], tmp_path, to="timm")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_embeddings_is_not_written(
    tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rkd_cli.models import layouts

    monkeypatch.setattr(layouts, "_set_classifier", lambda *arguments: None)
    with pytest.raises(RunError, match="gives other embeddings"):
        exported(runs["square"], tmp_path / "out", to="timm")
    assert not (tmp_path / "out").exists()


def test_an_image_processor_of_transformers_and_onnxruntime_give_our_embeddings(
    runs: dict[str, Path], files: dict[str, Path], photos: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(files["crop"].parent)
    pixels = processor(opened(photos), return_tensors="np")["pixel_values"]
    session = onnxruntime.InferenceSession(files["crop"])
    assert pixels.dtype == np.float32 and pixels.shape[1:] == (3, 64, 64)
    (found,) = session.run(None, {"pixel_values": pixels})
    assert cosines(found, loaded(runs["crop"]).embed(sorted(photos.iterdir()))).min() > 0.999


def test_the_description_says_what_the_file_needs(files: dict[str, Path]) -> None:
    said = json.loads(files["square"].with_suffix(".json").read_text())
    assert (said["file"], said["opset"], said["weights"]) == ("m.onnx", 20, "float")
    assert said["input"] == {
        "name": "images", "type": "uint8", "shape": ["N", 3, 64, 64], "channels": "RGB", "normalization": None,
    }  # fmt: skip
    assert said["preprocessing"][1:] == [
        {"step": "resize", "fit": "square", "side": 72, "filter": "bilinear", "antialias": True},
        {"step": "center_crop", "side": 64},
    ]
    assert said["preprocessing"][0]["exif_orientation"] is True
    assert said["output"]["unit_length"] is True
    assert not files["square"].with_name("preprocessor_config.json").exists()
    floats = json.loads(files["crop"].with_suffix(".json").read_text())
    assert (floats["input"]["name"], floats["input"]["type"]) == ("pixel_values", "float32")
    assert floats["input"]["normalization"]["mean"] == [0.5, 0.5, 0.5], "those of the network"
    assert json.loads(files["crop"].with_name("preprocessor_config.json").read_text())["size"] == {"shortest_edge": 72}
    assert not files["pad"].with_name("preprocessor_config.json").exists(), "image processors cannot pad"
    assert json.loads(files["pad"].with_suffix(".json").read_text())["preprocessing"][1]["padding"] == [124, 116, 104]
    facts = read_exported(files["crop"]).facts
    assert (facts.input, facts.opset, onnx.load(files["crop"]).opset_import[0].version) == ("float", 20, 20)


def test_a_file_with_float_input_is_a_model(files: dict[str, Path], runs: dict[str, Path], photos: Path) -> None:
    paths = sorted(photos.iterdir())
    found, due = (loaded(path).embed(paths) for path in (files["crop"], runs["crop"]))
    assert found == pytest.approx(due, abs=1e-4)


def test_half_precision_halves_the_file(runs: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    result = exported(runs["square"], tmp_path / "m.onnx", fp16=True)
    checkpoint, half = result.candidates
    assert (half.what, read_exported(result.path).facts.weights) == ("fp16", "fp16")
    assert half.bytes < 0.6 * checkpoint.bytes
    assert 0.9999 < (half.worst_cosine or 0) <= 1.0001
    paths = sorted(photos.iterdir())
    found, due = (loaded(path).embed(paths) for path in (result.path, runs["square"]))
    assert found == pytest.approx(due, abs=0.01) and not np.array_equal(found, due)


@pytest.mark.parametrize("base", [NAME, "timm:test_vit"])
def test_weights_in_int8_are_rounded_per_channel_and_nothing_else_changes(base: str, tmp_path: Path) -> None:
    """Against torch, with weights rounded by hand."""
    run, found = saved(tmp_path / "run", base), tmp_path / "m.onnx"
    exported(run, found, int8_weights=True)
    network = load_model(run / "best.safetensors")
    with torch.no_grad():
        rounded = freeze(copy.deepcopy(network))
        for layer in rounded.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                scale = layer.weight.flatten(1).abs().amax(1).div(127).view(-1, *[1] * (layer.weight.ndim - 1))
                layer.weight.copy_((layer.weight / scale.clamp(min=1e-30)).round() * scale)  # some channels are 0
        images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
        due, plain = rounded(images), network(images)
    assert open_exported(found)(images) == pytest.approx(due, abs=2e-5)
    assert (due - plain).abs().max() > 1e-3
    assert found.stat().st_size < 0.45 * (run / "best.safetensors").stat().st_size  # tiny networks: many scales


def test_int8_of_a_file_with_float_input(runs: dict[str, Path], tiny_set: Path, tmp_path: Path) -> None:
    flags: dict[str, str | bool] = {"dataset": "folder", "data": str(tiny_set / "images"), "calibration_images": "16"}
    result = exported(runs["square"], tmp_path / "m.onnx", input="float", int8=True, **flags)
    assert (result.candidates[-1].worst_cosine or 0) > 0.9
    assert json.loads((tmp_path / "m.json").read_text())["weights"] == "int8"


# --- the snippets ---


@pytest.fixture(scope="module")
def difficult(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A rotated, a transparent, a 16-bit, a gray and a large photo."""
    folder = tmp_path_factory.mktemp("difficult")
    coarse = np.random.default_rng(1).integers(0, 255, (6, 6, 4), dtype=np.uint8)

    def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
        return Image.fromarray(coarse).convert(mode).resize((width, height), Image.Resampling.BICUBIC)

    tags = Image.Exif()
    tags[274] = 6
    smooth(160, 100).save(folder / "rotated.jpg", exif=tags, quality=95)
    smooth(120, 90, "RGBA").save(folder / "alpha.png")
    deep = np.asarray(smooth(110, 150, "L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    smooth(100, 140, "L").save(folder / "gray.png")
    smooth(3000, 2000).save(folder / "large.jpg", quality=90)
    return sorted(folder.iterdir())


def test_the_python_snippet_embeds_as_rkd(
    rkd: Callable[..., tuple[int, str, str]], files: dict[str, Path], difficult: list[Path], tmp_path: Path
) -> None:
    for path in files.values():
        code, program, err = rkd("export", path, "--snippet", "python")
        assert (code, err) == (0, "")
        (tmp_path / "snippet.py").write_text(program)
        _same(path, difficult, [sys.executable, "-I", "snippet.py"], tmp_path)


def test_the_js_snippet_embeds_as_rkd(
    rkd: Callable[..., tuple[int, str, str]], files: dict[str, Path], difficult: list[Path], tmp_path: Path
) -> None:
    packages = Path(__file__).parents[2] / ".venv/node_modules"
    if not packages.is_dir() or not shutil.which("node"):
        pytest.skip("needs node, and packages that `make install` gets from npm")
    (tmp_path / "node_modules").symlink_to(packages)
    for path in files.values():
        _, program, _ = rkd("export", path, "--snippet", "js")
        (tmp_path / "snippet.mjs").write_text(program)
        _same(path, difficult, ["node", "snippet.mjs"], tmp_path)


def _same(model: Path, images: list[Path], command: list[str], folder: Path) -> None:
    """The program of a snippet gives the embeddings that ``rkd embed`` gives."""
    done = subprocess.run([*command, model, *images], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, due = json.loads(done.stdout), loaded(model).embed(images)
    alike = cosines(found["embeddings"], due)
    assert alike.min() > 0.999, dict(zip([path.name for path in images], alike, strict=True))
    np.testing.assert_allclose(found["cosine"], due @ due.T, atol=0.01)


def test_a_snippet_needs_an_exported_file(runs: dict[str, Path], rkd: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = rkd("export", runs["square"], "--snippet", "python")
    assert (code, out) == (2, "")
    assert rkd("export", "m.onnx", "--snippet", "js", "--int8")[2].count("--int8: has no effect with --snippet") == 1
    assert f"is no .onnx file. Write one with `rkd export {runs['square']} --out student.onnx`." in err


def test_what_cannot_be_described_is_told(files: dict[str, Path], told: list[Event]) -> None:
    text = "no preprocessor_config.json, because it cannot describe --fit pad: see m.json"
    assert [event.text for event in told if isinstance(event, Note)] == [text]
