"""Where the marks of a chart lie, for templates that draw them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .content import Point, Space


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in the chart and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point of a chart: its place, what it stands for, and whether its name is written beside it."""

    x: float
    y: float
    point: Point
    named: bool = False


@dataclass(frozen=True)
class Line:
    """Marks of one name in order of their cost; `number` counts the lines, for the colour."""

    name: str
    number: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Frontier:
    """A plot of agreement over cost; `bounds` are points of no line, with nothing merged."""

    width: int
    height: int
    lines: tuple[Line, ...]
    bounds: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 18, 44
_NAME = 14  # height of a name, which stands below its mark
_MOST_NAMES = 12


def frontier(points: Sequence[Point], width: int = 720, height: int = 320) -> Frontier | None:
    """The plot; None where there is nothing to compare."""
    if len(points) < 2:
        return None
    across = _Scale.of([point.cost for point in points], _LEFT, width - _RIGHT)
    up = _Scale.of([point.value for point in points], height - _BOTTOM - _NAME, _TOP)
    names = list(dict.fromkeys(point.line for point in points if point.line))
    marks = [Mark(across.at(point.cost), up.at(point.value), point) for point in points]
    marks.sort(key=lambda mark: mark.point.cost)
    marks = _named(marks)
    lines = [Line(name, n, tuple(m for m in marks if m.point.line == name)) for n, name in enumerate(names)]
    bounds = tuple(mark for mark in marks if not mark.point.line)
    return Frontier(width, height, tuple(lines), bounds, tuple(across.ticks()), tuple(up.ticks()))


def _named(marks: Sequence[Mark]) -> list[Mark]:
    """The marks, with the names of some: the lowest of those of one name at one cost, for several lines at one cut
    share its name; what was chosen; and none else where names would lie upon one another."""
    lowest: dict[tuple[str, float], Mark] = {}
    for mark in marks:
        if mark.point.line:
            key = (mark.point.label, round(mark.point.cost, 2))
            lowest[key] = max(lowest.get(key, mark), mark, key=lambda own: own.y)
    shown = list(lowest.values()) if len(lowest) <= _MOST_NAMES else []
    return [replace(mark, named=mark.point.chosen or mark in shown) for mark in marks]


@dataclass(frozen=True)
class _Scale:
    """A linear map of values to places in a chart."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        """With a margin of a twentieth on both sides."""
        low, high = min(values), max(values)
        margin = (high - low) / 20 or max(abs(high), 1) / 20
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self) -> list[Tick]:
        """Some five round values.

        >>> [tick.text for tick in _Scale(0.0, 1.0, 0, 100).ticks()]
        ['0', '0.2', '0.4', '0.6', '0.8', '1']
        """
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [Tick(self.at(n * step), f"{n * step:.10g}") for n in range(first, last + 1)]


@dataclass(frozen=True)
class Bar:
    """A space in the chart of widths: `x`, heights of what the networks have and of what is kept, and its number."""

    x: float
    width: float
    had: float
    kept: float
    number: int
    space: Space


@dataclass(frozen=True)
class Widths:
    """A bar for each space, in order."""

    width: int
    height: int
    base: float
    bars: tuple[Bar, ...]
    y_ticks: tuple[Tick, ...]


def widths(spaces: Sequence[Space], width: int = 1080, height: int = 200) -> Widths | None:
    """The chart; None without spaces. What the networks have is the greatest of their widths."""
    if not spaces:
        return None
    base = height - 6.0
    top = max(max(*space.sizes, space.kept) for space in spaces)
    up = _Scale(0, top * 1.05, base, _TOP)
    step = min((width - _LEFT - 8) / len(spaces), 42)
    bars = [
        Bar(
            round(_LEFT + step * n, 2), round(step * 0.76, 2), round(base - up.at(max(space.sizes)), 2),
            round(base - up.at(space.kept), 2), n, space,
        )
        for n, space in enumerate(spaces)
    ]  # fmt: skip
    return Widths(min(width, math.ceil(_LEFT + step * len(spaces) + 8)), height, base, tuple(bars), tuple(up.ticks()))
