"""Charts laid out for SVG that needs no library, scales with the page and keeps its letters readable on a phone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 300
"""Points of a curve on the page; longer ones are averaged in as many buckets, which no screen can tell apart."""


@dataclass(frozen=True)
class Series:
    """A curve: what it is called, and its points (x, y) by x. A y of None or not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    low, high: bounds of y that are always shown, whatever the data; line: (y, name) of a reference line; log: a
    logarithmic y, for positive data; marks: x of restarts.
    """

    title: str
    series: Sequence[Series]
    note: str = ""
    low: float | None = None
    high: float | None = None
    line: tuple[float, str] | None = None
    log: bool = False
    marks: Sequence[float] = ()
    x_name: str = "step"


def finite(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Returns the points that have a finite y."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def bucketed(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Returns at most `limit` points: means over runs of neighbours, the last one always its own."""
    size = math.ceil(len(points) / max(1, limit - 1))
    if size <= 1:
        return list(points)
    body = points[:-1]
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    means = [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
    return [*means, points[-1]]


def smoothed(points: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """Returns the exponential moving average of y, corrected for its start (Kingma and Ba 2015, section 3)."""
    total = norm = 0.0
    out = []
    for x, y in points:
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        out.append((x, total / norm))
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers from `low` to `high`, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns logarithms of round numbers from 10**low to 10**high: powers of ten, and 2 and 5 times them if those are
    few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    tens = [float(power) for power in powers if low <= power <= high]
    if len(tens) > 2:
        return tens[:: math.ceil(len(tens) / 5)]
    all_three = [power + math.log10(factor) for power in powers for factor in (1, 2, 5)]
    return [tick for tick in all_three if low <= tick <= high]


def short(value: float) -> str:
    """Returns a number as an axis shows it: 0.25, 12, 3.5k, 1.2M, 2e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0e}" if 0 < size < 1e-3 else f"{value:.4g}"


def plot(chart: Chart) -> dict[str, Any]:
    """Returns the chart for parts.html: places in percent of the frame, from its top left; CSS classes; labels.

    Without finite points it has no curves.
    """
    lines = [(series.name, finite(series.points)) for series in chart.series]
    if chart.log:
        lines = [(name, [(x, math.log10(y)) for x, y in points if y > 0]) for name, points in lines]
    lines = [(name, points) for name, points in lines if points]
    legend = [(f"s{number % 6}", name) for number, (name, _) in enumerate(lines)]
    legend += [("line", chart.line[1])] if chart.line else []
    if not lines:
        return {"title": chart.title, "legend": legend, "curves": []}
    xs = [x for _, points in lines for x, _ in points]
    left, right = min(0.0, *xs), max(xs) if max(xs) > min(0.0, *xs) else max(xs) + 1
    bottom, top = _bounds(chart, [y for _, points in lines for _, y in points])

    def across(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    def down(y: float) -> float:
        return round(100 * (top - y) / (top - bottom), 2)

    def path(points: Sequence[tuple[float, float]]) -> str:
        if len(points) == 1:  # a stroke of no length still shows its round cap
            points = [*points, *points]
        return "M" + "L".join(f"{across(x)} {down(y)}" for x, y in points)

    def value(y: float) -> float:
        return 10**y if chart.log else y

    curves, series = [], []
    for number, (name, points) in enumerate(lines):
        raw = bucketed(points)
        if len(raw) > 40:
            curves.append((f"raw s{number % 6}", path(raw)))
        curves.append((f"curve s{number % 6}", path(smoothed(raw, 0.85) if len(raw) > 40 else raw)))
        series.append({"name": name, "points": [[round(x, 2), float(f"{value(y):.4g}")] for x, y in raw]})
    levels = [y for y in (log_ticks if chart.log else ticks)(bottom, top) if bottom <= y <= top]
    return {
        "title": chart.title,
        "note": chart.note,
        "legend": legend,
        "curves": curves,
        "levels": [(down(y), short(value(y))) for y in levels],
        "ticks": [(across(x), short(x)) for x in ticks(left, right, 5)],
        "marks": [across(x) for x in chart.marks if left < x <= right],
        "line": down(chart.line[0]) if chart.line else None,
        "hover": {"left": left, "right": right, "x": chart.x_name, "series": series},
    }


@dataclass(frozen=True)
class Scatter:
    """Dots over one setting.

    dots: {kind of dot: (setting, y, what it is called)}; log_x: a logarithmic x; choices: the settings that there are,
    for one that is no number. y is logarithmic where all are positive.
    """

    title: str
    dots: Mapping[str, Sequence[tuple[Any, float, str]]]
    log_x: bool = False
    choices: Sequence[Any] | None = None


def scatter(chart: Scatter) -> dict[str, Any]:
    """Returns the chart for parts.html: places in percent of the frame, from its top left; CSS classes; labels."""
    found = [
        (f"s{number}", x, y, name)
        for number, dots in enumerate(chart.dots.values())
        for x, y, name in dots
        if math.isfinite(y)
    ]
    legend = [(f"s{number}", kind) for number, kind in enumerate(chart.dots) if chart.dots[kind]]
    made: dict[str, Any] = {"title": chart.title, "legend": legend, "dots": []}
    if not found:
        return made
    log_y = all(y > 0 for _, _, y, _ in found)
    ys = [math.log10(y) if log_y else y for _, _, y, _ in found]
    bottom, top = _bounds(Chart("", ()), ys)
    if chart.choices is not None:
        choices = list(chart.choices)
        xs = [float(choices.index(x)) if x in choices else -1.0 for _, x, _, _ in found]
        left, right, places = -0.5, len(choices) - 0.5, [(float(n), _choice(one)) for n, one in enumerate(choices)]
    else:
        xs = [math.log10(x) if chart.log_x else float(x) for _, x, _, _ in found]
        margin = 0.04 * (max(xs) - min(xs)) or 0.5
        left, right = min(xs) - margin, max(xs) + margin
        levels = log_ticks(left, right) if chart.log_x else ticks(left, right, 5)
        places = [(x, short(10**x if chart.log_x else x)) for x in levels[:: math.ceil(len(levels) / 6)]]

    def across(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    def down(y: float) -> float:
        return round(100 * (top - y) / (top - bottom), 2)

    levels = (log_ticks if log_y else ticks)(bottom, top)
    return made | {
        "dots": [(style, across(x), down(y), name) for (style, _, _, name), x, y in zip(found, xs, ys, strict=True)],
        "levels": [(down(y), short(10**y if log_y else y)) for y in levels if bottom <= y <= top],
        "ticks": [(across(x), label) for x, label in places],
    }


def _choice(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bounds(chart: Chart, ys: Sequence[float]) -> tuple[float, float]:
    """Returns the lowest and highest y shown: of the data and of what the chart always shows, with a margin."""
    # A spike at the start would flatten all that follows: of many points the outermost hundredth may leave the frame.
    ordered = sorted(ys)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[-1 - cut]
    wanted = [bound for bound in (chart.low, chart.high, chart.line[0] if chart.line else None) if bound is not None]
    low, high = min([low, *wanted]), max([high, *wanted])
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    bottom = low if chart.low is not None and low == chart.low else low - margin
    return bottom, high if chart.high is not None and high == chart.high else high + margin
