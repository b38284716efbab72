"""Axes of the comparison's figures as inline SVG: logarithmic or straight, with ticks, points, whiskers and lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 12.0, 46.0


@dataclass
class Plane:
    """One figure under construction. Both axes map a value to a pixel."""

    width: float
    height: float
    x: Callable[[float], float]
    y: Callable[[float], float]
    parts: list[Markup] = field(default_factory=list)

    def grid(self, ticks: Iterable[tuple[float, str]], title: str = "") -> None:
        """Horizontal lines with their values, and what they measure."""
        for value, label in ticks:
            at = self.y(value)
            self.parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                    LEFT, self.width - RIGHT, at, at
                )
            )
            self.text(LEFT - 8, at + 4, label, "end")
        if title:
            self.text(LEFT, TOP - 1, title, "start", dim=True)

    def below(self, ticks: Iterable[tuple[float, str]], title: str) -> None:
        """Labels under the horizontal axis, those left out that would run into another."""
        last = -99.0
        for value, label in ticks:
            at = self.x(value)
            if at - last < 6.6 * len(label) + 8:
                continue
            last = at
            self.text(at, self.height - BOTTOM + 17, label, "middle")
        self.text((LEFT + self.width - RIGHT) / 2, self.height - 8, title, "middle", dim=True)

    def text(self, x: float, y: float, words: str, anchor: str = "middle", dim: bool = False) -> None:
        """A label."""
        self.parts.append(
            Markup('<text class="ax{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
                " dim" if dim else "", x, y, anchor, words
            )
        )

    def point(self, x: float, y: float, colour: int, title: str, ends: tuple[float, float] | None = None) -> None:
        """A dot at pixels, with a whisker between two values where there is one."""
        if ends:
            low, high = (self.y(end) for end in ends)
            self.parts.append(
                Markup('<line class="bar s{0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{3:.1f}"/>').format(
                    colour, x, low, high
                )
            )
        self.parts.append(
            Markup('<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="3.4"><title>{}</title></circle>').format(
                colour, x, y, title
            )
        )

    def line(self, points: Sequence[tuple[float, float]], names: str) -> None:
        """A line through pixels."""
        if len(points) > 1:
            path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self.parts.append(Markup('<path class="line {}" d="M{}"/>').format(names, path))

    def upright(self, x: float, names: str) -> None:
        """A vertical line over the whole height."""
        self.line([(x, TOP), (x, self.height - BOTTOM)], names)

    def band(self, left: float, right: float, label: str) -> None:
        """A shaded stretch of the horizontal axis."""
        self.parts.append(
            Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                left, TOP, max(right - left, 0.0), self.height - TOP - BOTTOM
            )
        )
        self.text(left + 5, TOP + 13, label, "start", dim=True)

    def svg(self, title: str) -> Markup:
        """The finished figure."""
        return Markup(
            '<svg class="chart plane" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" role="img" '
            'aria-label="{2}">{3}</svg>'
        ).format(self.width, self.height, title, Markup("").join(self.parts))


def straight(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """A linear axis from pixel `start` to `stop`; values outside stand at its ends."""
    return lambda value: start + (stop - start) * (min(max(value, low), high) - low) / ((high - low) or 1.0)


def logarithmic(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """The same for positive values, in powers."""
    inner = straight(math.log(low), math.log(high), start, stop)
    return lambda value: inner(math.log(max(value, 1e-300)))


def upwards(height: float) -> Callable[[float], float]:
    """The usual vertical axis: a share in 0..1."""
    return straight(0.0, 1.0, height - BOTTOM, TOP)


PERCENT = [(0.0, "0"), (0.25, "25"), (0.5, "50"), (0.75, "75"), (1.0, "100")]


def powers(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten inside a range, named in few letters."""
    found = []
    for exponent in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1):
        whole = exponent >= 3
        found.append(
            (10.0**exponent, f"{10 ** (exponent % 3)}{' kMGT'[exponent // 3]}" if whole else f"{10.0**exponent:g}")
        )
    return found
