"""Images of every format, mode and orientation against what a viewer shows, from the specifications of the formats."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from rkd_cli.data import decode
from rkd_cli.data.decode import Decoding, load_resized, resized
from rkd_cli.errors import DataError
from rkd_cli.report.gallery import thumbnail

HEIGHT, WIDTH, RESIZE = 20, 28, 12
Array = np.ndarray
Orient = Callable[[Array], Array]

# EXIF 2.3, tag 274: which sides of the scene the first row and the first column show; (H, W, ...) upright -> stored
STORED: dict[int, Orient] = {
    1: lambda scene: scene,  # top, left
    2: lambda scene: scene[:, ::-1],  # top, right
    3: lambda scene: scene[::-1, ::-1],  # bottom, right
    4: lambda scene: scene[::-1],  # bottom, left
    5: lambda scene: scene.swapaxes(0, 1),  # left, top
    6: lambda scene: scene[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda scene: scene[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda scene: scene[::-1].swapaxes(0, 1),  # left, bottom
}


def scene() -> Array:
    """(H, W, 3) uint8: smooth, and another along each axis and in each corner."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    colors: Array = np.stack([9 * x, 12 * y, 255 - 4 * x - 6 * y], axis=2).clip(0, 255).astype(np.uint8)
    return colors


def gray() -> Array:
    return np.asarray(scene()[:, :, 0] // 2 + scene()[:, :, 1] // 2)


def alpha() -> Array:
    values = np.full((HEIGHT, WIDTH), 255, np.uint8)
    values[:6] = 0
    values[6:12] = 100
    return values


def on_white(color: Array, opacity: Array) -> Array:
    share = opacity[..., None] / 255
    return np.rint(color * share + 255 * (1 - share)).astype(np.uint8)


def rgb_of(values: Array) -> Array:
    return np.repeat(values[..., None], 3, axis=2)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    if orientation > 1:
        data[0x0112] = orientation
    return data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: Array, bits: int, orientation: int, transparent: tuple[int, ...] = (), *extra: bytes) -> bytes:
    """A PNG of (H, W) or (H, W, C) values of so many bits, by the specification."""
    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        places = np.arange(bits)[::-1]
        rows = [np.packbits((row.reshape(-1, 1) >> places & 1).astype(np.uint8)).tobytes() for row in values]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)), *extra]
    if transparent:
        parts.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    if orientation > 1:
        parts.append(chunk(b"eXIf", b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 274, 3, 1, orientation, 0, 0)))
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: Array, order: str, tags: dict[int, tuple[int, ...]], data: bytes | None = None) -> bytes:
    """An uncompressed TIFF of one strip, by the specification; all tags as SHORT or, where large, LONG."""
    height, width = values.shape[:2]
    body = data if data is not None else values.tobytes()
    entries = {256: (width,), 257: (height,), 259: (1,), 273: (8,), 278: (height,), 279: (len(body),)} | tags
    directory, later = b"", b""
    at = 8 + len(body) + len(body) % 2
    end = at + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        kind = "I" if tag in (273, 279) else "H"
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(packed) > 4:
            where, later = end + len(later), later + packed
            packed = struct.pack(f"{order}I", where)
        code = 4 if kind == "I" else 3
        directory += struct.pack(f"{order}HHI", tag, code, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return (head + body).ljust(at, b"\0") + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + later


def saved(values: Array, kind: str, orientation: int, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(values), mode)
    # of bytes pillow-heif makes the transforms that viewers of HEIF go by
    tagged = {"exif": exif(orientation).tobytes()} if orientation > 1 else {}
    image.save(file, kind, **tagged, **options)
    return file.getvalue()


def palette(orient: Orient, orientation: int, transparency: int | bytes) -> bytes:
    """Four columns of colors; in the file, colors 2 and 3 may be transparent."""
    indexes = np.ascontiguousarray(orient(np.arange(WIDTH)[None].repeat(HEIGHT, 0) * 4 // WIDTH)).astype(np.uint8)
    image = Image.fromarray(indexes).convert("L")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 40, 50, 60])
    file = io.BytesIO()
    image.save(file, "png", transparency=transparency, **({"exif": exif(orientation)} if orientation > 1 else {}))
    return file.getvalue()


def columns(*opacity: int) -> Array:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [40, 50, 60]])
    at = np.arange(WIDTH)[None].repeat(HEIGHT, 0) * 4 // WIDTH
    return on_white(colors[at], np.array(opacity)[at])


def keyed(color: Array, key: Array) -> Array:
    """What is shown where ``key`` is left out."""
    return np.where(key[..., None], 255, color).astype(np.uint8)


def deep(values: Array) -> Array:
    """16 bits whose rounding to 8 is the same, though their high byte is not always."""
    return (values.astype(np.uint16) * 257 - 120 * (values > 0)).astype(np.uint16)


def turned_tags(orientation: int) -> dict[int, tuple[int, ...]]:
    return {274: (orientation,)}


RGBA, LA = np.dstack([scene(), alpha()]), np.dstack([gray(), alpha()])
STEPS4, STEPS2 = gray() // 17, gray() // 86
CMYK = np.dstack([255 - scene(), np.zeros_like(gray())])

# name -> (the file of a scene as it is stored and an orientation, what is shown upright, the largest error)
CASES: dict[str, tuple[Callable[[Orient, int], bytes], Array, int]] = {
    "jpeg RGB": (lambda o, n: saved(o(scene()), "jpeg", n, quality=100, subsampling=0), scene(), 4),
    "jpeg L": (lambda o, n: saved(o(gray()), "jpeg", n, quality=100), rgb_of(gray()), 3),
    "jpeg CMYK": (lambda o, n: saved(o(CMYK), "jpeg", n, "CMYK", quality=100), scene(), 4),
    "mpo RGB": (lambda o, n: saved(o(scene()), "mpo", n, quality=100, subsampling=0), scene(), 4),
    "png RGB": (lambda o, n: saved(o(scene()), "png", n), scene(), 0),
    "png L": (lambda o, n: saved(o(gray()), "png", n), rgb_of(gray()), 0),
    "png 1": (lambda o, n: png(o(gray() > 99), 1, n), rgb_of(np.uint8(255) * (gray() > 99)), 0),
    "png RGBA": (lambda o, n: saved(o(RGBA), "png", n), on_white(scene(), alpha()), 1),
    "png LA": (lambda o, n: saved(o(LA), "png", n, "LA"), on_white(rgb_of(gray()), alpha()), 1),
    "png P": (lambda o, n: palette(o, n, b"\xff\xff\xff\xff"), columns(255, 255, 255, 255), 0),
    "png P index": (lambda o, n: palette(o, n, 2), columns(255, 255, 0, 255), 1),
    "png P bytes": (lambda o, n: palette(o, n, b"\xff\x50\x00\xa0"), columns(255, 80, 0, 160), 1),
    "png RGB tRNS": (
        lambda o, n: png(o(scene()), 8, n, tuple(scene()[3, 4])),
        keyed(scene(), (scene() == scene()[3, 4]).all(axis=2)),
        0,
    ),
    "png L tRNS": (lambda o, n: png(o(gray()), 8, n, (60,)), keyed(rgb_of(gray()), gray() == 60), 0),
    "png 4 bits tRNS": (lambda o, n: png(o(STEPS4), 4, n, (3,)), keyed(rgb_of(STEPS4 * 17), STEPS4 == 3), 0),
    "png 2 bits tRNS": (lambda o, n: png(o(STEPS2), 2, n, (1,)), keyed(rgb_of(STEPS2 * 85), STEPS2 == 1), 0),
    "png 1 tRNS": (lambda o, n: png(o(gray() > 99), 1, n, (0,)), np.full_like(scene(), 255), 0),
    "png 16 bits L": (lambda o, n: png(o(deep(gray())), 16, n), rgb_of(gray()), 0),
    "png 16 bits L tRNS": (
        lambda o, n: png(o(deep(gray())), 16, n, (int(deep(gray())[3, 4]),)),
        keyed(rgb_of(gray()), gray() == gray()[3, 4]),
        0,
    ),
    "png 16 bits LA": (
        lambda o, n: png(o(LA.astype(np.uint16) * 257), 16, n),
        on_white(rgb_of(gray()), alpha()),
        1,
    ),
    "png 16 bits RGB": (lambda o, n: png(o(deep(scene())), 16, n), scene(), 1),
    "png 16 bits RGB tRNS": (
        lambda o, n: png(o(scene().astype(np.uint16) * 257), 16, n, tuple(int(v) * 257 for v in scene()[3, 4])),
        keyed(scene(), (scene() == scene()[3, 4]).all(axis=2)),
        0,
    ),
    "png 16 bits RGBA": (lambda o, n: png(o(RGBA.astype(np.uint16) * 257), 16, n), on_white(scene(), alpha()), 1),
    "webp RGB": (lambda o, n: saved(o(scene()), "webp", n, lossless=True), scene(), 0),
    "webp RGBA": (lambda o, n: saved(o(RGBA), "webp", n, lossless=True, exact=True), on_white(scene(), alpha()), 1),
    "avif RGB": (lambda o, n: saved(o(scene()), "avif", n, quality=100, subsampling="4:4:4"), scene(), 5),
    "avif RGBA": (
        lambda o, n: saved(o(RGBA), "avif", n, quality=100, subsampling="4:4:4"),
        on_white(scene(), alpha()),
        8,
    ),
    "heif RGB": (lambda o, n: saved(o(scene()), "heif", n, quality=100, chroma="444"), scene(), 8),
    "tiff RGB": (lambda o, n: saved(o(scene()), "tiff", n), scene(), 0),
    "tiff RGB zipped": (lambda o, n: saved(o(scene()), "tiff", n, compression="tiff_adobe_deflate"), scene(), 0),
    "tiff RGBA": (lambda o, n: saved(o(RGBA), "tiff", n), on_white(scene(), alpha()), 1),
    "tiff LA": (lambda o, n: saved(o(LA), "tiff", n, "LA"), on_white(rgb_of(gray()), alpha()), 1),
    "tiff CMYK": (lambda o, n: saved(o(CMYK), "tiff", n, "CMYK"), scene(), 1),
    "tiff 16 bits": (lambda o, n: saved(o(deep(gray())), "tiff", n), rgb_of(gray()), 0),
    "tiff 16 bits, big end first": (
        lambda o, n: tiff(o(deep(gray()).astype(">u2")), ">", {258: (16,), 262: (1,), 277: (1,)} | turned_tags(n)),
        rgb_of(gray()),
        0,
    ),
    "tiff 16 bits, white is 0": (
        lambda o, n: tiff(o(65535 - deep(gray())), "<", {258: (16,), 262: (0,), 277: (1,)} | turned_tags(n)),
        rgb_of(gray()),
        0,
    ),
    "tiff 12 bits": (
        lambda o, n: tiff(o(gray()), "<", {258: (12,), 262: (1,), 277: (1,)} | turned_tags(n), twelve(o(gray()))),
        rgb_of(gray()),
        0,
    ),
    "tiff 16 bits RGB": (
        lambda o, n: tiff(o(deep(scene())), "<", {258: (16, 16, 16), 262: (2,), 277: (3,)} | turned_tags(n), None),
        scene(),
        1,
    ),
    "tiff La": (
        lambda o, n: tiff(
            o(premultiplied(LA)), "<", {258: (8, 8), 262: (1,), 277: (2,), 338: (1,)} | turned_tags(n), None
        ),
        on_white(rgb_of(gray()), alpha()),
        3,
    ),
}
# those whose formats have no orientation
UPRIGHT: dict[str, tuple[Callable[[], bytes], Array, int]] = {
    "gif P": (lambda: saved(gray(), "gif", 1), rgb_of(gray()), 0),
    "gif, transparent": (
        lambda: saved((gray() > 99).astype(np.uint8), "gif", 1, transparency=0),
        keyed(rgb_of((gray() > 99).astype(np.uint8)), gray() <= 99),
        0,
    ),
    "bmp RGB": (lambda: saved(scene(), "bmp", 1), scene(), 0),
    "ppm RGB": (lambda: saved(scene(), "ppm", 1), scene(), 0),
    "jp2 RGB": (lambda: saved(scene(), "jpeg2000", 1), scene(), 1),
    "jp2 RGBA": (lambda: saved(RGBA, "jpeg2000", 1), on_white(scene(), alpha()), 1),
    "jp2 16 bits": (lambda: saved(deep(gray()), "jpeg2000", 1), rgb_of(gray()), 0),
    "pgm 10 bits": (
        lambda: b"P5 %d %d 1023\n" % (WIDTH, HEIGHT) + np.rint(gray() / 255 * 1023).astype(">u2").tobytes(),
        rgb_of(gray()),
        0,
    ),
    "pgm 16 bits": (
        lambda: b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + deep(gray()).astype(">u2").tobytes(),
        rgb_of(gray()),
        0,
    ),
    "tiff YCbCr": (
        lambda: tiff(ycbcr(), "<", {258: (8, 8, 8), 262: (6,), 277: (3,), 530: (1, 1)}),
        scene(),
        3,
    ),
    "tiff LAB": (lambda: tiff(*grays_of_lab()), np.full((HEIGHT, WIDTH, 3), 119, np.uint8), 1),
}


def twelve(values: Array) -> bytes:
    """12 bits each, of rows that are filled up to bytes."""
    values = np.rint(values / 255 * 4095).astype(np.uint16)
    bits = (values[..., None] >> np.arange(12)[::-1] & 1).astype(np.uint8)
    return np.packbits(bits.reshape(len(values), -1), axis=1).tobytes()


def premultiplied(values: Array) -> Array:
    return np.stack([np.rint(values[..., 0] * (values[..., 1] / 255)), values[..., 1]], axis=2).astype(np.uint8)


def ycbcr() -> Array:
    """BT.601 at full range, as JFIF has it."""
    r, g, b = np.moveaxis(scene().astype(float), 2, 0)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    both = [(b - luma) / 1.772 + 128, (r - luma) / 1.402 + 128]
    return np.asarray(np.rint(np.stack([luma, *both], axis=2)).clip(0, 255), np.uint8)


def grays_of_lab() -> tuple[Array, str, dict[int, tuple[int, ...]]]:
    """L* = 50 (of 255: 127.5), a* = b* = 0: a reflectance of 18.4 %, 119 in sRGB."""
    values = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    values[..., 0] = 128
    return values, "<", {258: (8, 8, 8), 262: (8,), 277: (3,)}


def square_of(shown: Array, resize: int = RESIZE) -> Array:
    return np.array(Image.fromarray(shown).resize((resize, resize), Image.Resampling.BILINEAR))


def error(found: Array, due: Array) -> int:
    return int(np.abs(found.astype(int) - due).max())


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("case", CASES)
def test_an_image_is_decoded_as_a_viewer_shows_it(tmp_path: Path, case: str, orientation: int) -> None:
    make, shown, tolerance = CASES[case]
    if case.startswith("heif"):
        pytest.importorskip("pillow_heif")
    path = tmp_path / f"a.{case.split()[0]}"
    path.write_bytes(make(STORED[orientation], orientation))
    due = square_of(shown)
    assert error(load_resized(path, RESIZE), due) <= tolerance
    with Image.open(path) as image:
        assert error(resized(image, RESIZE, "an image that is open"), due) <= tolerance


@pytest.mark.parametrize("case", UPRIGHT)
def test_formats_without_orientation_are_decoded_as_a_viewer_shows_them(tmp_path: Path, case: str) -> None:
    make, shown, tolerance = UPRIGHT[case]
    path = tmp_path / f"a.{case.split(maxsplit=1)[0]}"
    path.write_bytes(make())
    assert error(load_resized(path, RESIZE), square_of(shown)) <= tolerance


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "HSV", "YCbCr", "I;16L", "I;16B", "RGBX", "LAB"])
def test_images_in_memory_are_taken_as_they_are_shown(mode: str) -> None:
    shown, tolerance = on_white(rgb_of(gray()), alpha()), 3
    if mode == "RGBa":
        image = Image.fromarray(RGBA).convert("RGBa")
        shown = on_white(scene(), alpha())
    elif mode in ("PA", "La"):
        image = Image.fromarray(LA, "LA").convert(mode)
        if mode == "PA":
            image.putalpha(Image.fromarray(alpha()))
    elif mode.startswith("I;16"):
        kind = ">u2" if mode.endswith("B") else "<u2"
        image = Image.frombytes(mode, (WIDTH, HEIGHT), deep(gray()).astype(kind).tobytes())
        shown, tolerance = rgb_of(gray()), 0
    elif mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        shown, tolerance = 80 + scene() // 4, 4
        made = ImageCms.profileToProfile(Image.fromarray(shown), srgb, lab, outputMode="LAB")
        assert made is not None
        image = made
    else:
        image = Image.fromarray(scene()).convert(mode)
        shown, tolerance = scene(), 6 if mode == "HSV" else 3
    before = image.tobytes()
    assert error(resized(image, RESIZE, "it"), square_of(shown)) <= tolerance
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("name", "values", "mode"),
    [("a.tif", np.ones((4, 4), np.float32), "F"), ("a.tif", np.full((4, 4), 70000, np.int32), "I")],
)
def test_values_without_a_white_are_refused_by_name(tmp_path: Path, name: str, values: Array, mode: str) -> None:
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load_resized(tmp_path / name, RESIZE)
    assert str(caught.value) == (
        f"{tmp_path / name}: cannot be used (32-bit pixels ({mode}) whose white value is unknown). "
        "Save it with 8 or 16 bits per channel, or remove it."
    )


def test_a_file_without_any_tag_keeps_its_bits(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.tif"):
        Image.fromarray(scene()).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            due = np.array(image.convert("RGB").resize((RESIZE, RESIZE), Image.Resampling.BILINEAR))
        assert (load_resized(tmp_path / name, RESIZE) == due).all()


def test_an_upright_copy_of_a_phone_photo_has_the_same_bits(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "upright.png")
    Image.fromarray(np.ascontiguousarray(STORED[6](scene()))).save(tmp_path / "turned.png", exif=exif(6))
    assert (load_resized(tmp_path / "upright.png", 16) == load_resized(tmp_path / "turned.png", 16)).all()


@pytest.mark.parametrize(
    "data", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_damaged_exif_data_are_ignored(tmp_path: Path, data: bytes) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.jpg", quality=95)
    due = load_resized(tmp_path / "a.jpg", RESIZE)
    Image.fromarray(scene()).save(tmp_path / "a.jpg", quality=95, exif=data)
    assert (load_resized(tmp_path / "a.jpg", RESIZE) == due).all()


def test_a_published_data_set_keeps_its_transform(tmp_path: Path) -> None:
    """EXIF orientation, profile and transparency ignored."""
    values = np.dstack([STORED[6](scene()), np.zeros((WIDTH, HEIGHT), np.uint8)])
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif(6), icc_profile=display_p3())
    due = square_of(np.ascontiguousarray(values[..., :3]))
    assert (load_resized(tmp_path / "a.png", RESIZE, Decoding(published=True)) == due).all()


def test_thumbnails_are_upright_on_white(tmp_path: Path) -> None:
    picture = np.full((60, 60, 4), (255, 0, 0, 255), np.uint8)
    picture[:, :30] = (0, 0, 0, 0)
    Image.fromarray(np.ascontiguousarray(STORED[6](picture))).save(tmp_path / "a.png", exif=exif(6))
    data = thumbnail(tmp_path / "a.png")
    assert data is not None
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert shown.shape == (60, 60, 3)
    assert np.abs(shown[:, :20] - 255).max() < 12
    assert np.abs(shown[:, -20:] - (255, 0, 0)).max() < 12


# profiles, by the ICC specification


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0free\0",
    } | tags
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02400000, kind, space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48)
    return head + table + body


def matrix_profile(primaries: Array, curve: bytes) -> bytes:
    """``primaries``: (3, 3), its columns XYZ under D50 of red, green and blue."""
    tags = {
        name: b"XYZ \0\0\0\0" + fixed(*column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)
    }
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


# under D50: sRGB (IEC 61966-2-1), Display P3 (SMPTE RP 431-2 under D65), ProPhoto (ISO 22028-2)
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
P3 = np.array(
    [[0.5151187, 0.2919778, 0.1571035], [0.2411892, 0.6922441, 0.0665668], [-0.0010505, 0.0418791, 0.7840713]]
)
PROPHOTO = np.array([[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857], [0.0, 0.0, 0.8252100]])
SRGB_CURVE = b"para\0\0\0\0\0\x03\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def encoded(linear: Array) -> Array:
    """sRGB's curve of light from 0 to 1."""
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(255 * curve))


def light(values: Array) -> Array:
    values = values / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def display_p3() -> bytes:
    return matrix_profile(P3, SRGB_CURVE)


PROFILES: dict[str, tuple[bytes, Callable[[Array], Array]]] = {
    "Display P3": (display_p3(), lambda v: encoded(light(v) @ (np.linalg.inv(SRGB) @ P3).T)),
    "ProPhoto": (
        matrix_profile(PROPHOTO, gamma(1.8)),
        lambda v: encoded((v / 255) ** 1.80078125 @ (np.linalg.inv(SRGB) @ PROPHOTO).T),
    ),
    "gamma 1.0": (matrix_profile(SRGB, gamma(1.0)), lambda v: encoded(v / 255)),
}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "heif", "RGBA png", "P png"])
def test_a_color_profile_is_converted_to_srgb(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "heif":
        pytest.importorskip("pillow_heif")
    icc, convert = PROFILES[name]
    color = np.array([190, 70, 50], np.uint8)
    values = np.full((16, 16, 3), color)
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": 100, "subsampling": 0},
        "webp": {"lossless": True},
        "avif": {"quality": 100},
    }
    options["heif"] = {"quality": 100}
    image = Image.fromarray(values)
    if kind == "RGBA png":
        image.putalpha(255)
    elif kind == "P png":
        image = image.quantize(4)
    file = kind.rpartition(" ")[2]
    image.save(tmp_path / f"a.{file}", icc_profile=icc, **options.get(file, {}))
    found = load_resized(tmp_path / f"a.{file}", 8)
    assert error(found, convert(color)) <= (6 if file in ("avif", "heif") else 2)
    assert error(found, color) > 10  # as it was before


@pytest.mark.parametrize(
    "icc", [matrix_profile(SRGB, SRGB_CURVE), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_srgb_however_it_is_written_keeps_its_bits(tmp_path: Path, icc: bytes) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=icc)
    assert (load_resized(tmp_path / "a.png", 16) == square_of(noise, 16)).all()


@pytest.mark.parametrize(
    "icc", [b"", b"garbage", display_p3()[:200], profile(b"CMYK", {}), profile(b"GRAY", {b"kTRC": gamma(1.0)})]
)
def test_a_profile_that_is_damaged_or_of_another_mode_is_ignored(tmp_path: Path, icc: bytes) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png", icc_profile=icc)
    assert (load_resized(tmp_path / "a.png", RESIZE) == square_of(scene())).all()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_profiles_are_converted(tmp_path: Path, mode: str) -> None:
    values = np.full((8, 8), 60, np.uint8)
    image = Image.fromarray(values if mode != "I;16" else values.astype(np.uint16) * 257)
    image = image.convert("LA") if mode == "LA" else image
    image.save(tmp_path / "a.png", icc_profile=profile(b"GRAY", {b"kTRC": gamma(1.0)}))
    assert error(load_resized(tmp_path / "a.png", 8), encoded(np.array(60 / 255))) <= 1


def cmyk_profile(black: float) -> bytes:
    """A LUT of two levels an ink: cyan, magenta and yellow take 20 of L* each, all of black leaves ``black``."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    lightness = np.where(inks[:, 3] == 1, black, 100 - 20 * inks[:, :3].sum(axis=1))
    nodes = np.stack([lightness * 2.55, np.full(16, 128), np.full(16, 128)], axis=1)
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4
    return profile(b"CMYK", {b"A2B0": lut + np.rint(nodes).astype(np.uint8).tobytes() + ramp * 3}, b"Lab ", b"prtr")


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
@pytest.mark.parametrize(("ink", "lightness"), [((0, 0, 0, 0), 100), ((255, 0, 0, 0), 80), ((255, 255, 0, 0), 60)])
def test_embedded_cmyk_profiles_are_converted(tmp_path: Path, kind: str, ink: tuple[int, ...], lightness: int) -> None:
    Image.new("CMYK", (16, 16), ink).save(tmp_path / f"a.{kind}", icc_profile=cmyk_profile(0), quality=100)
    due = encoded(np.array(((lightness + 16) / 116) ** 3))
    assert error(load_resized(tmp_path / f"a.{kind}", 8), due) <= 3


# limits


def test_text_in_a_png_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2_000_000)  # of 64 MB
    due = square_of(scene())
    text = {
        "tEXt": chunk(b"tEXt", b"Comment\0" + b"a" * 2_100_000),
        "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000)),
        "iTXt": chunk(b"iTXt", b"Comment\0\x01\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        "iCCP": chunk(b"iCCP", b"a\0\0" + zlib.compress(matrix_profile(SRGB, SRGB_CURVE) + bytes(2_000_000))),
    }
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    for kind, part in text.items():
        (tmp_path / f"{kind}.png").write_bytes(png(scene(), 8, 1, (), part))
        assert (load_resized(tmp_path / f"{kind}.png", RESIZE) == due).all(), kind
    after = tmp_path / "after.png"  # the pixels
    whole = png(scene(), 8, 1)
    after.write_bytes(whole[:-12] + text["zTXt"] + whole[-12:])
    assert (load_resized(after, RESIZE) == due).all()
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_the_limit_of_pixels_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.fromarray(scene()).save(path)
    load_resized(path, RESIZE, Decoding(max_pixels=HEIGHT * WIDTH))
    with pytest.raises(DataError) as caught:
        load_resized(path, RESIZE, Decoding(max_pixels=HEIGHT * WIDTH - 1))
    assert str(caught.value) == (
        f"{path}: cannot be used (560 pixels, more than the limit of 559). Increase --max-pixels (max_pixels in "
        "Python) if it is a real photo, or remove it."
    )


def test_a_photo_above_pillows_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(scene()).save(path)
    due = load_resized(path, RESIZE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    assert (load_resized(path, RESIZE) == due).all()
    assert HEIGHT * WIDTH // 2 - 1 == Image.MAX_IMAGE_PIXELS


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"3,600,000,000 pixels, more than the limit of 250,000,000"):
        load_resized(path, RESIZE)
    with pytest.raises(DataError, match=r"3,600,000,000 pixels, more than the limit of 2,000,000,000"):
        load_resized(path, RESIZE, Decoding(max_pixels=2_000_000_000))
    assert sys.getsizeof(path) < 1000


# squares


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([255 * x / width, 255 * y / height, 127 + 60 * np.sin(x / 9) * np.cos(y / 7)], axis=2)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 61), (61, 97), (80, 80), (1000, 33), (40, 41)])
def test_crop_is_torchvisions_resize_and_center_crop(size: tuple[int, int]) -> None:
    from torchvision import transforms

    image = pattern(*size)
    due = np.array(transforms.Compose([transforms.Resize(48), transforms.CenterCrop(48)])(image))
    assert error(resized(image, 48, "it", Decoding("crop")), due) <= 1


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 61), (80, 80), (1000, 3), (40, 41)])
def test_pad_shows_the_whole_image_in_the_middle(size: tuple[int, int]) -> None:
    from torchvision import transforms

    image = pattern(*size)
    longer = max(size)
    small = tuple(max(1, round(48 * side / longer)) for side in size)
    inner = np.array(transforms.Resize(small[::-1])(image))
    due = np.full((48, 48, 3), (124, 116, 104), np.uint8)
    left, top = (48 - small[0]) // 2, (48 - small[1]) // 2
    due[top : top + small[1], left : left + small[0]] = inner
    assert (resized(image, 48, "it", Decoding("pad")) == due).all()


def test_an_extreme_shape_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (60_000, 1), "red").save(path)
    for fit in ("square", "crop", "pad"):
        assert load_resized(path, 32, Decoding(fit)).shape == (32, 32, 3)


def large_photo(path: Path, height: int, width: int) -> None:
    """Write a JPEG of waves, stored on its side."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [128 + 100 * np.sin(6 * x + 4 * y), 128 + 100 * np.cos(6 * y), 127 * (x + y)]
    pixels = np.stack(waves, axis=2).astype(np.uint8)
    Image.fromarray(STORED[6](pixels)).save(path, quality=95, exif=exif(6))


@pytest.mark.parametrize("fit", ["square", "crop", "pad"])
@pytest.mark.parametrize(("side", "scale"), [(398, 1), (400, 2), (500, 4), (1000, 8)])
def test_large_jpegs_are_decoded_at_a_reduced_size(tmp_path: Path, fit: Any, side: int, scale: int) -> None:
    """From 8 times the size that is needed on, at least 2.5 times that size; nearly the pixels of the whole image."""
    path = tmp_path / "a.jpg"
    shape = (side, side + side // 2) if fit != "pad" else (side - side // 2, side)
    large_photo(path, *shape)
    with Image.open(path) as image:
        whole = decode._square(image, 50, Decoding(fit))
    with Image.open(path) as image:
        decode._draft(image, 50, fit)
        assert image.size == tuple(-(-length // scale) for length in shape)
    found = load_resized(path, 50, Decoding(fit)).astype(int)
    assert np.abs(found - whole).max() <= (0 if scale == 1 else 6)
    assert np.abs(found - whole).mean() < 1
    with Image.open(path) as image:
        published = np.asarray(image.resize((50, 50), Image.Resampling.BILINEAR))
    assert np.array_equal(load_resized(path, 50, Decoding(published=True)), published)


@pytest.mark.parametrize("fit", ["square", "crop", "pad"])
def test_a_profile_and_an_orientation_go_with_every_fit(tmp_path: Path, fit: Any) -> None:
    icc, convert = PROFILES["Display P3"]
    values = np.full((30, 20, 3), (150, 90, 60), np.uint8)
    Image.fromarray(np.ascontiguousarray(STORED[8](values))).save(tmp_path / "a.png", icc_profile=icc, exif=exif(8))
    found = load_resized(tmp_path / "a.png", 12, Decoding(fit))
    due = np.full((12, 12, 3), convert(np.array([150, 90, 60])))
    if fit == "pad":
        due[:, :2] = due[:, 10:] = (124, 116, 104)
    assert error(found, due) <= 2


def test_tiff_tags_are_those_of_the_specification() -> None:
    assert (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == (258, 262)
