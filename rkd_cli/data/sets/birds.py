"""Drawings of fictional birds.

A species is a combination of shape and plumage. Species have single features in common, so no one feature tells them
apart. Every picture has its own pose, light and clutter. Randomness comes from ``random.Random`` of a string, and
coordinates are rounded to integers, so the pictures are equal on any machine.
"""

from __future__ import annotations

import cmath
import colorsys
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter

VERSION = 1  # of the pictures: increase it with every change to the drawings

# Difficulty: smaller birds, and larger values of the others, are harder.
TILT = 15.0  # degrees, of the body, either way
SCALES = (0.8, 0.95)  # relative to the largest bird that fits
WINGS_UP = 0.15  # fraction of pictures with raised wings
HUE_JITTER = 0.012  # between individuals of a species, as a fraction of the color circle
LIGHT_JITTER = 0.08  # of brightness, contrast and tint
CLUTTER = 3  # maximum number of leaves, twigs and berries behind the bird
OCCLUDED = 0.1  # fraction of pictures with something in front of the bird
BLURRED = 0.1  # fraction of pictures out of focus
NOISE = 6  # gray levels, either way

SUPERSAMPLING = 3
ADJECTIVES, FAMILIES = (
    words.split()
    for words in (
        "Alpine Boreal Coastal Crescent Dusky Eastern Elfin Gentle Highland Island Little Lowland Marsh "
        "Northern River Shy Silken Solitary Southern Velvet Western Willow Winter Woodland",
        "Warbler Finch Thrush Wren Bunting Flycatcher Tanager Oriole Vireo Sparrow Pipit Starling Swallow "
        "Shrike Kingfisher Woodpecker Cuckoo Jay Plover Sandpiper Dove Honeyeater Sunbird",
    )
)

Color = tuple[int, int, int]
HSV = tuple[float, float, float]
DARK: HSV = (0.08, 0.35, 0.13)
PALE: HSV = (0.12, 0.10, 0.95)
# few colors each, so that most species have theirs in common with several others
BACKS: tuple[HSV, ...] = (
    (0.07, 0.55, 0.45),
    (0.58, 0.50, 0.60),
    (0.25, 0.50, 0.48),
    (0.09, 0.10, 0.45),
    (0.93, 0.50, 0.55),
    (0.12, 0.60, 0.80),
)
BREASTS: tuple[HSV, ...] = (PALE, (0.14, 0.70, 0.95), (0.06, 0.75, 0.85), (0.56, 0.35, 0.85))
ACCENTS: tuple[HSV, ...] = (DARK, PALE, (0.00, 0.85, 0.80), (0.13, 0.90, 0.95), (0.48, 0.75, 0.75))
HORNS: tuple[HSV, ...] = (DARK, (0.10, 0.75, 0.85))  # bill and legs
LEAVES: tuple[HSV, ...] = ((0.28, 0.50, 0.45), (0.22, 0.55, 0.60), (0.12, 0.55, 0.65), (0.07, 0.45, 0.35))
SCENES: tuple[HSV, ...] = ((0.57, 0.25, 0.85), (0.27, 0.35, 0.55), (0.50, 0.30, 0.60), (0.11, 0.25, 0.75))


@dataclass(frozen=True)
class Species:
    """Features of a species. Lengths are in units of half the body's depth."""

    name: str
    colors: tuple[HSV, HSV, HSV, HSV]  # of back, breast, accents, and bill and legs
    length: float  # of half the body
    belly: float
    head: float
    neck: float
    bill: float
    bill_depth: float
    bill_curve: float
    tail: float
    tail_shape: str
    tail_droop: float  # degrees
    tail_tip: bool
    legs: float
    wing: float
    wing_taper: float
    wing_bars: int
    wing_tip: bool
    crest: str
    crown: str
    face: str
    eye_ring: bool
    collar: bool
    breast_marks: str


def make_species(index: int) -> Species:
    """Species ``index``, independent of the size of the set."""
    rng = random.Random(f"rkd demo {VERSION} species {index}")
    # 271 is coprime to the number of pairs, so names repeat only after all are used
    family, adjective = divmod(index * 271 % (len(ADJECTIVES) * len(FAMILIES)), len(ADJECTIVES))
    return Species(
        name=f"{ADJECTIVES[adjective]} {FAMILIES[family]}",
        colors=(rng.choice(BACKS), rng.choice(BREASTS), rng.choice(ACCENTS), rng.choice(HORNS)),
        length=rng.uniform(1.05, 1.55),
        belly=rng.uniform(0.8, 1.25),
        head=rng.uniform(0.42, 0.66),
        neck=rng.uniform(0.0, 0.45),
        bill=rng.uniform(0.25, 1.1),
        bill_depth=rng.uniform(0.10, 0.26),
        bill_curve=rng.choice((-0.2, 0.0, 0.0, 0.25, 0.5)),
        tail=rng.uniform(0.6, 1.7),
        tail_shape=rng.choice(("fan", "fork", "point", "square")),
        tail_droop=rng.uniform(-30, 25),
        tail_tip=rng.random() < 0.4,
        legs=rng.uniform(0.3, 1.0),
        wing=rng.uniform(1.3, 1.9),
        wing_taper=rng.uniform(0.15, 0.8),
        wing_bars=rng.choice((0, 0, 1, 2)),
        wing_tip=rng.random() < 0.35,
        crest=rng.choice(("none", "none", "tuft", "spike", "swept")),
        crown=rng.choice(("none", "none", "cap", "stripe")),
        face=rng.choice(("none", "eyeline", "bib", "none")),
        eye_ring=rng.random() < 0.35,
        collar=rng.random() < 0.3,
        breast_marks=rng.choice(("none", "spots", "stripes", "bars", "band")),
    )


@dataclass(frozen=True)
class Pen:
    """Draws points of a plane (complex numbers, y downwards), rotated, scaled and possibly mirrored."""

    draw: ImageDraw.ImageDraw
    origin: complex
    factor: complex
    mirrored: bool = False

    def at(self, point: complex) -> complex:
        return self.origin + self.factor * (-point.conjugate() if self.mirrored else point)

    def moved(self, point: complex, degrees: float) -> Pen:
        """A pen with its origin at ``point``, rotated; positive angles raise what points backwards."""
        turn = cmath.rect(1, math.radians(degrees))
        turn = turn.conjugate() if self.mirrored else turn
        return Pen(self.draw, self.at(point), self.factor * turn, self.mirrored)

    def pixels(self, points: list[complex]) -> list[tuple[int, int]]:
        return [(round(p.real), round(p.imag)) for p in map(self.at, points)]

    def shape(self, points: list[complex], fill: Color, outline: bool = False) -> None:
        edge = (fill[0] * 5 // 9, fill[1] * 5 // 9, fill[2] * 5 // 9) if outline else None
        self.draw.polygon(self.pixels(points), fill, edge, SUPERSAMPLING // 2 + 1)

    def line(self, points: list[complex], width: float, fill: Color) -> None:
        pixels = max(1, round(width * abs(self.factor)))
        self.draw.line(self.pixels(points), fill, pixels, joint="curve")


def smooth(points: list[complex], steps: int = 5) -> list[complex]:
    """A closed Catmull-Rom curve through ``points``."""
    curve = []
    for i, b in enumerate(points):
        a, c, d = points[i - 1], points[(i + 1) % len(points)], points[(i + 2) % len(points)]
        for t in (step / steps for step in range(steps)):
            curve.append(b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    return curve


def arc(center: complex, radius: float, start: float = 0, end: float = 345) -> list[complex]:
    """Points of a circle every 15 degrees."""
    return [center + cmath.rect(radius, math.radians(a)) for a in range(round(start), round(end) + 1, 15)]


def tint(color: HSV, rng: random.Random, hue: float = HUE_JITTER, spread: float = 0.05) -> Color:
    """The color of an individual."""
    h, s, v = color
    s, v = (min(1.0, max(0.0, x + rng.uniform(-spread, spread))) for x in (s, v))
    r, g, b = colorsys.hsv_to_rgb((h + rng.uniform(-hue, hue)) % 1.0, s, v)
    return round(r * 255), round(g * 255), round(b * 255)


def darker(color: Color, percent: int = 78) -> Color:
    return color[0] * percent // 100, color[1] * percent // 100, color[2] * percent // 100


def draw_bird(species: Species, rng: random.Random, size: int) -> Image.Image:
    """An RGB picture of ``size`` by ``size`` pixels with pose, light and clutter from ``rng``."""
    side = size * SUPERSAMPLING
    image = background(rng, side)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(CLUTTER + 1)):
        clutter(draw, rng, side, complex(rng.random(), rng.random()) * side, rng.uniform(0.06, 0.2))
    fraction = rng.uniform(*SCALES)
    scale = fraction * side / (1.6 * species.length + species.tail + species.head + species.bill)
    slack = (1 - fraction) / 2 * side
    center = complex(*(side / 2 + rng.uniform(-slack, slack) for _ in range(2)))
    pose = cmath.rect(scale, math.radians(rng.uniform(-TILT, TILT)))
    pen = Pen(draw, center, pose, mirrored=rng.random() < 0.5)
    bird(pen.moved((species.tail - species.head - species.bill) / 2, 0), species, rng)
    if rng.random() < OCCLUDED:
        spot = center + complex(rng.uniform(-1.6, 1.6), rng.uniform(-1.2, 1.2)) * scale
        clutter(draw, rng, side, spot, rng.uniform(0.08, 0.16))
    return light(image.reduce(SUPERSAMPLING), rng)


def background(rng: random.Random, side: int) -> Image.Image:
    """Blurred sky, foliage or water: a few random colors, upscaled."""
    above, below = rng.choice(SCENES), rng.choice(SCENES)
    cells = rng.choice((3, 4, 6))
    grid = Image.new("RGB", (cells, cells))
    for y in range(cells):
        for x in range(cells):
            base = above if 2 * y < cells else below
            grid.putpixel((x, y), tint(base, rng, hue=0.06, spread=0.2))
    return grid.resize((side, side), Image.Resampling.BICUBIC)


def clutter(draw: ImageDraw.ImageDraw, rng: random.Random, side: int, center: complex, extent: float) -> None:
    """A leaf, a twig with leaves, or a berry, often in the colors of plumage."""
    pen = Pen(draw, center, cmath.rect(extent * side, rng.uniform(0, 2 * math.pi)))
    kind = rng.choice(("leaf", "leaf", "twig", "berry"))
    leaf = tint(rng.choice(LEAVES + BACKS), rng, hue=0.05, spread=0.15)
    if kind == "leaf":
        pen.shape(smooth([-1, -0.3 - 0.38j, 0.4 - 0.3j, 1.1, 0.4 + 0.3j, -0.3 + 0.38j]), leaf)
        pen.line([-1.3, 0.9], 0.06, darker(leaf))
    elif kind == "twig":
        bark = tint(LEAVES[3], rng)
        pen.line([-6, -2 + 0.3j, 1 - 0.2j, 6 + 0.2j], rng.uniform(0.12, 0.3), bark)
        for x in (-2.5, -0.5, 1.5, 3.0):
            stalk = pen.moved(x, rng.uniform(-150, 150))
            stalk.shape(smooth([0, 0.5 - 0.25j, 1.1, 0.5 + 0.25j]), leaf)
    else:
        pen.shape(arc(0, rng.uniform(0.3, 0.8)), tint(rng.choice(ACCENTS + BREASTS), rng, hue=0.05))


def bird(pen: Pen, s: Species, rng: random.Random) -> None:
    """Draw the bird from back to front, with the body's center at the pen's origin."""
    back, breast, accent, horn = (tint(color, rng) for color in s.colors)
    raised = rng.random() < WINGS_UP
    lift = rng.uniform(50, 115) if raised else rng.uniform(-18, 0)
    head_angle = rng.uniform(-25, 25)
    if raised:
        draw_wing(pen.moved(0.45 * s.length - 0.45j, lift - rng.uniform(15, 40)), s, darker(back), accent)
    rump = pen.moved(-0.8 * s.length - 0.05j, s.tail_droop + rng.uniform(-12, 12))
    draw_tail(rump, s, darker(back), accent)
    draw_legs(pen, s, horn, rng.uniform(-20, 20))
    head = complex(0.8 * s.length, -0.7 - s.neck)
    draw_body(pen, s, head, back, breast, accent)
    draw_head(pen.moved(head, head_angle), s, back, breast, accent, horn)
    draw_wing(pen.moved(0.45 * s.length - 0.4j, lift), s, darker(back, 88), accent)


def draw_tail(pen: Pen, s: Species, color: Color, accent: Color) -> None:
    ends = {
        "fan": [-0.95 - 0.5j, -1.05 - 0.2j, -1.05 + 0.2j, -0.95 + 0.5j],
        "fork": [-1 - 0.45j, -0.9 - 0.25j, -0.55, -0.9 + 0.25j, -1 + 0.45j],
        "point": [-0.6 - 0.2j, -1.1, -0.6 + 0.2j],
        "square": [-1 - 0.25j, -1 + 0.25j],
    }[s.tail_shape]
    outline = [-0.2j, *(complex(p.real * s.tail, p.imag) for p in ends), 0.2j]
    pen.shape([0.3 - 0.2j, *outline, 0.3 + 0.2j], accent if s.tail_tip else color, outline=True)
    if s.tail_tip:
        pen.shape([complex(p.real * 0.68, p.imag * 0.9) for p in outline], color)


def draw_legs(pen: Pen, s: Species, horn: Color, swing: float) -> None:
    for x in (-0.1, 0.25):
        leg = pen.moved(complex(x * s.length, 0.6 * s.belly), swing)
        foot = (s.legs + 0.15) * 1j
        leg.line([0, foot], 0.09, horn)
        leg.line([foot - 0.2 + 0.05j, foot, foot + 0.3 + 0.05j], 0.08, horn)


def draw_body(pen: Pen, s: Species, head: complex, back: Color, breast: Color, accent: Color) -> None:
    def body(points: list[complex]) -> list[complex]:
        return smooth([complex(p.real * s.length, p.imag * (s.belly if p.imag > 0 else 1)) for p in points])

    under = [-0.55 + 0.42j, 0.1 + 0.75j, 0.72 + 0.55j, 0.93 - 0.1j]  # the lower outline, from vent to breast
    pen.line([0.45 * s.length - 0.1j, head], 1.5 * s.head, back)
    pen.shape(body([*under, 0.55 - 0.72j, -0.2 - 0.62j, -0.95 - 0.15j]), back, outline=True)
    pen.shape(body([-0.5 + 0.4j, 0.1 + 0.7j, 0.7 + 0.5j, 0.88 - 0.1j, 0.5 - 0.25j, 0.1 + 0.15j]), breast)

    def at(along: float, down: float) -> complex:
        """A point of the breast: front (0) to vent (1), wing (0) to outline (1)."""
        low = s.belly * (0.45 + 1.1 * along * (1 - along))
        high = 0.3 * along - 0.1
        return complex(s.length * (0.82 - 1.25 * along), high + down * (low - high))

    if s.breast_marks == "spots":
        for along in (0.1, 0.26, 0.42, 0.58, 0.74):
            for down in (0.3, 0.6, 0.9):
                pen.shape(arc(at(along + 0.05 * (down == 0.6), down), 0.085), accent)
    elif s.breast_marks == "stripes":
        for along in (0.06, 0.24, 0.42, 0.6, 0.78):
            pen.line([at(along, 0.05), at(along, 0.92)], 0.11, accent)
    elif s.breast_marks == "bars":
        for down in (0.25, 0.52, 0.8):
            pen.line([at(0.02, down), at(0.3, down), at(0.6, down), at(0.85, down)], 0.11, accent)
    elif s.breast_marks == "band":
        pen.shape([at(0.14, -0.1), at(0.36, -0.1), at(0.36, 0.95), at(0.14, 0.95)], accent)


def draw_head(pen: Pen, s: Species, back: Color, breast: Color, accent: Color, horn: Color) -> None:
    h = s.head
    if s.collar:
        pen.line(arc(0, h * 1.08, 45, 165), 0.2, accent)
    crests: dict[str, list[complex]] = {
        "none": [],
        "tuft": [0.3 - 0.8j, 0.1 - 1.6j, -0.2 - 1.1j, -0.4 - 1.5j, -0.7 - 0.6j],
        "spike": [0.4 - 0.8j, -0.5 - 2j, -0.6 - 0.7j],
        "swept": [0.2 - 0.9j, -1.2 - 1.2j, -2 - 0.7j, -0.9 - 0.3j],
    }
    if s.crest != "none":
        crest = back if s.crown == "none" else accent
        pen.shape([h * p for p in crests[s.crest]], crest, outline=True)
    steps = [step / 6 for step in range(7)]
    ridge = [complex(0.8 * h + t * s.bill, t * t * s.bill * s.bill_curve) for t in steps]
    depths = [1j * s.bill_depth * (1 - t) for t in steps]
    edges = [p - d for p, d in zip(ridge, depths, strict=True)]
    pen.shape(edges + [p + d for p, d in zip(ridge, depths, strict=True)][::-1], horn, outline=True)
    pen.shape(arc(0, h), back, outline=True)
    if s.face == "bib":
        pen.shape(arc(0, h * 0.98, 15, 135), accent)
    if s.crown == "cap":
        pen.shape(arc(0, h * 0.98, 195, 345), accent)
    elif s.crown == "stripe":
        pen.line(arc(0, h * 0.8, 195, 330), 0.17 * h / 0.5, accent)
    if s.face == "eyeline":
        pen.line([h * (-0.95 + 0.05j), h * (0.3 - 0.15j), h * (0.9 - 0.05j)], 0.28 * h, accent)
    eye = h * (0.35 - 0.2j)
    if s.eye_ring:
        pen.shape(arc(eye, h * 0.38), breast)
    pen.shape(arc(eye, h * 0.22), (20, 15, 15))


def draw_wing(pen: Pen, s: Species, color: Color, accent: Color) -> None:
    """Draw a wing that points backwards from the pen's origin."""
    w, tip = s.wing, 0.5 * (1 - s.wing_taper)
    outline = [0.15 - 0.05j, -0.5 * w - 0.25j, -w - 0.05j, complex(-w, tip), -0.5 * w + 0.62j, 0.05 + 0.4j]
    pen.shape(smooth(outline), color, outline=True)
    if s.wing_tip:
        outer = [-0.75 * w - 0.12j, -w, complex(-w, tip), complex(-0.72 * w, 0.15 + tip / 2)]
        pen.shape(smooth(outer), accent)
    for along in (0.3, 0.52)[: s.wing_bars]:
        pen.line([complex(-along * w, -0.12), complex(-(along + 0.08) * w, 0.5)], 0.18, accent)


def light(image: Image.Image, rng: random.Random) -> Image.Image:
    """Vary brightness, contrast, tint, focus and noise."""
    contrast = 1 + rng.uniform(-LIGHT_JITTER, LIGHT_JITTER)
    bright = rng.uniform(-LIGHT_JITTER, LIGHT_JITTER) * 128
    shifts = [128 + bright + rng.uniform(-LIGHT_JITTER, LIGHT_JITTER) * 64 for _ in range(3)]
    table = [min(255, max(0, round((v - 128) * contrast + shift))) for shift in shifts for v in range(256)]
    image = image.point(table)
    if rng.random() < BLURRED:
        image = image.filter(ImageFilter.BoxBlur(1))
    grain = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
    grain = grain.point([v * 2 * NOISE // 255 for v in range(256)] * 3)
    return ImageChops.add(image, grain, 1, -NOISE)
