"""Coordinates of lines, ticks and markers, which the templates draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 340, 230  # of a chart
WIDE, TALL = 560, 330  # of a chart of models
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

_LABEL = 6.6  # width of a letter
_LOG_TICKS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), [n / 10 for n in range(10, 100)])
_FEW, _MANY = 2, 8  # ticks, which are too few, and the most
Points = Sequence[tuple[float, ...]]  # x, y, and for several runs the lowest and the highest y
Curve = tuple[str, int, Points]  # name, style number, points


def colors_of(style: int) -> tuple[int, int]:
    """The color and dash numbers of a style."""
    return style % _COLORS, style // _COLORS % _DASHES


def line_chart(title: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """Curves over epochs, without values that are not finite, and a description ``about`` for screen readers.

    The lowest and highest values of several runs are drawn as a band.
    """
    curves = [(name, style, [p for p in points if math.isfinite(p[1])]) for name, style, points in curves]
    curves = [curve for curve in curves if curve[2]]
    x_ticks, x_low, x_high = _axis([point[0] for *_, points in curves for point in points], whole=True)
    y_ticks, y_low, y_high = _axis([y for *_, points in curves for _, *ys in points for y in ys])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        down = HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(down, 1)

    lines = []
    for name, style, points in curves:
        dots = [(*place(*point[:2]), f"{name}, epoch {point[0]:g}: {_spread(point)}") for point in points]
        edges = [place(x, low) for x, _, low, _ in points] if len(points[0]) == 4 else []
        edges += [place(x, high) for x, _, _, high in reversed(points)] if edges else []
        color, dash = colors_of(style)
        line = {"name": name, "color": color, "dash": dash, "path": _path([dot[:2] for dot in dots]), "dots": dots}
        lines.append(line | {"band": _path(edges)})
    return {
        "title": title,
        "size": (WIDTH, HEIGHT),
        "about": f"{title} by epoch: {'; '.join(_about(name, points) for name, _, points in curves)}",
        "x_label": "epoch",
        "x_ticks": [{"at": place(x, y_low)[0], "label": label} for x, label in x_ticks],
        "y_ticks": [{"at": place(x_low, y)[1], "label": label} for y, label in y_ticks],
        "lines": lines,
    }


def scatter(
    title: str, points: Sequence[Mapping[str, Any]], x_label: str, y_label: str, unit: Callable[[float], str]
) -> dict[str, Any]:
    """Points over a logarithmic axis, and a line through those that no point to their left reaches.

    Args:
        title: of the chart.
        points: each with name, style, x, y, label, tip, and spread, half of the height of its bar.
        x_label: of the axis.
        y_label: of the axis.
        unit: text of a value of x.
    """
    ordered = sorted(points, key=lambda point: (point["x"], -point["y"]))
    ends = math.log10(ordered[0]["x"]), math.log10(ordered[-1]["x"])
    left, right = ends[0] - 0.08 - 0.04 * (ends[1] - ends[0]), ends[1] + 0.08 + 0.04 * (ends[1] - ends[0])
    y_ticks, low, high = _axis([y for p in ordered for y in (p["y"] - p["spread"], p["y"] + p["spread"])])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log10(x) - left) / (right - left), (y - low) / (high - low)
        return round(LEFT + across * (WIDE - LEFT - RIGHT), 1), round(TALL - BOTTOM - up * (TALL - TOP - BOTTOM), 1)

    shown, front, taken = [], list[tuple[float, float]](), list[tuple[float, float, float]]()
    best = -math.inf
    for point in ordered:
        x, y = place(point["x"], point["y"])
        if is_best := point["y"] > best:
            best = point["y"]
            front += [(x, front[-1][1]), (x, y)] if front else [(x, y)]
        bar = [place(point["x"], point["y"] + sign * point["spread"])[1] for sign in (-1, 1)]
        color, _ = colors_of(point["style"])
        at = {"x": x, "y": y, "color": color, "bar": bar if point["spread"] else None, "is_best": is_best}
        shown.append({**at, "shape": marker(point.get("kind", 0) * _COLORS), "tip": point["tip"]})
        if label := _free_place(x, y, point["label"], taken) if is_best or len(ordered) <= _COLORS else None:
            shown[-1]["label"] = label
    end = [(float(WIDE - RIGHT), front[-1][1])]
    powers = [10.0**power for power in range(math.floor(left), math.ceil(right) + 1)]
    for factors in _LOG_TICKS:
        ticks = [n * power for power in powers for n in factors if left <= math.log10(n * power) <= right]
        if len(ticks) > _FEW:
            break
    ticks = ticks[:: math.ceil(len(ticks) / _MANY)]
    return {
        "title": title,
        "size": (WIDE, TALL),
        "about": f"{title}: {'; '.join(point['tip'] for point in ordered)}",
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": [{"at": place(step, low)[0], "label": unit(step)} for step in ticks],
        "y_ticks": [{"at": place(ordered[0]["x"], y)[1], "label": label} for y, label in y_ticks],
        "front": _path(front + end),
        "lines": [],
        "points": shown,
    }


def _free_place(
    x: float, y: float, text: str, taken: list[tuple[float, float, float]]
) -> tuple[float, float, str, str] | None:
    """Where a label is beside no other, its anchor and its text; None where there is no room."""
    width = _LABEL * len(text)
    for side, down in ((1, -7), (-1, -7), (1, 15), (-1, 15), (1, -19), (-1, -19), (1, 27), (-1, 27)):
        start = x + 8 if side > 0 else x - 8 - width
        inside = start >= LEFT and start + width <= WIDE and TOP <= y + down <= TALL - BOTTOM
        beside = all(abs(y + down - other) > 11 or start > end or start + width < begin for begin, end, other in taken)
        if inside and beside:
            taken.append((start, start + width, y + down))
            return round(x + 8 * side, 1), round(y + down, 1), "start" if side > 0 else "end", text
    return None


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places) if places else ""


def _spread(point: tuple[float, ...]) -> str:
    _, y, *ends = point
    return f"{y:.5g}" + (f" ({ends[0]:.5g} to {ends[1]:.5g})" if ends else "")


def clusters(
    points: Sequence[tuple[float, float]], labels: Sequence[str] | None, keys: Mapping[str, int]
) -> list[dict[str, Any]]:
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
    first, last = points[0][1], points[-1][1]
    return f"{name} {first:.4g}" if len(points) == 1 else f"{name} from {first:.4g} to {last:.4g}"
