"""Line charts as static SVG, drawn from plain numbers. Their colours are CSS classes, set by the page."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from toolkit.reporting import wording

NUM_COLOURS = 8
MAX_POINTS = 600
MAX_HOVER_POINTS = 400
DASHES = ("", "7 3", "2 3")

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 36

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of a chart. A y that is NaN or infinite breaks the line and is marked on the x axis."""

    name: str
    colour: int
    """Number of the series: colour modulo ``NUM_COLOURS``, then the dash pattern."""
    points: Sequence[Point]
    """(x, y), x rising."""
    style: Literal["line", "faint", "points"] = "line"


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_name: str = "step",
    y_format: Callable[[float], str] = wording.number,
    from_zero: bool = False,
) -> str:
    """One chart as an SVG element, or an empty string when there is no finite number in it.

    Args:
        lines: drawn in this order, so that the last is on top.
        label: what the chart shows, for screen readers and in the hover texts.
        x_name: what x counts.
        y_format: a y value as text in the hover texts; the axis has its own short form.
        from_zero: the y axis begins at zero.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    y_ticks = nice_ticks(min(0.0, low) if from_zero else low, high, 5)
    first, last = 0.0, max(x for x, _ in finite)
    x_ticks = [tick for tick in nice_ticks(first, last, 6, whole=True) if first <= tick <= last]
    frame = _Frame(first, last, min(y_ticks[0], low), max(y_ticks[-1], high))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} by {escape(x_name)}">',
        *_axes(frame, x_ticks, y_ticks, x_name),
        *(part for line in lines for part in _marks(frame, line)),
        *_hover(frame, [line for line in lines if line.style != "faint"], x_name, y_format),
        "</svg>",
    ]
    return "".join(parts)


def nice_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers, 1, 2 or 5 times a power of ten apart, that enclose ``low`` to ``high``.

    Args:
        whole: only whole numbers.
    """
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low, low + 1) if whole else (low - margin, high + margin)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(start, end + 1)]


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` of ``points``: of each stretch the lowest, the highest and one that is not finite."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    num_stretches = limit // 3
    for index in range(num_stretches):
        stretch = points[index * len(points) // num_stretches : (index + 1) * len(points) // num_stretches]
        finite = [point for point in stretch if math.isfinite(point[1])]
        chosen = [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])] if finite else []
        chosen += [point for point in stretch if not math.isfinite(point[1])][:1]
        kept += sorted(set(chosen), key=lambda p: p[0])
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fiftieth of the points, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(points) / 50)
    average, weight = 0.0, 0.0
    result: list[Point] = []
    for x, y in points:
        if math.isfinite(y):
            average = keep * average + (1 - keep) * y
            weight = keep * weight + (1 - keep)
            y = average / weight
        result.append((x, y))
    return result


@dataclass(frozen=True, slots=True)
class _Frame:
    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        span = self.last - self.first
        share = (value - self.first) / span if span else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str) -> Iterator[str]:
    for tick in y_ticks:
        y = frame.y(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        text = wording.tick(tick)
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{text}</text>'
    for tick in x_ticks:
        x = frame.x(tick)
        yield f'<line class="axis" x1="{x}" x2="{x}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        text = wording.tick(tick)
        yield f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{text}</text>'
    yield (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    )
    yield (
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )


def _marks(frame: _Frame, line: Line) -> Iterator[str]:
    colour = f"s{line.colour % NUM_COLOURS}"
    if line.style == "points":
        yield from (
            f'<circle class="{colour} dot" cx="{frame.x(x)}" cy="{frame.y(y)}" r="4"/>'
            for x, y in line.points
            if math.isfinite(y)
        )
        return
    path, is_drawing = [], False
    for x, y in thinned(line.points):
        if not math.isfinite(y):
            is_drawing = False
            if line.style == "line":
                bottom = HEIGHT - BOTTOM
                yield f'<path class="lost" d="M{frame.x(x) - 4} {bottom - 8}l8 8m0 -8l-8 8"/>'
            continue
        path.append(f"{'L' if is_drawing else 'M'}{frame.x(x)} {frame.y(y)}")
        is_drawing = True
    dash = DASHES[line.colour // NUM_COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    yield f'<path class="{colour} {line.style}" d="{"".join(path)}"{dashed}/>'
    if len(path) == 1:
        yield from _marks(frame, Line(name=line.name, colour=line.colour, points=line.points, style="points"))


def _hover(
    frame: _Frame, lines: Sequence[Line], x_name: str, y_format: Callable[[float], str]
) -> Iterator[str]:
    """Invisible discs with the values, few enough for a browser."""
    for line in lines:
        stride = max(1, math.ceil(len(line.points) * len(lines) / MAX_HOVER_POINTS))
        for x, y in line.points[::stride]:
            if math.isfinite(y):
                text = escape(f"{line.name}: {y_format(y)} at {x_name} {x:,.0f}")
                place = f'cx="{frame.x(x)}" cy="{frame.y(y)}"'
                yield f'<circle class="hit" {place} r="6"><title>{text}</title></circle>'
