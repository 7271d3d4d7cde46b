"""Decode image files and cut crops, as the published transforms do, in uint8."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFile, PngImagePlugin
from torch import Tensor

from rkd_cli.data.extensions import EXTENSIONS
from rkd_cli.data.members import source
from rkd_cli.data.resample import resize_window
from rkd_cli.errors import DataError
from rkd_cli.schemas import MAX_PIXELS, PADDING, Fit

DECODER = 4  # increase it when decoded pixels change, to invalidate caches
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF tag, as in ImageOps.exif_transpose
_GRAY_STEPS = {"L;2": 85, "L;4": 17}
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
_ROUNDING = 2  # of 255
# a JPEG this many times as large as is needed is decoded at a reduced size, at least _GAP times as large as is needed
_FAR, _GAP = 8, 2.5
_REMEDY = "Save it with 8 or 16 bits per channel, or remove it."
_TEXT = 1 << 30  # maximum bytes of text in a PNG
_LIMITS = Lock()
_T = TypeVar("_T")


class Box(NamedTuple):
    """A part of an upright image, in pixels, and the line of the list that names it."""

    left: int
    top: int
    right: int
    bottom: int
    line: int


@dataclass(frozen=True)
class Decoding:
    """How an image file is decoded to a square."""

    fit: Fit = "square"  # square squashes, crop takes the middle, pad adds a border of ``PADDING``
    published: bool = False  # as the published transform: ignore EXIF orientation, color profile and transparency
    max_pixels: int = MAX_PIXELS  # larger images raise a DataError
    boxes: Mapping[Path, Box] = field(default_factory=dict, hash=False)  # parts of images to use in place of the whole


AS_DISPLAYED = Decoding()


@dataclass(frozen=True)
class Crop:
    """An image of a batch and its crop, in pixels of the resized image."""

    index: int
    top: int
    left: int
    flip: bool = False
    size: tuple[int, int] | None = None  # height and width, to be resized to the image size; None: already that size
    view: int = 0  # number of the cached view


CROP = np.dtype([("top", "<u2"), ("left", "<u2"), ("height", "<u2"), ("width", "<u2"), ("flip", "?")])
_TRIES = 10  # of RandomResizedCrop to find a crop inside the image
_DRAWS = 1 << 20  # random numbers at once


def center_crop(index: int, resize: int, image_size: int) -> Crop:
    """The crop of torchvision's CenterCrop, with its rounding."""
    margin = round((resize - image_size) / 2.0)
    return Crop(index, margin, margin)


def random_crops(indices: Sequence[int], resize: int, image_size: int, generator: torch.Generator) -> list[Crop]:
    """The crops of RandomCrop and RandomHorizontalFlip, drawn image by image from torch's generator."""
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
    """The crops of RandomResizedCrop and RandomHorizontalFlip, drawn image by image from torch's generator.

    ``min_area`` is the smallest fraction of the image in a crop; the largest is 1.
    """
    log_ratios = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()
    crops = []
    for index in indices:
        top = left = 0
        height = width = resize  # if no draw fits
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
    """(count,) of ``CROP``: vectorized ``random_crops`` (or ``resized_crops`` with ``min_area``), equal to the bit.

    Like numpy's RandomState, torch's generator is MT19937. Each draw takes 32 bits; ``randint`` takes their remainder,
    ``rand`` and ``uniform_`` their lower 24. Only the lower 32 bits of ``seed`` count. A height of 0 means
    ``image_size``.
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
    """The crops of ``random_crops`` from raw draws, and the number of draws used."""
    each = 3 if margin else 1
    draws = raw[: len(raw) // each * each].reshape(-1, each)
    table = np.zeros(len(draws), CROP)
    table["top"], table["left"] = draws[:, 0] % (margin + 1), draws[:, each // 2] % (margin + 1)
    table["flip"] = _uniform(draws[:, -1]) < 0.5
    return table, draws.size


def _resized_block(raw: np.ndarray, resize: int, min_area: float) -> tuple[np.ndarray, int]:
    """The crops of ``resized_crops`` from raw draws, and the number of draws used."""
    log_ratios = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()
    areas = resize * resize * _uniform(raw[:-1], min_area, 1.0).astype(np.float64)
    ratios = torch.from_numpy(_uniform(raw[1:], *log_ratios)).exp().double().numpy()
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= resize) & (heights > 0) & (heights <= resize)
    # for a crop that starts at each draw: number of failed tries, and number of draws used
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
    """torch's ``uniform_`` from raw draws: float32, computed in float64."""
    least, span = np.float32(low), np.float32(high) - np.float32(low)
    return ((raw & 0xFFFFFF) * 2.0**-24 * float(span) + float(least)).astype(np.float32)


def cut(pixels: Tensor, crop: Crop, image_size: int) -> Tensor:
    """(R, R, 3) uint8 -> (image_size, image_size, 3) uint8: the crop, resized and flipped as it says."""
    height, width = crop.size or (image_size, image_size)
    window = pixels[crop.top : crop.top + height, crop.left : crop.left + width]
    if crop.size:
        window = resize_window(window, image_size)
    return window.flip(1) if crop.flip else window  # seven times as fast as in numpy


def load_resized(path: Path, resize: int, decoding: Decoding = AS_DISPLAYED) -> np.ndarray:
    """Decode an image file to a (resize, resize, 3) uint8 square of RGB (bilinear)."""
    return resized(path, resize, str(path), decoding)


def resized(
    file: Path | BytesIO | Image.Image, resize: int, name: str, decoding: Decoding = AS_DISPLAYED
) -> np.ndarray:
    """``load_resized`` of a file, its data or an open image, which is decoded whole; ``name`` is for errors."""
    box = decoding.boxes.get(file) if isinstance(file, Path) else None

    def square(image: Image.Image) -> np.ndarray:
        if not decoding.published and not box and image is not file:
            _draft(image, resize, decoding.fit)
        return _square(image, resize, decoding, box)

    with _decoding(name):
        return read_image(file, square, decoding.max_pixels)


def evaluated(
    file: Path | BytesIO | Image.Image, resize: int, image_size: int, name: str, decoding: Decoding
) -> Tensor:
    """(image_size, image_size, 3) uint8: the center crop of ``resized``, as in evaluation."""
    square = torch.from_numpy(resized(file, resize, name, decoding))
    return cut(square, center_crop(0, resize, image_size), image_size)


def read_image(
    file: Path | BytesIO | Image.Image, use: Callable[[Image.Image], _T], max_pixels: int = sys.maxsize
) -> _T:
    """Open an image and return ``use(image)``.

    Pillow's limits are global, so they are raised only for files that exceed them, one at a time. For content, which
    anyone may send, they stay, and its format must be one of ``EXTENSIONS`` (for others Pillow runs programs). Damaged
    files raise any exception.
    """

    def attempt() -> _T:
        found = source(file) if isinstance(file, Path) else file
        formats = _formats() if isinstance(file, BytesIO) else None
        with nullcontext(found) if isinstance(found, Image.Image) else Image.open(found, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(image.width * image.height, max_pixels)
            return use(image)

    try:
        return attempt()
    except (Image.DecompressionBombError, ValueError):  # ValueError: text in a PNG exceeds Pillow's limit
        if isinstance(file, BytesIO):
            raise
        with _raised_limits(max_pixels):
            return attempt()


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Pillow's names of the formats of ``EXTENSIONS``."""
    known = Image.registered_extensions()
    return sorted({known[extension] for extension in EXTENSIONS if known.get(extension) in Image.OPEN})


def as_shown(image: Image.Image, shrink: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image of any mode as viewers display it: upright, 8 bits, on white, sRGB.

    ``shrink`` resizes the upright image (RGB, L or CMYK) before the color conversion, which is slow on many pixels.
    """
    key = _transparent_color(image)
    _load(image)
    profile, turned = image.info.get("icc_profile"), _orientation(image)
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion of La that Pillow has
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    mode = {"LA": "L", "LAB": ""}.get(image.mode, image.mode)  # LAB colors are absolute and need no profile
    transform, mode = _to_srgb(profile, mode if mode in ("L", "CMYK", "") else "RGB") if profile else (None, "RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layers)
    image = image.convert(mode)
    if turned is not None:  # 0 is a Transpose
        image = image.transpose(turned)
    image = shrink(image)
    return _transformed(image, transform) if transform else image


def _square(image: Image.Image, resize: int, decoding: Decoding, box: Box | None = None) -> np.ndarray:
    def shrink(upright: Image.Image) -> Image.Image:
        return _shrunk(_cropped(upright, box) if box else upright, resize, decoding.fit)

    small = shrink(image.convert("RGB")) if decoding.published else as_shown(image, shrink)
    if small.size != (resize, resize):
        padded = Image.new("RGB", (resize, resize), PADDING)
        padded.paste(small, ((resize - small.width) // 2, (resize - small.height) // 2))
        small = padded
    return np.array(small)


def _cropped(image: Image.Image, box: Box) -> Image.Image:
    if box.right > image.width or box.bottom > image.height:
        found = ",".join(map(str, box[:4]))
        raise _UnsupportedError(
            f"its box {found} is outside of its {image.width} x {image.height} pixels", f"Correct line {box.line}."
        )
    return image.crop(box[:4])


def _draft(image: Image.Image, resize: int, fit: Fit) -> None:
    """Let a JPEG far larger than is needed be decoded at 1/2, 1/4 or 1/8 of its size; other formats ignore it."""
    larger = (max(image.size) if fit == "pad" else min(image.size)) / resize
    if larger >= _FAR:
        scale = next(scale for scale in (8, 4, 2) if larger / scale >= _GAP)
        image.draft(None, (image.width // scale, image.height // scale))


def _shrunk(image: Image.Image, resize: int, fit: Fit) -> Image.Image:
    """Resize to a square, or for pad to fit into it."""
    width, height = image.size
    size, box = (resize, resize), None  # type: tuple[int, int], tuple[float, float, float, float] | None
    if fit == "crop" and width != height:
        # equals torchvision's Resize(resize) and CenterCrop, with their rounding, but resizes only the middle
        long = int(resize * max(width, height) / min(width, height))
        scale, start = max(width, height) / long, round((long - resize) / 2)
        edges = start * scale, (start + resize) * scale
        box = (edges[0], 0, edges[1], height) if width > height else (0, edges[0], width, edges[1])
    elif fit == "pad":
        longer = max(width, height)
        size = max(1, round(resize * width / longer)), max(1, round(resize * height / longer))
    return image.resize(size, Image.Resampling.BILINEAR, box)


def _load(image: Image.Image) -> None:
    """``image.load()`` without memory-mapping, with which Pillow corrupts uncompressed TIFFs rotated by 90 degrees."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes a loaded image upright; damaged EXIF data are ignored, as in viewers."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _transparent_color(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent color of a PNG in 8 bits, if Pillow leaves it in the file's 2, 4 or 16 bits; else None."""
    color, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if color is None or not tiles:
        return None
    bits = str(tiles[0].args)
    if bits in _GRAY_STEPS:
        return int(color) * _GRAY_STEPS[bits]
    return tuple(value >> 8 for value in color) if bits == "RGB;16B" else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert gray values of more than 8 bits to L; transparent becomes white."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
    elif image.mode == "I" and image.format == "PPM":
        white = 2**16 - 1  # Pillow scales them
    else:
        raise _UnsupportedError(f"32-bit pixels ({image.mode}) whose white value is unknown", _REMEDY)
    values = np.asarray(image).astype(np.uint32)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = white
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow inverts only 8-bit images
        values = white - values
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform from an embedded profile to sRGB, and the mode that it takes.

    No transform if it would change nothing, or if the profile is damaged or for another mode than RGB, L or CMYK, as in
    viewers.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        takes = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "")
        if takes != mode and (takes, mode) != ("RGB", "L"):
            return None, "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), takes, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None, "RGB"
    if takes != "CMYK":
        # there are many versions of the sRGB profile that differ by rounding: leave those pixels unchanged
        levels = range(0, 256, 17)
        colors = Image.new("RGB", (16, 256))
        colors.putdata([(r, g, b) for r in levels for g in levels for b in levels])
        probe = colors.convert(takes)
        found = ImageChops.difference(_transformed(probe, transform), probe.convert("RGB"))
        if np.asarray(found).max() <= _ROUNDING:
            return None, "RGB"
    return transform, takes


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    found = ImageCms.applyTransform(image, transform)
    assert found is not None  # None only if applied in place
    return found


class _UnsupportedError(Exception):
    """An intact image that cannot be used: reason and remedy."""


def _too_large(pixels: int, limit: int) -> _UnsupportedError:
    return _UnsupportedError(
        f"{pixels:,} pixels, more than the limit of {limit:,}",
        "Increase --max-pixels (max_pixels in Python) if it is a real photo, or remove it.",
    )


@contextmanager
def _raised_limits(max_pixels: int) -> Iterator[None]:
    names = ((Image, "MAX_IMAGE_PIXELS"), (PngImagePlugin, "MAX_TEXT_CHUNK"), (PngImagePlugin, "MAX_TEXT_MEMORY"))
    with _LIMITS:
        before = [getattr(module, name) for module, name in names]
        try:
            for (module, name), value in zip(names, (max_pixels, _TEXT, _TEXT), strict=True):
                setattr(module, name, value)
            yield
        except Image.DecompressionBombError as error:  # raised above twice the limit
            (pixels, *_) = re.findall(r"\d+", str(error))
            raise _too_large(int(pixels), max_pixels) from None
        finally:
            for (module, name), value in zip(names, before, strict=True):
                setattr(module, name, value)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # irregular files that can be read, as with the published transform
            yield
    except FileNotFoundError:
        raise DataError(f"{name}: the image was deleted since the data set was read. Run the command again.") from None
    except _UnsupportedError as error:
        reason, remedy = error.args
        raise DataError(f"{name}: cannot be used ({reason}). {remedy}") from None
    except Exception as error:  # decoders raise any type for damaged files
        reason = re.sub(" <_io.BytesIO.*>", "", str(error).replace(name, ""))
        reason = reason.replace("\n", " ").strip(" '\"") or type(error).__name__
        raise DataError(f"{name}: cannot be decoded ({reason}). Replace or remove it.") from None


def load_crops(
    paths: Sequence[Path],
    crops: Sequence[Crop],
    resize: int,
    image_size: int,
    decoding: Decoding = AS_DISPLAYED,
) -> Tensor:
    """(B, 3, image_size, image_size) uint8 crops. A DataError has one line for every damaged image."""
    batch = torch.empty(len(crops), image_size, image_size, 3, dtype=torch.uint8)
    problems: list[str] = []
    for slot, crop in enumerate(crops):
        try:
            pixels = torch.from_numpy(load_resized(paths[crop.index], resize, decoding))
        except DataError as error:
            problems.extend(error.problems)
            continue
        batch[slot] = cut(pixels, crop, image_size)
    if problems:
        raise DataError(*problems)
    return batch.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W), no copy
