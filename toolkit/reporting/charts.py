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
SMALL_WIDTH, SMALL_HEIGHT = 300, 170
SMALL_MAX_POINTS = 150
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A vertical line across a chart: something that happened."""

    x: float
    text: str
    """Shown where the pointer rests on it."""
    tone: str = ""
    """A CSS class besides ``rule``."""


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_name: str = "step",
    y_format: Callable[[float], str] = wording.number,
    from_zero: bool = False,
    rules: Sequence[Rule] = (),
    is_small: bool = False,
    extent: tuple[float, float, float] | None = None,
) -> str:
    """One chart as an SVG element, or an empty string when there is no finite number in it.

    Args:
        lines: drawn in this order, so that the last is on top.
        label: what the chart shows, for screen readers and in the hover texts.
        x_name: what x counts.
        y_format: a y value as text in the hover texts; the axis has its own short form.
        from_zero: the y axis begins at zero.
        rules: behind the lines.
        is_small: one of many, side by side.
        extent: last x, lowest y and highest y of the axes, so that several charts are alike; None: of these lines.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    first, last = 0.0, max(x for x, _ in finite)
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    if extent is not None:
        last, low, high = extent
    y_ticks = nice_ticks(min(0.0, low) if from_zero else low, high, 3 if is_small else 5)
    x_ticks = [t for t in nice_ticks(first, last, 4 if is_small else 6, whole=True) if first <= t <= last]
    width, height = (SMALL_WIDTH, SMALL_HEIGHT) if is_small else (WIDTH, HEIGHT)
    frame = _Frame(first, last, min(y_ticks[0], low), max(y_ticks[-1], high), width, height)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)} by {escape(x_name)}">',
        *_axes(frame, x_ticks, y_ticks, x_name),
        *(part for rule in rules for part in _rule(frame, rule)),
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
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        span = self.last - self.first
        share = (value - self.first) / span if span else 0.5
        return round(LEFT + share * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.bottom - share * (self.bottom - TOP), 1)


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str) -> Iterator[str]:
    for tick in y_ticks:
        y = frame.y(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{frame.right}" y1="{y}" y2="{y}"/>'
        text = wording.tick(tick)
        yield f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{text}</text>'
    for tick in x_ticks:
        x = frame.x(tick)
        yield f'<line class="axis" x1="{x}" x2="{x}" y1="{frame.bottom}" y2="{frame.bottom + 4}"/>'
        text = wording.tick(tick)
        yield f'<text class="tick" x="{x}" y="{frame.bottom + 17}" text-anchor="middle">{text}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>'
    yield (
        f'<text class="tick" x="{(LEFT + frame.right) / 2}" y="{frame.height - 4}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )


def _rule(frame: _Frame, rule: Rule) -> Iterator[str]:
    if frame.first <= rule.x <= frame.last:
        place = f'x1="{frame.x(rule.x)}" x2="{frame.x(rule.x)}" y1="{TOP}" y2="{frame.bottom}"'
        yield f'<line class="rule {escape(rule.tone)}" {place}/>'
        # Broad enough for a pointer.
        yield f'<line class="rule-hit" {place}><title>{escape(rule.text)}</title></line>'


def _marks(frame: _Frame, line: Line) -> Iterator[str]:
    colour = f"s{line.colour % NUM_COLOURS}"
    if line.style == "points":
        yield from (
            f'<circle class="{colour} dot" cx="{frame.x(x)}" cy="{frame.y(y)}" r="{4 if frame.width == WIDTH else 3}"/>'
            for x, y in line.points
            if math.isfinite(y)
        )
        return
    path, is_drawing = [], False
    for x, y in thinned(line.points, MAX_POINTS if frame.width == WIDTH else SMALL_MAX_POINTS):
        if not math.isfinite(y):
            is_drawing = False
            if line.style == "line":
                yield f'<path class="lost" d="M{frame.x(x) - 4} {frame.bottom - 8}l8 8m0 -8l-8 8"/>'
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
                text = escape(f"{line.name}: {y_format(y)} at {x_name} {_place(x)}")
                place = f'cx="{frame.x(x)}" cy="{frame.y(y)}"'
                yield f'<circle class="hit" {place} r="6"><title>{text}</title></circle>'


def _place(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) else f"{x:,.2f}"
