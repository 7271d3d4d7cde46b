"""Pixels, bit for bit against the torchvision transforms of the published protocol."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from rkd_cli.data.decode import Crop, Decoding, center_crop, load_crops, load_resized, random_crops, resized_crops
from rkd_cli.errors import DataError
from rkd_cli.models import EmbeddingNet

NORMALIZE = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
SIZES = [(256, 224), (72, 64), (71, 64), (64, 64)]


def published(image: Image.Image, resize: int, image_size: int, train: bool) -> torch.Tensor:
    """The published transform, drawing from torch's global generator."""
    crop = [transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip()]
    steps = [
        transforms.Resize((resize, resize)),
        *(crop if train else [transforms.CenterCrop(image_size)]),
        transforms.ToTensor(),
        NORMALIZE,
    ]
    transformed: torch.Tensor = transforms.Compose(steps)(image.convert("RGB"))
    return transformed


def noise(mode: str, width: int = 97, height: int = 61) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    channels = {"L": 1, "1": 1, "P": 3, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()
    if mode == "P":
        return Image.fromarray(values).quantize(64)
    if mode == "1":
        return Image.fromarray(values).convert("1")
    return Image.fromarray(values, mode)


def save(image: Image.Image, folder: Path, name: str, **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Every kind of image that a data set may hold."""
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone held upright
    return [
        save(noise("RGB"), tmp_path, "color.jpg"),
        save(noise("RGB", 30, 200), tmp_path, "tall.png"),
        save(noise("L"), tmp_path, "gray.jpg"),
        save(noise("1"), tmp_path, "bits.png"),
        save(noise("P"), tmp_path, "palette.png"),
        save(noise("P"), tmp_path, "transparent.png", transparency=bytes(range(64))),
        save(noise("RGBA"), tmp_path, "alpha.png"),
        save(noise("LA"), tmp_path, "gray-alpha.png"),
        save(noise("CMYK"), tmp_path, "print.jpg"),
        save(noise("I;16"), tmp_path, "deep.png"),
        save(noise("RGB"), tmp_path, "turned.jpg", exif=turned),
    ]


@pytest.mark.parametrize(("resize", "image_size"), SIZES)
@pytest.mark.parametrize("train", [True, False])
def test_equals_the_published_transform(files: list[Path], resize: int, image_size: int, train: bool) -> None:
    check_equal(files, resize, image_size, train)


@pytest.mark.parametrize("train", [True, False])
def test_equals_the_published_transform_on_real_birds(cub10_archive: Path, tmp_path: Path, train: bool) -> None:
    with tarfile.open(cub10_archive) as archive:
        birds = [m for m in archive if m.name.endswith(".jpg")][::25]
        files = []
        for member in birds:
            content = archive.extractfile(member)
            assert content
            files.append(tmp_path / Path(member.name).name)
            files[-1].write_bytes(content.read())
    check_equal(files, 256, 224, train)


def check_equal(files: list[Path], resize: int, image_size: int, train: bool) -> None:
    torch.manual_seed(7)
    expected = torch.stack([published(Image.open(file), resize, image_size, train) for file in files])
    if train:
        crops = random_crops(range(len(files)), resize, image_size, torch.Generator().manual_seed(7))
    else:
        crops = [center_crop(i, resize, image_size) for i in range(len(files))]
    pixels = load_crops(files, crops, resize, image_size, Decoding(published=True))
    assert pixels.dtype == torch.uint8
    network = EmbeddingNet(torch.nn.Identity(), 3, 2, l2normalize=False)
    assert torch.equal(network.normalize(pixels), expected)


@pytest.mark.parametrize("min_area", [0.08, 0.25, 0.9, 1.0])
@pytest.mark.parametrize(("resize", "image_size"), [*SIZES, (80, 21), (40, 40)])
def test_resized_crops_are_torchvisions(files: list[Path], resize: int, image_size: int, min_area: float) -> None:
    """Draws and pixels both, of uint8 tensors; at 1.0 no draw but a square one fits, and all is shown."""
    transform = v2.Compose([v2.RandomResizedCrop(image_size, (min_area, 1.0)), v2.RandomHorizontalFlip()])
    torch.manual_seed(7)
    whole = [torch.from_numpy(load_resized(file, resize)).permute(2, 0, 1) for file in files]
    expected = torch.stack([transform(pixels) for pixels in whole])
    crops = resized_crops(range(len(files)), resize, image_size, torch.Generator().manual_seed(7), min_area)
    assert torch.equal(load_crops(files, crops, resize, image_size), expected)


def test_resized_crops_show_areas_of_every_size_and_shape() -> None:
    crops = resized_crops(range(2000), 100, 64, torch.Generator().manual_seed(1), 0.25)
    sizes = torch.tensor([crop.size for crop in crops], dtype=torch.float64)
    areas, ratios = sizes.prod(dim=1) / 100**2, sizes[:, 1] / sizes[:, 0]
    assert 0.24 < areas.min() < 0.26
    assert areas.max() > 0.95
    assert 0.54 < areas.mean() < 0.64  # wide ones that do not fit are drawn again
    assert 0.72 < ratios.min() < 0.76
    assert 1.31 < ratios.max() < 1.38
    ends = torch.tensor([(crop.top, crop.left) for crop in crops]) + sizes
    assert ends.min() > 0
    assert ends.max() == 100
    assert 0.45 < sum(crop.flip for crop in crops) / 2000 < 0.55


def test_a_crop_of_the_image_size_is_not_resampled(files: list[Path]) -> None:
    plain, sized = (load_crops(files[:1], [Crop(0, 3, 4, True, size)], 40, 32) for size in (None, (32, 32)))
    assert torch.equal(plain, sized)


def test_every_damaged_image_of_a_batch_is_named(tmp_path: Path) -> None:
    good = save(noise("RGB"), tmp_path, "good.jpg")
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    empty = tmp_path / "empty.png"
    empty.touch()
    buffer = BytesIO()
    noise("RGB").save(buffer, "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(buffer.getvalue()[:1000])
    gone = tmp_path / "gone.jpg"
    files = [good, text, empty, cut, gone]
    with pytest.raises(DataError) as caught:
        load_crops(files, [center_crop(i, 32, 32) for i in range(5)], 32, 32)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [str(f) for f in files[1:]]
    assert all("\n" not in problem for problem in caught.value.problems)
