"""Coordinates of lines, ticks and markers, which the templates draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 340, 230  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40  # its margins
SIDE = 400  # of a map
_TICKS = 5
_COLORS, _SHAPES = 8, 6
_DASHES = 4
# paths of markers some 7 wide, relative to their center
_MARKERS = (
    "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "m-2.9-2.9h5.8v5.8h-5.8z",
    "m0-3.8l3.6 6.3h-7.2z",
    "m0-4l4 4l-4 4l-4-4z",
    "m-1.2-3.8h2.4v2.6h2.6v2.4h-2.6v2.6h-2.4v-2.6h-2.6v-2.4h2.6z",
    "m0 3.8l3.6-6.3h-7.2z",
)

Points = Sequence[tuple[float, float]]
Curve = tuple[str, int, Points]  # name, style number, points


def colors_of(style: int) -> tuple[int, int]:
    """The color and dash numbers of a style."""
    return style % _COLORS, style // _COLORS % _DASHES


def line_chart(title: str, curves: Sequence[Curve], x_label: str = "epoch") -> dict[str, Any]:
    """Curves in one chart, without values that are not finite, and a description ``about`` for screen readers."""
    curves = [(name, style, [p for p in points if math.isfinite(p[1])]) for name, style, points in curves]
    curves = [curve for curve in curves if curve[2]]
    x_ticks, x_low, x_high = _axis([x for *_, points in curves for x, _ in points], whole=True)
    y_ticks, y_low, y_high = _axis([y for *_, points in curves for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * _inner_height(), 1)

    lines = []
    for name, style, points in curves:
        dots = [place(x, y) for x, y in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in dots)
        color, dash = colors_of(style)
        lines.append({"name": name, "color": color, "dash": dash, "path": path, "dots": dots})
    return {
        "title": title,
        "about": f"{title} by {x_label}: {'; '.join(_about(name, points) for name, _, points in curves)}",
        "x_label": x_label,
        "x_ticks": [{"at": place(x, y_low)[0], "label": label} for x, label in x_ticks],
        "y_ticks": [{"at": place(x_low, y)[1], "label": label} for y, label in y_ticks],
        "lines": lines,
    }


def clusters(points: Points, labels: Sequence[str] | None, keys: Mapping[str, int]) -> list[dict[str, Any]]:
    """A path for the points of each class on a map, or one for all without labels. Points are within -1 to 1."""
    of: dict[int, list[tuple[float, float]]] = {}
    for number, point in enumerate(points):
        of.setdefault(keys[labels[number]] if labels else 0, []).append(point)
    found = []
    for key, members in sorted(of.items()):
        path = "".join(f"M{_place(x)} {_place(-y)}{marker(key)}" for x, y in members)
        found.append({"key": key, "color": key % _COLORS, "path": path, "points": len(members)})
    return found


def marker(key: int) -> str:
    """The shape of a class as a path relative to its center; each shape is used in eight colors."""
    return _MARKERS[key // _COLORS % _SHAPES]


def _place(x: float) -> str:
    return f"{SIDE / 2 + x * (SIDE / 2 - 10):.1f}".removesuffix(".0")


def _inner_height() -> int:
    return HEIGHT - TOP - BOTTOM


def _axis(values: Sequence[float], whole: bool = False) -> tuple[list[tuple[float, str]], float, float]:
    """Ticks at round numbers, and the ends of the axis: the outermost ticks, or if ``whole``, the extreme values."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        low, high = (low - 1, high + 1) if whole else (low - abs(low) / 2, high + abs(high) / 2 or 1.0)
    step = _step((high - low) / _TICKS)
    if whole:
        step = max(1, math.ceil(step))
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) + (step / 10 ** math.floor(math.log10(step)) == 2.5)
    return [(n * step, f"{n * step:.{decimals}f}") for n in range(first, last + 1)], low, high


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _about(name: str, points: Points) -> str:
    (_, first), (_, last) = points[0], points[-1]
    return f"{name} {first:.4g}" if len(points) == 1 else f"{name} from {first:.4g} to {last:.4g}"
