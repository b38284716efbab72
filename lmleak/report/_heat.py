"""The signature picture: a score, and what it cost, in every layer and component, as inline SVG.

A cell that was not run is blank. One without an answer is drawn by why: not applicable (dashed), no signal (hatched),
out of budget (dotted, with what its best guess scores), failed; a score of 0 is a plain cell with a 0. A folded corner
says that some batches were not answered; the score counts them, by their best guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lmleak.report import _grade, _palette, _study, _words
from lmleak.report._study import Place

SECONDS = "seconds"  #: drawn as a metric: the attack's CPU seconds a batch, on a logarithmic scale
_ROW, _GAP, _TOP = 38, 2, 28
_WIDTHS = ((8, 56), (13, 46), (10**6, 34))  #: (at most so many columns, width of each)
_PAIRED = 32  #: width of a column where two maps of 12 layers are to stand side by side on a desktop page
_LETTER = 6.6  #: mean advance of the 12 px label face, measured on the widest of the system faces
_SHORT_STATUS = {
    "not_applicable": ("n/a",), "no_signal": ("no", "signal"), "budget_exhausted": ("budget",), "failed": ("failed",)
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One map: the cells that agree in everything but its two axes."""

    title: str
    svg: Markup


def panels(cells: Sequence[Place], metric: str) -> list[Panel]:
    """Small multiples, one for each combination of what varies beside the two axes."""
    if not cells:
        return []
    rows, columns, rest = _axes(cells)
    scale = _scale(cells)
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place in cells:
        groups.setdefault(tuple(getattr(place, name) for name in rest), []).append(place)
    found = []
    for title, group in groups.items():
        label = " · ".join(part for part in title if part)
        # Each map is framed by its own cells: the products of a sweep may differ in what they were meant to cover.
        names = _study.ordered(group, rows), _study.ordered(group, columns)
        wide = next(width for count, width in _WIDTHS if len(names[1]) <= count)
        step = _PAIRED if len(groups) > 1 and len(names[1]) > 8 else wide
        found.append(Panel(label, _map(group, metric, rows, columns, *names, label, step, scale)))
    return found


def _scale(cells: Sequence[Place]) -> tuple[float, float]:
    """The least and the most CPU seconds of an attack, a factor of ten apart at least."""
    known = [max(place.seconds, 0.01) for place in cells if place.seconds is not None and _spent(place)]
    low = min(known, default=0.1)
    return low, max(10 * low, max(known, default=1.0))


def _spent(place: Place) -> bool:
    return place.status in ("ok", "budget_exhausted")


def _axes(cells: Sequence[Place]) -> tuple[str, str, list[str]]:
    """Rows, columns and the remaining dimensions: component x layer, unless one of them stands still."""
    moving = _study.varying(cells)
    columns = "layer" if "layer" in moving or len(moving) < 2 else next(d for d in reversed(moving) if d != "component")
    row_choice = [d for d in moving if d != columns]
    rows = row_choice[0] if row_choice else ("component" if columns != "component" else "layer")
    return rows, columns, [d for d in moving if d not in (rows, columns)]


def _map(
    cells: Sequence[Place],
    metric: str,
    rows: str,
    columns: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    label: str,
    step: int,
    scale: tuple[float, float],
) -> Markup:
    long = columns != "layer" and max(map(len, column_names)) * _LETTER > step
    left = min(230.0, 14 + max(_LETTER * len(_cut(name)) for name in row_names))
    top = _TOP + (0.62 * _LETTER * max(len(_cut(name)) for name in column_names) if long else 0)
    tail = 0.8 * _LETTER * len(_cut(column_names[-1])) - step / 2 if long else 0
    width, height = left + step * len(column_names) + 2 + max(0.0, tail), top + _ROW * len(row_names) + 2
    at: dict[tuple[str, str], list[Place]] = {}
    for place in cells:
        at.setdefault((getattr(place, rows), getattr(place, columns)), []).append(place)
    parts = []
    for index, name in enumerate(column_names):
        x = left + step * (index + 0.5)
        turn = Markup(' transform="rotate(-38 {0:.0f} {1:.0f})"').format(x, top - 10) if long else ""
        anchor = "start" if long else "middle"
        parts.append(
            Markup('<text class="ax" x="{:.0f}" y="{:.0f}" text-anchor="{}"{}>{}</text>').format(
                x, top - 10, anchor, turn, _cut(name)
            )
        )
    if columns == "layer":
        parts.append(
            Markup('<text class="ax dim" x="{:.0f}" y="{:.0f}" text-anchor="end">layer</text>').format(
                left - 10, top - 10
            )
        )
    for index, name in enumerate(row_names):
        y = top + _ROW * index
        prefix = "layer " if rows == "layer" else ""
        parts.append(
            Markup('<text class="ax" x="{:.0f}" y="{:.0f}" text-anchor="end">{}</text>').format(
                left - 10, y + _ROW / 2 + 3, prefix + _cut(name)
            )
        )
        for number, column in enumerate(column_names):
            here = at.get((name, column))
            if here:
                parts.append(_cell(here, metric, left + step * number, y, step - _GAP, _ROW - _GAP, scale))
    title = f"{_words.metric_name(metric)} by {rows} and {columns}" + (f", {label}" if label else "")
    return Markup(
        '<svg class="map" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" role="img" '
        'aria-label="{2}">{3}</svg>'
    ).format(width, height, title, Markup("").join(parts))


def _cell(
    here: Sequence[Place],
    metric: str,
    x: float,
    y: float,
    width: float,
    height: float,
    scale: tuple[float, float],
) -> Markup:
    box = Markup('x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" rx="3"').format(x, y, width, height)
    first, where = here[0], _study.describe(here[0], ("component", "layer", "defense", "attack", "other"))
    times = [place.seconds for place in here if place.seconds is not None and _spent(place)]
    cost = sum(times) / len(times) if times else None
    if metric == SECONDS and cost is not None:
        low, high = scale
        shade = _palette.shade(math.log(max(cost, low) / low) / math.log(high / low))
        text = f"{where}: {_words.seconds(cost)} a batch, CPU"
        return _drawn("cell", text, f"h{shade}", box, _lines(x, y, width, height, (brief(cost),), f"t{shade}"))
    scored = [score for place in here if (score := place.score(metric))]
    if not scored:
        return _unscored(first, metric, where, cost, box, (x, y, width, height))
    mean = sum(score["mean"] for score in scored) / len(scored)
    shown = _words.percent(mean, metric)
    shade = _palette.shade(_grade.strength(metric, mean))
    spread = "" if len(scored) > 1 else interval(scored[0], metric)
    runs = f", mean of {len(scored)} cells" if len(scored) > 1 else f", n = {scored[0].get('n')}"
    done, asked = (sum(counts) for counts in zip(*(place.answered for place in here), strict=True))
    part = f"; {done} of {asked} batches answered, the others count by their best guess" if done < asked else ""
    spent = f"; {_words.seconds(cost)} a batch, CPU" if cost is not None else ""
    text = f"{where}: {shown}{' ' + spread if spread else ''}{runs}{part}{spent}"
    words = _lines(x, y, width, height, (shown, brief(cost)) if cost is not None else (shown,), f"t{shade}")
    corner = Markup('<path class="corner" d="M{:.0f} {:.0f}h-10l10 10z"/>').format(x + width, y) if done < asked else ""
    return _drawn("cell", text, f"h{shade}", box, words + corner)


def _unscored(
    place: Place, metric: str, where: str, cost: float | None, box: Markup, at: tuple[float, float, float, float]
) -> Markup:
    reason = _words.visible(str(place.line.get("reason") or "no score"))[:300]
    status = "undefined" if place.status == "ok" else place.status
    shown, more = _SHORT_STATUS.get(status, ("–",)), ""
    guess = place.guess(metric)
    if guess:
        level = _words.percent(guess["mean"], metric)
        shown, more = (*shown, f"({level})"), f"; its best guesses score {level}"
    if cost is not None and metric != SECONDS:
        more += f"; {_words.seconds(cost)} a batch, CPU"
    text = f"{where}: {_words.STATUSES.get(status, status)}, {reason}{more}"
    return _drawn(f"cell none {status}", text, "", box, _lines(*at, shown))


def _drawn(kind: str, title: str, fill: str, box: Markup, inside: Markup) -> Markup:
    named = Markup('class="{}" ').format(fill) if fill else Markup("")
    return Markup('<g class="{}"><title>{}</title><rect {}{}/>{}</g>').format(kind, title, named, box, inside)


def _lines(x: float, y: float, width: float, height: float, texts: Sequence[str], ink: str = "") -> Markup:
    """One line in the middle, or two: the second smaller."""
    made = Markup("")
    for number, text in enumerate(texts):
        names = " ".join(name for name in (ink, "sub" if number else "") if name)
        named = Markup('class="{}" ').format(names) if names else Markup("")
        rise = 4.0 if len(texts) == 1 else (-2.0, 12.0)[number]
        made += Markup('<text {}x="{:.0f}" y="{:.0f}">{}</text>').format(
            named, x + width / 2, y + height / 2 + rise, text
        )
    return made


def brief(value: float | None) -> str:
    """CPU seconds in a few letters: `<0.1s`, `0.1s`, `12s`, `3m`, `2h`."""
    if value is None:
        return ""
    if value < 0.05:
        return "<0.1s"
    for limit, unit, size in ((99.5, "s", 1), (5970, "m", 60)):
        if value < limit:
            return f"{value / size:.1f}{unit}" if value < 9.95 else f"{value / size:.0f}{unit}"
    return f"{value / 3600:.0f}h"


def interval(score: Mapping[str, Any], metric: str = "") -> str:
    """`[93, 100]`, or nothing where a single batch gives no interval."""
    if score.get("low") is None or score.get("high") is None:
        return ""
    return f"[{_words.percent(score['low'], metric)}, {_words.percent(score['high'], metric)}]"


def legend(metric: str, cells: Sequence[Place] = ()) -> Markup:
    """The scale from 0 to 100 (dB for PSNR, CPU seconds on a logarithmic one), and how what has no score is drawn."""
    step, start = 9, 34
    bars = Markup("").join(
        Markup('<rect class="h{}" x="{}" y="1" width="{}" height="12"/>').format(i, start + step * i, step + 0.5)
        for i in range(_palette.STEPS + 1)
    )
    low, high = _grade.ends(metric)
    if metric == SECONDS:
        low, high = (brief(end) for end in _scale(cells))
    parts = [
        Markup('<text class="ax" x="{}" y="11" text-anchor="end">{}</text>').format(start - 6, low),
        bars,
        Markup('<text class="ax" x="{}" y="11">{}</text>').format(start + step * (_palette.STEPS + 1) + 6, high),
    ]
    x = start + step * (_palette.STEPS + 1) + 58.0
    statuses = dict.fromkeys(place.status for place in cells)
    drawn = [
        (name, _words.STATUSES[name].replace("n/a", "not applicable")) for name in _SHORT_STATUS if name in statuses
    ]
    for kind, text in drawn:
        parts.append(
            Markup('<g class="cell none {}"><rect x="{:.0f}" y="1" width="22" height="12" rx="2"/></g>').format(kind, x)
        )
        parts.append(Markup('<text class="ax" x="{:.0f}" y="11">{}</text>').format(x + 28, text))
        x += 44 + _LETTER * len(text)
    if any(place.status == "ok" and place.answered[0] < place.answered[1] for place in cells):
        corner = Markup('<path class="corner" d="M{:.0f} 1h-10l10 10z"/>').format(x + 12)
        parts += [corner, Markup('<text class="ax" x="{:.0f}" y="11">answered in part</text>').format(x + 18)]
        x += 18 + _LETTER * len("answered in part")
    return Markup(
        '<svg class="legend" viewBox="0 0 {0:.0f} 14" width="{0:.0f}" height="14" role="img" '
        'aria-label="colour scale from {1} to {2}; hatched, dashed and dotted cells have no score">{3}</svg>'
    ).format(x, low, high, Markup("").join(parts))


def _cut(label: str, limit: int = 36) -> str:
    label = _words.visible(label)
    return label if len(label) <= limit else label[: limit - 1] + "…"
