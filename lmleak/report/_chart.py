"""Score against noise as inline SVG: logarithmic axis, 95 % intervals, epsilon under each noise level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lmleak.report import _palette, _study, _words
from lmleak.report._study import Place

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 14, 64
_FIELDS = {"dp_sgd": "noise_multiplier", "gaussian_noise": "std"}
LINES = len(_palette.SERIES_LIGHT)  #: drawn at most; more lines than colours cannot be told apart


@dataclass(frozen=True)
class Chart:
    """One picture, its legend as (colour index, label), and how many lines were left out."""

    kind: str
    field: str
    svg: Markup
    legend: list[tuple[int, str]]
    left_out: int


def charts(cells: Sequence[Place], metric: str) -> list[Chart]:
    """One chart for each kind of noise that was tried at three levels or more, no noise counted as one."""
    return [chart for kind, name in _FIELDS.items() if (chart := _chart(cells, metric, kind, name))]


def _level(place: Place, kind: str, field: str) -> float | None:
    """Noise of a cell on this chart's axis: no defense counts as none, another defense is not on it."""
    defense = place.setting.get("defense") or {"kind": "none"}
    if defense.get("kind", "none") == "none":
        return 0.0
    value = defense.get(field)
    return float(value) if defense.get("kind") == kind and isinstance(value, (int, float)) else None


def _chart(cells: Sequence[Place], metric: str, kind: str, field: str) -> Chart | None:
    lines: dict[str, dict[float, list[Place]]] = {}
    apart = [d for d in _study.varying(cells) if d != "defense"]
    for place in cells:
        level = _level(place, kind, field)
        if level is not None and place.score(metric):
            label = _study.describe(place, apart) if apart else "all cells"
            # Levels of one line differ in noise only; another clipping norm is another line. The undefended cell joins
            # the line of sigma 0 only where that was not run, so that clipping alone stays visible.
            lines.setdefault(label, {}).setdefault(level, []).append(place)
    for points in lines.values():
        for level, group in points.items():
            clipped = [place for place in group if place.defended]
            points[level] = clipped or group
    lines = {label: points for label, points in lines.items() if any(level > 0 for level in points)}
    levels = sorted({level for points in lines.values() for level in points})
    if len(levels) < 3:  # two points are a comparison, which the table makes better
        return None
    ranked = sorted(lines, key=lambda name: -sum(_mean(group, metric) for group in lines[name].values()))
    drawn = [name for name in lines if name in ranked[:LINES]]
    across = _scale(levels)
    top = (
        max(1.0, *(_mean(g, metric) for points in lines.values() for g in points.values())) if metric == "psnr" else 1.0
    )
    parts = _frame(levels, across, _epsilons(cells, kind, field), top, metric, field)
    for index, name in enumerate(drawn):
        parts.append(_line(lines[name], across, metric, top, index, len(drawn), name))
    title = f"{_words.metric_name(metric)} against {field.replace('_', ' ')}"
    svg = Markup(
        '<svg class="chart" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">{3}</svg>'
    ).format(_WIDTH, _HEIGHT, title, Markup("").join(parts))
    return Chart(kind, field, svg, list(enumerate(drawn)), len(lines) - len(drawn))


def _mean(group: Sequence[Place], metric: str) -> float:
    return sum(place.mean(metric) for place in group) / len(group)


def _scale(levels: Sequence[float]) -> Mapping[float, float]:
    """x of each level: logarithmic, with 0 set apart on the left behind a gap."""
    positive = [level for level in levels if level > 0]
    start = _LEFT + (88 if levels[0] == 0 else 30)
    stop = _WIDTH - _RIGHT - 30
    low, high = math.log10(positive[0]), math.log10(positive[-1])
    found = {
        level: start + (stop - start) * ((math.log10(level) - low) / (high - low) if high > low else 0.5)
        for level in positive
    }
    return {0.0: _LEFT + 28.0, **found} if levels[0] == 0 else found


def _epsilons(cells: Sequence[Place], kind: str, field: str) -> dict[float, str]:
    """Epsilon of each level; several (another delta, another batch size) as a range."""
    found: dict[float, set[float]] = {}
    for place in cells:
        epsilon = (place.line.get("privacy") or {}).get("epsilon")
        level = _level(place, kind, field)
        if level is not None and place.defended and isinstance(epsilon, (int, float)):
            found.setdefault(level, set()).add(float(epsilon))
    return {
        level: _words.number(min(values)) + (f"–{_words.number(max(values))}" if len(values) > 1 else "")
        for level, values in found.items()
    }


def _y(value: float, top: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(max(value / top, 0.0), 1.0))


def _frame(
    levels: Sequence[float],
    across: Mapping[float, float],
    epsilons: Mapping[float, str],
    top: float,
    metric: str,
    field: str,
) -> list[Markup]:
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = _y(tick * top, top)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="ax" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y, y, _LEFT - 8, y + 4, _words.percent(tick * top, metric))
        )
    base, last = _HEIGHT - _BOTTOM, -99.0
    for level in levels:
        x = across[level]
        if x - last < 46:  # labels would run into each other
            continue
        last = x
        parts.append(
            Markup('<text class="ax" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x, base + 18, _words.number(level)
            )
        )
        if level in epsilons:
            parts.append(
                Markup('<text class="ax dim" x="{:.1f}" y="{}" text-anchor="middle">ε {}</text>').format(
                    x, base + 34, epsilons[level]
                )
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    axis = {"std": "standard deviation of the noise"}.get(field, field.replace("_", " ")) + (
        ", with ε of one release below it" if epsilons else ""
    )
    parts.append(
        Markup('<text class="ax dim" x="{:.0f}" y="{}" text-anchor="middle">{}</text>').format(middle, base + 56, axis)
    )
    if levels[0] == 0:
        x = across[0.0] + 30
        parts.append(Markup('<path class="gap" d="M{0:.0f} {1}l6 -10m0 10l6 -10"/>').format(x, base + 5))
    return parts


def _line(
    points: Mapping[float, Sequence[Place]],
    across: Mapping[float, float],
    metric: str,
    top: float,
    index: int,
    count: int,
    name: str,
) -> Markup:
    shift = 5.0 * (index - (count - 1) / 2)  # whiskers of neighbouring lines side by side
    marks, path = [], []
    for level in sorted(points):
        group = points[level]
        x, y = across[level] + shift, _y(_mean(group, metric), top)
        path.append((level, f"{x:.1f} {y:.1f}"))
        score = group[0].score(metric) or {}
        if len(group) == 1 and score.get("low") is not None and score.get("high") is not None:
            marks.append(
                Markup('<line class="bar s{0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{3:.1f}"/>').format(
                    index, x, _y(score["low"], top), _y(score["high"], top)
                )
            )
        spread = (
            f" [{_words.percent(score.get('low'), metric)}, {_words.percent(score.get('high'), metric)}]"
            if len(group) == 1
            else ""
        )
        marks.append(
            Markup(
                '<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="3.6"><title>{}, noise {}: {}{}</title></circle>'
            ).format(index, x, y, name, _words.number(level), _words.percent(_mean(group, metric), metric), spread)
        )
    solid = "M" + " L".join(at for level, at in path if level > 0)
    broken = f"M{path[0][1]} L{path[1][1]}" if path[0][0] == 0 and len(path) > 1 else ""
    return Markup('<path class="line s{0}" d="{1}"/><path class="line broken s{0}" d="{2}"/>{3}').format(
        index, solid, broken or "M0 0", Markup("").join(marks)
    )
