"""From an image file to the pixels of the published transforms, all of it on uint8 until the network normalizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data.resample import resize_window
from rkd_cli.errors import DataError

try:
    import pillow_heif
except ImportError:  # an extra
    HEIC_READER = ""
else:
    pillow_heif.register_heif_opener()  # here, where each process that decodes comes by
    HEIC_READER = f"pillow-heif {pillow_heif.__version__}"

HEIC = (".heic", ".heif")
_ALWAYS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
)  # torchvision's, and AVIF
EXTENSIONS = _ALWAYS + (HEIC if HEIC_READER else ())  # of the files that are images where none are listed


@dataclass(frozen=True)
class Crop:
    """One image of a batch and what to cut from it, in pixels of the resized image."""

    index: int
    top: int
    left: int
    flip: bool = False
    size: tuple[int, int] | None = None  # height and width, brought to the image size; None: just as large as that
    view: int = 0  # which of the crops that a teacher's vectors are kept of


def center_crop(index: int, resize: int, image_size: int) -> Crop:
    """The crop of torchvision's CenterCrop, its rounding included."""
    margin = round((resize - image_size) / 2.0)
    return Crop(index, margin, margin)


def random_crops(indices: Sequence[int], resize: int, image_size: int, generator: torch.Generator) -> list[Crop]:
    """The crops that RandomCrop, then RandomHorizontalFlip draw, image by image, from torch's generator."""
    crops = []
    for index in indices:
        top = left = 0
        if resize > image_size:
            top = int(torch.randint(0, resize - image_size + 1, (1,), generator=generator))
            left = int(torch.randint(0, resize - image_size + 1, (1,), generator=generator))
        flip = bool(torch.rand(1, generator=generator) < 0.5)
        crops.append(Crop(index, top, left, flip))
    return crops


def resized_crops(
    indices: Sequence[int], resize: int, image_size: int, generator: torch.Generator, min_area: float
) -> list[Crop]:
    """The crops that RandomResizedCrop, then RandomHorizontalFlip draw, image by image, from torch's generator.

    Args:
        indices: of the images.
        resize: side of the images.
        image_size: of what the crops are brought to.
        generator: what is drawn from.
        min_area: the smallest share of an image that a crop may show; the largest is all of it.
    """
    log_ratios = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()
    crops = []
    for index in indices:
        top = left = 0
        height = width = resize  # should no draw fit
        for _ in range(10):
            area = resize * resize * float(torch.empty(1).uniform_(min_area, 1.0, generator=generator))
            ratio = float(torch.empty(1).uniform_(*log_ratios, generator=generator).exp())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= resize and 0 < h <= resize:
                height, width = h, w
                top = int(torch.randint(0, resize - h + 1, (1,), generator=generator))
                left = int(torch.randint(0, resize - w + 1, (1,), generator=generator))
                break
        flip = bool(torch.rand(1, generator=generator) < 0.5)
        crops.append(Crop(index, top, left, flip, (height, width)))
    return crops


def cut(pixels: Tensor, crop: Crop, image_size: int) -> Tensor:
    """(R, R, 3) uint8 of its image -> (image_size, image_size, 3) uint8: the crop, mirrored where it says so."""
    height, width = crop.size or (image_size, image_size)
    window = pixels[crop.top : crop.top + height, crop.left : crop.left + width]
    if crop.size:
        window = resize_window(window, image_size)
    return window.flip(1) if crop.flip else window  # numpy takes seven times as long to mirror


def load_resized(path: Path, resize: int) -> np.ndarray:
    """Decode to RGB, ignore any EXIF rotation, and resize to a square without keeping the aspect ratio (bilinear).

    Returns:
        (resize, resize, 3) uint8.
    Raises:
        DataError: the file is no image, or a damaged one.
    """
    with _decoding(str(path)), Image.open(path) as image:
        return _square(image, resize)


def resized(image: Image.Image, resize: int, name: str) -> np.ndarray:
    """``load_resized`` of an image that is open; ``name`` is what an error calls it.

    Raises:
        DataError: it is damaged.
    """
    with _decoding(name):
        return _square(image, resize)


def _square(image: Image.Image, resize: int) -> np.ndarray:
    return np.array(image.convert("RGB").resize((resize, resize), Image.Resampling.BILINEAR))


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd but can be read, as the published transform reads it
            yield
    except FileNotFoundError:
        raise DataError(f"{name}: the image is gone since the data set was listed") from None
    except Exception as error:  # a damaged file can raise nearly anything from inside a decoder
        reason = str(error).replace(name, "").replace("\n", " ").strip(" '\"") or type(error).__name__
        raise DataError(f"{name}: not an image that can be read ({reason}): replace the file or remove it") from None


def load_crops(paths: Sequence[Path], crops: Sequence[Crop], resize: int, image_size: int) -> Tensor:
    """(B, 3, image_size, image_size) uint8: each crop of its image, mirrored where it says so.

    Raises:
        DataError: one line for every damaged image of the batch.
    """
    batch = torch.empty(len(crops), image_size, image_size, 3, dtype=torch.uint8)
    problems: list[str] = []
    for slot, crop in enumerate(crops):
        try:
            pixels = torch.from_numpy(load_resized(paths[crop.index], resize))
        except DataError as error:
            problems.extend(error.problems)
            continue
        batch[slot] = cut(pixels, crop, image_size)
    if problems:
        raise DataError(*problems)
    return batch.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W), no copy
