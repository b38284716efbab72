"""Colours of the report: one sequential scale for scores, one set of lines for series.

The scale is straight in OKLab lightness, so equal steps of score look equally far apart (Ottosson 2020), survive
grey-scale printing and every common form of colour blindness: lightness alone carries the number.
Series colours are those of Okabe and Ito (2008), darkened where they would vanish on white.
"""

from __future__ import annotations

STEPS = 20  #: a score is drawn in one of STEPS + 1 shades; finer steps are not told apart by eye

#: OKLCH (lightness, chroma, hue in degrees) at score 0, 0.5 and 1, on paper and on a dark screen.
_LIGHT = ((0.965, 0.016, 85.0), (0.705, 0.165, 48.0), (0.345, 0.125, 18.0))
_DARK = ((0.275, 0.012, 275.0), (0.560, 0.150, 30.0), (0.885, 0.110, 82.0))

SERIES_LIGHT = ("#0072b2", "#c04f00", "#00795a", "#a8487f", "#8a6d00", "#3b3b3b", "#1e90c8", "#7a3fb0")
SERIES_DARK = ("#56b4e9", "#ff9d4d", "#2fc79a", "#e79cc6", "#f0e442", "#d0d0d0", "#8fd0f5", "#c7a2f0")


def shade(score: float) -> int:
    """Index of the shade of a score in 0..1; only exactly 0 gets shade 0, and only exactly 1 the last one."""
    inside = round(score * STEPS)
    if 0.0 < score < 1.0:
        return min(max(inside, 1), STEPS - 1)
    return min(max(inside, 0), STEPS)


def stylesheet() -> str:
    """CSS custom properties `--h0 ..` (fill) and `--t0 ..` (text on it) and `--s0 ..` (series), light and dark."""
    light, dark = _properties(_LIGHT, SERIES_LIGHT), _properties(_DARK, SERIES_DARK)
    rules = "".join(f".h{i}{{fill:var(--h{i})}}.t{i}{{fill:var(--t{i})}}" for i in range(STEPS + 1))
    lines = "".join(f".s{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}" for i in range(len(SERIES_LIGHT)))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{rules}{lines}"


def _properties(stops: tuple[tuple[float, float, float], ...], series: tuple[str, ...]) -> str:
    parts = []
    for index in range(STEPS + 1):
        rgb = _at(stops, index / STEPS)
        parts.append(f"--h{index}:{_hex(rgb)};--t{index}:{_ink(rgb)};")
    return "".join(parts) + "".join(f"--s{index}:{color};" for index, color in enumerate(series))


def _at(stops: tuple[tuple[float, float, float], ...], x: float) -> tuple[float, float, float]:
    first, middle, last = stops
    low, high, t = (first, middle, 2 * x) if x < 0.5 else (middle, last, 2 * x - 1)
    lightness = first[0] + (last[0] - first[0]) * x  # straight over the whole range, whatever the middle stop says
    return _oklch(lightness, low[1] + (high[1] - low[1]) * t, _turn(low[2], high[2], t))


def _turn(start: float, stop: float, t: float) -> float:
    """Hue on the shorter way round."""
    return start + ((stop - start + 180.0) % 360.0 - 180.0) * t


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCH to sRGB in 0..1, clipped to the gamut."""
    from math import cos, radians, sin

    a, b = chroma * cos(radians(hue)), chroma * sin(radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (min(max(_gamma(value), 0.0), 1.0) for value in linear)
    return red, green, blue


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of WCAG 2, 0..1."""
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _ink(rgb: tuple[float, float, float]) -> str:
    """Black or white, whichever stands out more: of these two, one always has a contrast of 4.5 or more."""
    level = luminance(rgb)
    return "#000000" if (level + 0.05) / 0.05 > 1.05 / (level + 0.05) else "#ffffff"
