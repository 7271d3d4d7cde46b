"""From an image file to the pixels of the published transforms, all of it on uint8 until the network normalizes."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFile, PngImagePlugin
from torch import Tensor

from rkd_cli.data.resample import resize_window
from rkd_cli.errors import DataError
from rkd_cli.schemas import MAX_PIXELS, Fit

try:
    import pillow_heif
except ImportError:  # an extra
    HEIC_READER = ""
else:
    pillow_heif.register_heif_opener()  # here, where each process that decodes comes by
    HEIC_READER = f"pillow-heif {pillow_heif.__version__}"

HEIC = (".heic", ".heif")
# those of torchvision's ImageFolder, and what phones, cameras and browsers write; of a GIF the first frame is read
_ALWAYS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".png", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm"),
)
EXTENSIONS = _ALWAYS + (HEIC if HEIC_READER else ())  # of the files that are images where none are listed

DECODER = 3  # raised whenever the pixels of some file change: what was made of others is not used again
PADDING = (124, 116, 104)  # the mean color of ImageNet: near 0 once normalized, as convolutions pad their maps
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the EXIF tag, as ImageOps.exif_transpose has them
_GRAY_STEPS = {"L;2": 85, "L;4": 17}
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
_ROUNDING = 2  # of 255
_REMEDY = "save it with 8 or 16 bits a channel, or remove it"
_TEXT = 1 << 30  # bytes of text in a PNG: more is no photograph
_LIMITS = Lock()
_T = TypeVar("_T")


@dataclass(frozen=True)
class Decoding:
    """How an image file becomes a square, beside its side.

    Args:
        fit: square squashes it; crop takes its middle; pad shows all of it, on ``PADDING``.
        published: as the published transform has it, whatever a viewer shows: EXIF orientation, profile and
            transparency ignored.
        max_pixels: of an image; a larger one is refused.
    """

    fit: Fit = "square"
    published: bool = False
    max_pixels: int = MAX_PIXELS


AS_VIEWED = Decoding()


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


def load_resized(path: Path, resize: int, decoding: Decoding = AS_VIEWED) -> np.ndarray:
    """Decode an image file to RGB, as a viewer shows it, and make it a square (bilinear).

    Returns:
        (resize, resize, 3) uint8.
    Raises:
        DataError: the file is no image, a damaged one, too large, or one whose values have no fixed colors.
    """
    with _decoding(str(path)):
        return read_image(path, lambda image: _square(image, resize, decoding), decoding.max_pixels)


def resized(image: Image.Image, resize: int, name: str, decoding: Decoding = AS_VIEWED) -> np.ndarray:
    """``load_resized`` of an image that is open; ``name`` is what an error calls it.

    Raises:
        DataError: it is damaged, or its values have no fixed colors.
    """
    with _decoding(name):
        return _square(image, resize, decoding)


def read_image(path: Path, use: Callable[[Image.Image], _T], max_pixels: int = sys.maxsize) -> _T:
    """What ``use`` makes of an image file.

    Pillow's limits are of the process, so they are raised only for a file that they stop, and one file at a time.

    Raises:
        _Refused: the image has more than ``max_pixels``.
        Exception: nearly anything, of a damaged file.
    """

    def attempt() -> _T:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(image.width * image.height, max_pixels)
            return use(image)

    try:
        return attempt()
    except (Image.DecompressionBombError, ValueError):  # ValueError: text in a PNG that is larger than Pillow allows
        with _raised_limits(max_pixels):
            return attempt()


def as_shown(image: Image.Image, shrink: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """An image as a viewer shows it: upright, in 8 bits, on white, in sRGB; made smaller by ``shrink`` on the way.

    Args:
        image: as ``Image.open`` gives it, of any mode; it stays as it is.
        shrink: of the upright image, whose mode may be RGB, L or CMYK.
    Raises:
        _Refused: its values have no fixed colors.
    """
    key = _transparent_color(image)
    _load(image)
    profile, turned = image.info.get("icc_profile"), _orientation(image)
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    if image.mode == "La":
        image = image.convert("LA")  # which alone Pillow can convert
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    mode = {"LA": "L", "LAB": ""}.get(image.mode, image.mode)  # colors of LAB are absolute: no profile counts
    transform, mode = _to_srgb(profile, mode if mode in ("L", "CMYK", "") else "RGB") if profile else (None, "RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layers)
    image = image.convert(mode)
    if turned is not None:  # one of them is 0
        image = image.transpose(turned)
    image = shrink(image)
    return _transformed(image, transform) if transform else image  # of few pixels; all would take as long as decoding


def _square(image: Image.Image, resize: int, decoding: Decoding) -> np.ndarray:
    shrink = partial(_shrunk, resize=resize, fit=decoding.fit)
    small = shrink(image.convert("RGB")) if decoding.published else as_shown(image, shrink)
    if small.size != (resize, resize):
        padded = Image.new("RGB", (resize, resize), PADDING)
        padded.paste(small, ((resize - small.width) // 2, (resize - small.height) // 2))
        small = padded
    return np.array(small)


def _shrunk(image: Image.Image, resize: int, fit: Fit) -> Image.Image:
    """To a square; to pad, to what fits into it."""
    width, height = image.size
    size, box = (resize, resize), None  # type: tuple[int, int], tuple[float, float, float, float] | None
    if fit == "crop" and width != height:
        # the middle of what torchvision's Resize(resize) makes of it, its rounding included, and nothing else of that
        long = int(resize * max(width, height) / min(width, height))
        scale, start = max(width, height) / long, round((long - resize) / 2)
        edges = start * scale, (start + resize) * scale
        box = (edges[0], 0, edges[1], height) if width > height else (0, edges[0], width, edges[1])
    elif fit == "pad":
        longer = max(width, height)
        size = max(1, round(resize * width / longer)), max(1, round(resize * height / longer))
    return image.resize(size, Image.Resampling.BILINEAR, box)


def _load(image: Image.Image) -> None:
    """``image.load()``, without mapping the file: Pillow then garbles a plain TIFF that it turns by 90 degrees."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns a loaded image upright; viewers ignore EXIF data that are damaged."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _transparent_color(image: Image.Image) -> int | tuple[int, ...] | None:
    """The color of a PNG that is transparent, in the 8 bits that its pixels are brought to; None: as it stands.

    Pillow leaves it in the file's own 2, 4 or 16 bits.
    """
    color, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if color is None or not tiles:
        return None
    bits = str(tiles[0].args)
    if bits in _GRAY_STEPS:
        return int(color) * _GRAY_STEPS[bits]
    return tuple(value >> 8 for value in color) if bits == "RGB;16B" else None


def _eight_bits(image: Image.Image) -> Image.Image:
    """L of gray values of more bits, rounded; a transparent one is white.

    Raises:
        _Refused: nothing says which value is white.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
    elif image.mode == "I" and image.format == "PPM":
        white = 2**16 - 1  # Pillow scales them
    else:
        raise _Refused(f"its pixels are {image.mode}, 32-bit values of which none is white for certain", _REMEDY)
    values = np.asarray(image).astype(np.uint32)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = white
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; of 8 bits Pillow knows
        values = white - values
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform of a profile, and the mode that it takes; none where it would change nothing, or as viewers do
    ignores a profile that is damaged or of another mode.

    Args:
        profile: as it is embedded in the image.
        mode: RGB, L or CMYK.
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
        # sRGB has been written in many ways, some of which differ by a rounding: those files keep their bits
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
    assert found is not None  # as it was not asked to work in place
    return found


class _Refused(Exception):  # noqa: N818  # no error of Pillow's
    """An image that is not damaged and cannot be used: why, and what to do."""


def _too_large(pixels: int, limit: int) -> _Refused:
    return _Refused(
        f"{pixels:,} pixels, more than the limit of {limit:,}",
        "raise --max-pixels (max_pixels in Python) if it is a real photo, else remove it",
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
        except Image.DecompressionBombError as error:  # of more than twice as many
            (pixels, *_) = re.findall(r"\d+", str(error))
            raise _too_large(int(pixels), max_pixels) from None
        finally:
            for (module, name), value in zip(names, before, strict=True):
                setattr(module, name, value)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd but can be read, as the published transform reads it
            yield
    except FileNotFoundError:
        raise DataError(f"{name}: the image is gone since the data set was listed") from None
    except _Refused as refused:
        reason, remedy = refused.args
        raise DataError(f"{name}: not read ({reason}): {remedy}") from None
    except Exception as error:  # a damaged file can raise nearly anything from inside a decoder
        reason = str(error).replace(name, "").replace("\n", " ").strip(" '\"") or type(error).__name__
        raise DataError(f"{name}: not an image that can be read ({reason}): replace the file or remove it") from None


def load_crops(
    paths: Sequence[Path],
    crops: Sequence[Crop],
    resize: int,
    image_size: int,
    decoding: Decoding = AS_VIEWED,
) -> Tensor:
    """(B, 3, image_size, image_size) uint8: each crop of its image, mirrored where it says so.

    Raises:
        DataError: one line for every damaged image of the batch.
    """
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
