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


CROP = np.dtype([("top", "<u2"), ("left", "<u2"), ("height", "<u2"), ("width", "<u2"), ("flip", "?")])
_TRIES = 10  # of RandomResizedCrop, to find a window that fits
_DRAWS = 1 << 20  # at once


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
        for _ in range(_TRIES):
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


def crop_table(count: int, resize: int, image_size: int, seed: int, min_area: float | None = None) -> np.ndarray:
    """The crops of ``count`` images that a new torch generator of this seed draws, bit for bit and all at once.

    As numpy's RandomState, torch's generator is MT19937: each draw takes 32 bits of it, ``randint`` their remainder,
    ``rand`` and ``uniform_`` their lower 24.

    Args:
        count: images.
        resize, image_size: sides of the images and of what the crops are brought to.
        seed: of the generator; its lower 32 bits count.
        min_area: None for ``random_crops``, else that of ``resized_crops``.
    Returns:
        (count,) of ``CROP``; a height of 0 is ``image_size``.
    """
    stream, table = np.random.RandomState(seed % (1 << 32)), np.zeros(count, CROP)
    done, rest = 0, np.empty(0, np.uint32)
    while done < count:
        raw = np.concatenate([rest, stream.randint(0, 1 << 32, _DRAWS, np.uint32)])
        if min_area is None:
            found, taken = _random_block(raw, resize - image_size)
        else:
            found, taken = _resized_block(raw, resize, min_area)
        found, rest = found[: count - done], raw[taken:]
        table[done : done + len(found)] = found
        done += len(found)
    return table


def _random_block(raw: np.ndarray, margin: int) -> tuple[np.ndarray, int]:
    """The crops that ``random_crops`` makes of draws, and how many of those it takes."""
    each = 3 if margin else 1
    draws = raw[: len(raw) // each * each].reshape(-1, each)
    table = np.zeros(len(draws), CROP)
    table["top"], table["left"] = draws[:, 0] % (margin + 1), draws[:, each // 2] % (margin + 1)
    table["flip"] = _uniform(draws[:, -1]) < 0.5
    return table, draws.size


def _resized_block(raw: np.ndarray, resize: int, min_area: float) -> tuple[np.ndarray, int]:
    """The crops that ``resized_crops`` makes of draws, and how many of those it takes."""
    log_ratios = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()
    areas = resize * resize * _uniform(raw[:-1], min_area, 1.0).astype(np.float64)
    ratios = torch.from_numpy(_uniform(raw[1:], *log_ratios)).exp().double().numpy()
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= resize) & (heights > 0) & (heights <= resize)
    # of a crop whose first draw is here: how many tries fail, and how many draws it takes
    failed = np.full(len(fits), _TRIES)
    for tries in reversed(range(_TRIES)):
        failed[: len(fits) - 2 * tries][fits[2 * tries :]] = tries
    takes = np.where(failed < _TRIES, 2 * failed + 5, 2 * _TRIES + 1)
    starts, at, step = [], 0, takes.tolist()
    while at < len(fits) - 2 * _TRIES - 3:
        starts.append(at)
        at += step[at]
    first = np.array(starts, np.int64)
    last = first + 2 * failed[first]  # the try that fits, if one does
    table = np.zeros(len(first), CROP)
    table["height"] = np.where(failed[first] < _TRIES, heights[last], resize)
    table["width"] = np.where(failed[first] < _TRIES, widths[last], resize)
    table["top"] = raw[last + 2] % (resize + 1 - table["height"])
    table["left"] = raw[last + 3] % (resize + 1 - table["width"])
    table["flip"] = _uniform(raw[first + takes[first] - 1]) < 0.5
    return table, at


def _uniform(raw: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """What torch's ``uniform_`` makes of draws: float32, computed in float64."""
    least, span = np.float32(low), np.float32(high) - np.float32(low)
    return ((raw & 0xFFFFFF) * 2.0**-24 * float(span) + float(least)).astype(np.float32)


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
