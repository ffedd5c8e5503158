"""Small plots as inline SVG: axes, lines, dots and bars, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 40


@dataclass(frozen=True)
class Axis:
    """Where a value lies between 0 and 1, and what is written beside it.

    Attributes:
        label: of the axis. place: value -> [0, 1]. ticks: (value, text) each.
    """

    label: str
    place: Callable[[Any], float]
    ticks: Sequence[tuple[object, str]]


def linear(label: str, values: Sequence[float], zero: bool = False) -> Axis:
    """A linear axis over the values, rounded outwards to its ticks."""
    low, high = min((0.0, *values) if zero else values), max(values)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    span, coarse = high - low, 10.0 ** math.floor(math.log10((high - low) / 4))
    step = min(
        (m * coarse for m in (1.0, 2.0, 2.5, 5.0, 10.0)), key=lambda size: abs(span / size - 4)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    bottom, top = first * step, last * step
    return Axis(
        label,
        lambda v: (float(v) - bottom) / (top - bottom),
        [(n * step, _number(n * step)) for n in range(first, last + 1)],
    )


def logarithmic(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis over positive values, with ticks at 1, 2 and 5 times the powers of ten."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = 0.04 * max(high - low, 0.1)
    low, high = low - margin, high + margin
    marks = [
        m * 10.0**p
        for p in range(math.floor(low), math.ceil(high) + 1)
        for m in ((1, 2, 5) if high - low < 2.5 else (1,))
    ]
    inside = [(v, _number(v)) for v in marks if low <= math.log10(v) <= high]
    return Axis(label, lambda v: (math.log10(float(v)) - low) / (high - low), inside)


def categories(label: str, values: Sequence[Any]) -> Axis:
    """One place for each distinct value, numbers in order."""
    names = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    places = {name: (n + 0.5) / len(names) for n, name in enumerate(names)}
    return Axis(label, lambda v: places[v], [(name, str(name)) for name in names])


def fitting(label: str, values: Sequence[Any]) -> Axis:
    """The axis that suits the values: categories, a logarithmic one where they span more than a
    decade, or a linear one.
    """
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(values) or (
        len(set(values)) <= 6 and all(isinstance(v, int) for v in values)
    ):
        return categories(label, values)
    return (
        logarithmic(label, numbers)
        if min(numbers) > 0 and max(numbers) / min(numbers) > 8
        else linear(label, numbers)
    )


@dataclass
class Plot:
    """A plot that grows by its methods; `text` is its SVG."""

    x: Axis
    y: Axis
    width: int = 420
    height: int = 250
    marks: list[str] = field(default_factory=list)

    def line(
        self,
        points: Sequence[tuple[object, object]],
        style: str,
        title: str = "",
        steps: bool = False,
    ) -> None:
        """A line through the points; with `steps` it goes sideways first."""
        placed = [self._at(x, y) for x, y in points]
        if steps:
            placed = [
                p
                for n, (x, y) in enumerate(placed)
                for p in ([(x, placed[n - 1][1])] if n else []) + [(x, y)]
            ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        self.marks.append(f'<polyline class="{style}" points="{path}">{_title(title)}</polyline>')

    def dot(self, x: object, y: object, style: str, title: str = "", radius: float = 4.0) -> None:
        """A dot, with a text that appears under the pointer."""
        px, py = self._at(x, y)
        self.marks.append(
            f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}"'
            f' r="{radius:.1f}">{_title(title)}</circle>'
        )

    def bar(self, start: object, end: object, y: object, style: str, title: str = "") -> None:
        """A horizontal bar."""
        (left, py), (right, _) = self._at(start, y), self._at(end, y)
        thick = min(14.0, 0.7 * (self.height - _TOP - _BOTTOM) / max(1, len(self.y.ticks)))
        size = (
            f'x="{left:.1f}" y="{py - thick / 2:.1f}" width="{max(2.0, right - left):.1f}"'
            f' height="{thick:.1f}" rx="2"'
        )
        self.marks.append(f'<rect class="{style}" {size}>{_title(title)}</rect>')

    def level(self, y: object, text: str) -> None:
        """A dashed line across, with its name."""
        _, py = self._at(self.x.ticks[0][0], y)
        right, below = self.width - _RIGHT, py + 14
        self.marks.append(
            f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>'
        )
        self.marks.append(
            f'<text class="name" x="{right}" y="{below:.1f}"'
            f' text-anchor="end">{escape(text)}</text>'
        )

    @property
    def text(self) -> str:
        """The plot as an SVG element."""
        bottom, right, parts = self.height - _BOTTOM, self.width - _RIGHT, []
        for value, name in self.x.ticks:
            px = _LEFT + self.x.place(value) * (right - _LEFT)
            parts.append(
                f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            )
            parts.append(
                f'<text x="{px:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(name)}</text>'
            )
        for value, name in self.y.ticks:
            py = bottom - self.y.place(value) * (bottom - _TOP)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>'
            )
            parts.append(
                f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{escape(name)}</text>'
            )
        middle = (_LEFT + right) / 2
        parts.append(
            f'<text class="name" x="{middle:.0f}" y="{self.height - 6}"'
            f' text-anchor="middle">{escape(self.x.label)}</text>'
        )
        label = f"{self.y.label} by {self.x.label}"
        body = "".join(parts + self.marks)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img"'
            f' aria-label="{escape(label)}">{body}</svg>'
        )

    def _at(self, x: object, y: object) -> tuple[float, float]:
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        return _LEFT + self.x.place(x) * (right - _LEFT), bottom - self.y.place(y) * (bottom - _TOP)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"
