"""rkd_cli.load: the vectors of ``rkd embed``, whatever the images come as, and one line for what is no image."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import rkd_cli
from rkd_cli.commands.embed import embed_file
from rkd_cli.embedding.vectors import read_vectors, write_vectors
from rkd_cli.errors import CheckpointError, DataError, RkdError, RunError, SettingsError
from rkd_cli.events import silent
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import TeacherSpace, header_of, tensors_of
from rkd_cli.models.sources import open_network
from rkd_cli.settings import EmbedSettings
from rkd_cli.settings.resolve import resolve

NAME = "shufflenet_v2_x0_5"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory; sides whose difference is odd, so that a crop one pixel off shows."""
    torch.manual_seed(0)
    model = build_model(NAME, 8, l2normalize=False).train()
    for _ in range(30):  # of batch norms: statistics under which images differ in their embeddings
        model(torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 32, 32))
    path = tmp_path_factory.mktemp("runs") / "student"
    path.mkdir()
    save_model(path / "best.safetensors", model.state_dict(), header_of(model, NAME, 37, 32, "folder"))
    return path


@pytest.fixture(scope="module")
def files(tiny_set: Path) -> list[Path]:
    return sorted(tiny_set.glob("images/*/*.jpg"))[:7]


def textbook(path: Path) -> torch.Tensor:
    """(3, 32, 32) uint8: torchvision's own evaluation transform."""
    with Image.open(path) as image:
        square = torchvision.transforms.Resize((37, 37))(image.convert("RGB"))
        return torch.from_numpy(np.array(torchvision.transforms.CenterCrop(32)(square))).permute(2, 0, 1)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_a_student_embeds_in_its_teachers_space(
    run: Path, files: list[Path], tmp_path: Path, unit: bool, projected: bool
) -> None:
    model, weight = load_model(run / "best.safetensors"), torch.randn(5, 8)
    model.teacher_space = TeacherSpace(5, unit, {8: weight}) if projected else TeacherSpace(8, unit, {})
    save_model(tmp_path / "s.safetensors", tensors_of(model), header_of(model, NAME, 37, 32, "folder"))
    due = rkd_cli.load(tmp_path / "s.safetensors", device="cpu").embed(files)
    loaded = rkd_cli.load(tmp_path / "s.safetensors", device="cpu", teacher_space=True)
    if projected:
        due = due @ weight.numpy().T
    if unit:
        due = due / np.linalg.norm(due, axis=1, keepdims=True)
    assert loaded.size == due.shape[1]
    assert loaded.embed(files) == pytest.approx(due, abs=1e-4)


def test_a_model_of_no_teachers_space_is_refused_there(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.safetensors: was not trained in its teacher's space"):
        rkd_cli.load(run, device="cpu", teacher_space=True)


def test_files_embed_as_by_the_command(run: Path, files: list[Path], tmp_path: Path) -> None:
    flags = {"data": str(files[0].parents[1]), "out": str(tmp_path / "v.npz"), "batch": "3", "workers": "0"}
    embed_file(str(run), resolve(EmbedSettings, flags | {"device": "cpu"}), silent)
    written = read_vectors(tmp_path / "v.npz")
    every = [files[0].parents[1] / name for name in written.row]
    found = rkd_cli.load(run, device="cpu", batch=3).embed(every)
    assert found.dtype == np.float32
    assert np.array_equal(found, written.embeddings)  # bit for bit
    assert len(np.unique(found, axis=0)) > 40


def test_the_pixels_are_those_of_evaluation(run: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkd_cli.load(run / "best.safetensors", device="cpu", batch=4)
    seen: list[torch.Tensor] = []
    forward = EmbeddingNet.forward

    def watched(self: EmbeddingNet, images: torch.Tensor) -> object:
        seen.append(images)
        return forward(self, images)

    monkeypatch.setattr(EmbeddingNet, "forward", watched)
    arrays = [np.array(Image.open(file)) for file in files]
    for images in (files, [str(file) for file in files], map(Image.open, files), iter(arrays)):
        seen.clear()
        model.embed(images)
        assert [len(batch) for batch in seen] == [4, 3]
        assert torch.equal(torch.cat(seen), torch.stack([textbook(file) for file in files]))


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_any_mode_are_read_as_their_files(run: Path, files: list[Path], mode: str) -> None:
    model = rkd_cli.load(run, device="cpu")
    rgb = Image.open(files[0])
    image = rgb.convert("L").convert(mode) if mode in ("LA", "PA") else rgb.convert(mode)
    assert image.mode == mode
    assert np.array_equal(model.embed(image), model.embed(image.convert("RGB")))


def test_pil_images_are_embedded_as_they_are_shown(run: Path, files: list[Path]) -> None:
    """Upright, on white, of 16 bits as of 8."""
    model = rkd_cli.load(run, device="cpu")
    shown = Image.open(files[0]).convert("RGB")
    turned = shown.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    see_through = shown.convert("RGBA")
    see_through.putalpha(Image.new("L", shown.size, 0))
    gray = shown.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert np.array_equal(model.embed(turned), model.embed(shown))
    assert turned.getexif()[0x0112] == 6  # it stays as it is
    assert np.array_equal(model.embed(see_through), model.embed(Image.new("RGB", shown.size, "white")))
    assert np.array_equal(model.embed(deep), model.embed(gray))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pil_images_of_32_bits_are_refused_by_name(run: Path, files: list[Path], mode: str) -> None:
    image = Image.open(files[0]).convert("L").convert(mode)
    with pytest.raises(DataError, match=rf"^images\[0\]: cannot be used \(32-bit pixels \({mode}\)"):
        rkd_cli.load(run, device="cpu").embed(image)


@pytest.mark.parametrize("fit", ["square", "crop", "pad"])
def test_a_model_is_shown_images_in_its_fit_unless_told(run: Path, files: list[Path], tmp_path: Path, fit: Any) -> None:
    network, header = open_network(str(run / "best.safetensors"))
    assert isinstance(network, EmbeddingNet)
    save_model(tmp_path / "other.safetensors", network.state_dict(), header.model_copy(update={"fit": fit}))
    wide = Image.open(files[0]).convert("RGB").resize((90, 40))
    due = rkd_cli.load(run, device="cpu", fit=fit).embed(wide)
    assert np.array_equal(rkd_cli.load(tmp_path / "other.safetensors", device="cpu").embed(wide), due)
    square = rkd_cli.load(tmp_path / "other.safetensors", device="cpu", fit="square").embed(wide)
    assert np.array_equal(square, due) == (fit == "square")


def test_the_limit_of_pixels_is_a_parameter(run: Path, files: list[Path]) -> None:
    with pytest.raises(DataError, match=r"pixels, more than the limit of 99\)"):
        rkd_cli.load(run, device="cpu", max_pixels=99).embed(files[0])


def test_gray_arrays_and_rows_of_arrays(run: Path, files: list[Path]) -> None:
    model = rkd_cli.load(run, device="cpu")
    rgb = np.array(Image.open(files[0]))
    gray = rgb[..., 0]
    assert np.array_equal(model.embed(gray), model.embed(np.stack([gray] * 3, axis=2)))
    assert np.array_equal(model.embed(np.stack([rgb, rgb[::-1]])), model.embed([rgb, rgb[::-1]]))
    assert np.array_equal(model.embed(rgb[:, ::-1]), model.embed(np.ascontiguousarray(rgb[:, ::-1])))


def test_files_in_memory_are_read_as_on_the_disk(run: Path, files: list[Path]) -> None:
    """Large ones too, which are decoded at a reduced size."""
    model, data = rkd_cli.load(run, device="cpu", batch=4), io.BytesIO()
    Image.open(files[0]).resize((600, 500)).save(data, "JPEG")
    large = data.getvalue()
    due = model.embed(files[:2])
    with files[0].open("rb") as first, files[1].open("rb") as second:
        assert np.array_equal(model.embed([first, second]), due)
    assert np.array_equal(model.embed([file.read_bytes() for file in files[:2]]), due)
    data.seek(0)
    assert np.array_equal(model.embed(data), model.embed(large))


def test_tensors_are_channels_first_if_they_can_be(run: Path, files: list[Path]) -> None:
    model = rkd_cli.load(run, device="cpu")
    rgb = np.array(Image.open(files[0]))
    due, gray = model.embed(rgb), model.embed(rgb[..., 0])
    last = torch.from_numpy(rgb)
    for tensor in (last, last.permute(2, 0, 1), last.permute(2, 0, 1).contiguous()):
        assert np.array_equal(model.embed(tensor), due)
    for tensor in (last[..., 0], last[None, ..., 0]):
        assert np.array_equal(model.embed(tensor), gray)
    assert np.array_equal(model.embed(torch.stack([last, last.flip(0)])), model.embed([rgb, rgb[::-1]]))
    narrow = last[:, :3]  # (40, 3, 3): its last dimension holds the colors; (3, 40, 3) has them first
    assert np.array_equal(model.embed(narrow), model.embed(rgb[:, :3]))
    assert np.array_equal(model.embed(narrow.permute(2, 0, 1)), model.embed(rgb[:, :3]))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_of_archives(run: Path, files: list[Path], tmp_path: Path, kind: str) -> None:
    root = Path(shutil.make_archive(str(tmp_path / "a"), kind, files[0].parent))
    model = rkd_cli.load(run, device="cpu")
    assert np.array_equal(model.embed(root / files[0].name), model.embed(files[0]))
    with pytest.raises(DataError, match=r"none\.jpg: no such image"):
        model.embed(f"{root}/none.jpg")


class Flat(nn.Module):
    """The mean color of normalized images, times two."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(2 * torch.eye(3)[:, :size])
        self.drop = nn.Dropout(0.9)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.drop(images).mean(dim=(2, 3)) @ self.weight
        return found


def test_a_network_of_yours_embeds_as_it_is(files: list[Path]) -> None:
    network = Flat().train()
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.5)
    model = rkd_cli.load(network, image_size=32, resize=37, mean=mean, std=std, l2normalize=False)
    pixels = torch.stack([textbook(file) for file in files]) / 255
    due = 2 * (pixels.mean(dim=(2, 3)) - torch.tensor(mean)) / torch.tensor(std)
    assert model.embed(files) == pytest.approx(due.numpy(), abs=1e-4)
    assert (model.size, model.name, model.header.base) == (3, "Flat", "Flat")
    network.train()
    with torch.no_grad():
        network.weight.mul_(3)  # it is not copied
    assert model.embed(files) == pytest.approx(3 * due.numpy(), abs=1e-3)
    unit = rkd_cli.load(network, image_size=32, resize=37)
    assert np.linalg.norm(unit.embed(files), axis=1) == pytest.approx(1, abs=1e-5)
    assert (unit.header.mean, unit.header.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert rkd_cli.load(network).header.resize == 256
    assert unit.digest != model.digest


def test_a_network_of_timm_embeds_as_by_its_name(files: list[Path], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", num_classes=0)  # its mean is not ImageNet's
    torch.save(network.state_dict(), tmp_path / "w.pth")
    named = rkd_cli.load("timm:test_vit", weights=tmp_path / "w.pth", device="cpu")
    model = rkd_cli.load(network)
    assert model.embed(files) == pytest.approx(named.embed(files), abs=1e-5)
    facts = {"resize", "image_size", "mean", "std", "l2normalize", "embedding_size"}
    assert model.header.model_dump(include=facts) == named.header.model_dump(include=facts)


def test_a_network_of_rkd_has_its_own_normalization(run: Path, files: list[Path]) -> None:
    network = load_model(run / "best.safetensors")
    model = rkd_cli.load(network, image_size=32, resize=37)
    assert model.embed(files) == pytest.approx(rkd_cli.load(run, device="cpu").embed(files), abs=1e-5)


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        (nn.Linear(3, 3), {}, "Linear: fails on an image of 224 pixels ("),
        (nn.Flatten(), {}, "Flatten: returns 150528 dimensions, more than 65536."),
        (nn.LSTM(224, 3, 1), {}, "LSTM: fails on an image"),
        (nn.Flatten(0), {}, "Flatten: returns torch.float32 of shape (150528,). A network takes (1, 3, 224, 224) norm"),
        (Flat(), {"mean": (1, 2)}, "mean: must be three numbers, one a channel, got (1, 2)"),
        (Flat(), {"size": 3}, "load(): unknown argument size"),
        (Flat(), {"image_size": 0}, "--image-size: must be at least 1, got 0"),
        (Flat(), {"image_size": 32, "resize": 30}, "--image-size 32: is larger than --resize 30"),
        ("run", {"mean": (0, 0, 0)}, "has its own. Omit the argument."),
    ],
    ids=str,
)
def test_what_a_network_must_be_is_one_line(run: Path, network: Any, arguments: Any, says: str) -> None:
    network = run if network == "run" else network
    with pytest.raises(SettingsError) as error:
        rkd_cli.load(network, **arguments)
    (line,) = error.value.problems
    assert says in line


def test_sides_of_a_named_network_are_parameters(run: Path, files: list[Path]) -> None:
    model = rkd_cli.load(run, device="cpu", image_size=30, resize=35)
    assert (model.header.image_size, model.header.resize) == (30, 35)
    assert model.digest.endswith(" 35 30")
    assert not np.allclose(model.embed(files[0]), rkd_cli.load(run, device="cpu").embed(files[0]), atol=1e-3)


def test_one_image_none_and_a_mixture_in_order(run: Path, files: list[Path]) -> None:
    model = rkd_cli.load(run, device="cpu", batch=2)
    alone = [model.embed(one) for one in (str(files[0]), Image.open(files[1]), np.array(Image.open(files[2])))]
    assert [one.shape for one in alone] == [(1, 8)] * 3
    assert model.embed([]).shape == (0, 8)
    mixed = model.embed([files[0], Image.open(files[1]), np.array(Image.open(files[2]))])
    assert mixed == pytest.approx(np.concatenate(alone), abs=1e-4)
    assert not np.allclose(mixed[0], mixed[1], atol=0.01)


def test_a_generator_is_read_a_batch_at_a_time(run: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkd_cli.load(run, device="cpu", batch=2)
    read: list[Path] = []
    when: list[int] = []
    forward = EmbeddingNet.forward

    def watched(self: EmbeddingNet, images: torch.Tensor) -> object:
        when.append(len(read))
        return forward(self, images)

    monkeypatch.setattr(EmbeddingNet, "forward", watched)

    def images() -> Iterator[Path]:
        for file in files[:5]:
            read.append(file)
            yield file

    assert model.embed(images()).shape == (5, 8)
    assert when == [2, 4, 5]


def test_what_is_known_of_it(run: Path) -> None:
    model = rkd_cli.load(str(run), device="cpu")
    assert (model.name, model.size, model.batch) == (str(run), 8, 128)
    assert (model.header.base, model.header.resize, model.header.image_size) == (NAME, 37, 32)
    assert model.context.device == torch.device("cpu")


def test_a_pretrained_network(files: list[Path], tmp_path: Path) -> None:
    network = torchvision.models.get_model(NAME)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = rkd_cli.load(f"torchvision:{NAME}", weights=str(tmp_path / "w.pth"), device="cpu")
    found = model.embed(files[:2])
    assert (model.size, found.shape, model.header.base) == (1024, (2, 1024), f"torchvision:{NAME}")
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_a_damaged_image_is_named(run: Path, files: list[Path], tmp_path: Path) -> None:
    model = rkd_cli.load(run, device="cpu", batch=2)
    half = tmp_path / "half.jpg"
    half.write_bytes(files[0].read_bytes()[:-300])
    with pytest.raises(DataError, match=f"^{half}: cannot be decoded"):
        model.embed([files[0], files[1], half])
    with Image.open(half) as opened, pytest.raises(DataError, match=rf"^images\[1\] \({half}\): cannot be decoded"):
        model.embed([files[0], opened])


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 4, 3), np.float32), "images[1]: is float32 of shape (4, 4, 3). Arrays must be uint8, (H"),
        (np.zeros((4, 4), np.int64), "is int64 of shape (4, 4)"),
        (np.zeros((3, 4, 4), np.uint8), "is uint8 of shape (3, 4, 4)"),
        (np.zeros((4, 4, 4), np.uint8), "is uint8 of shape (4, 4, 4)"),
        (np.zeros((0, 4, 3), np.uint8), "is uint8 of shape (0, 4, 3)"),
        (np.zeros(4, np.uint8), "is uint8 of shape (4,)"),
        (np.array(1, np.uint8), "is uint8 of shape ()"),
        (np.zeros((2, 4, 4, 3), np.uint8), "is uint8 of shape (2, 4, 4, 3)"),
        (torch.zeros(3, 4, 4), "images[1]: is float32 of shape (3, 4, 4). Tensors must be uint8: (3, H, W) or"),
        (torch.zeros(4, 4, 4, dtype=torch.uint8), "is uint8 of shape (4, 4, 4)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "is uint8 of shape (1, 3, 4, 4)"),
        (b"no image", "images[1]: cannot be decoded"),
        (io.StringIO("x"), "images[1]: is a text file. Open it with mode 'rb'."),
        (None, "images[1]: is of type NoneType. Pass a path, bytes, a binary file, a PIL image, a uint8 array or"),
        ("a.tar/x.jpg", "a.tar/x.jpg: no such image"),
        ("none.jpg", "none.jpg: no such image"),
        (Path(), ".: is a folder, not an image"),
    ],
    ids=lambda value: value[-40:] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_image_is_one_line(run: Path, files: list[Path], image: Any, says: str) -> None:
    model = rkd_cli.load(run, device="cpu")
    with pytest.raises(DataError) as caught:
        model.embed([files[0], image])
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_loaded(run: Path, tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.npz", np.ones((1, 2), np.float32), ["a"])
    cases: list[tuple[dict[str, Any], type[RkdError], str]] = [
        ({"name": run.parent}, CheckpointError, "contains no best.safetensors"),
        ({"name": "resnet18"}, CheckpointError, "Did you mean torchvision:resnet18"),
        ({"name": tmp_path / "v.npz"}, CheckpointError, "is a vectors file without a network"),
        ({"name": run, "weights": "w.pth"}, CheckpointError, "contains its weights"),
        ({"name": run, "device": "gpu"}, SettingsError, "must be auto, cpu, cuda or cuda:N, got gpu"),
        ({"name": run, "batch": 0}, SettingsError, "must be at least 1, got 0"),
    ]
    for arguments, kind, says in cases:
        with pytest.raises(kind, match=says):
            rkd_cli.load(**arguments)


def test_embeddings_that_are_not_finite(run: Path, files: list[Path]) -> None:
    model = rkd_cli.load(run, device="cpu")
    with torch.no_grad():
        next(model.embedder.network.parameters()).fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        model.embed(files[0])


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, rkd_cli; assert 'load' in dir(rkd_cli); assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "from rkd_cli import load; assert callable(load) and 'torch' in sys.modules\n"
        "try: rkd_cli.other\n"
        "except AttributeError as error: assert 'other' in str(error)\n"
        "else: sys.exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
