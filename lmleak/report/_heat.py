"""The signature picture: a score in every layer and component, as inline SVG.

A cell that was not run is blank; one that has no score is hatched and says why; a score of 0 is a plain cell with a 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lmleak.report import _palette, _study, _words
from lmleak.report._study import Place

_ROW, _GAP, _TOP = 34, 2, 28
_WIDTHS = ((8, 56), (13, 46), (10**6, 34))  #: (at most so many columns, width of each)
_PAIRED = 32  #: width of a column where two maps of 12 layers are to stand side by side on a desktop page
_LETTER = 6.6  #: mean advance of the 12 px label face, measured on the widest of the system faces
_SHORT_STATUS = {"not_applicable": "n/a", "no_signal": "none", "budget_exhausted": "time", "failed": "fail"}


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
        found.append(Panel(label, _map(group, metric, rows, columns, *names, label, step)))
    return found


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
                left - 10, y + 21, prefix + _cut(name)
            )
        )
        for number, column in enumerate(column_names):
            here = at.get((name, column))
            if here:
                parts.append(_cell(here, metric, left + step * number, y, step - _GAP, _ROW - _GAP))
    title = f"{_words.metric_name(metric)} by {rows} and {columns}" + (f", {label}" if label else "")
    return Markup(
        '<svg class="map" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" role="img" '
        'aria-label="{2}">{3}</svg>'
    ).format(width, height, title, Markup("").join(parts))


def _cell(here: Sequence[Place], metric: str, x: float, y: float, width: float, height: float) -> Markup:
    scored = [score for place in here if (score := place.score(metric))]
    box = Markup('x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" rx="3"').format(x, y, width, height)
    middle = Markup('x="{:.0f}" y="{:.0f}"').format(x + width / 2, y + height / 2 + 4)
    first = here[0]
    where = _study.describe(first, ("component", "layer", "defense", "attack", "other"))
    if not scored:
        reason = first.line.get("reason") or "no score"
        status = "undefined" if first.status == "ok" else first.status
        text = _SHORT_STATUS.get(status, "–")
        return Markup('<g class="cell none {}"><title>{}: {}, {}</title><rect {}/><text {}>{}</text></g>').format(
            status, where, _words.STATUSES.get(status, status), _words.visible(str(reason))[:300], box, middle, text
        )
    mean = sum(score["mean"] for score in scored) / len(scored)
    shown = _words.percent(mean, metric)
    # PSNR has no natural end; 40 dB is where the eye stops telling images apart.
    shade = _palette.shade(mean / 40 if metric == "psnr" else mean)
    spread = "" if len(scored) > 1 else interval(scored[0], metric)
    runs = f", mean of {len(scored)} cells" if len(scored) > 1 else f", n = {scored[0].get('n')}"
    return Markup(
        '<g class="cell"><title>{}: {}{}{}</title><rect class="h{}" {}/><text class="t{}" {}>{}</text></g>'
    ).format(where, shown, f" {spread}" if spread else "", runs, shade, box, shade, middle, shown)


def interval(score: Mapping[str, Any], metric: str = "") -> str:
    """`[93, 100]`, or nothing where a single batch gives no interval."""
    if score.get("low") is None or score.get("high") is None:
        return ""
    return f"[{_words.percent(score['low'], metric)}, {_words.percent(score['high'], metric)}]"


def legend(metric: str) -> Markup:
    """The scale from 0 to 100 (dB for PSNR), and what hatching means."""
    step = 9
    bars = Markup("").join(
        Markup('<rect class="h{}" x="{}" y="0" width="{}" height="12"/>').format(i, 24 + step * i, step + 0.5)
        for i in range(_palette.STEPS + 1)
    )
    end = 24 + step * (_palette.STEPS + 1)
    top = "40 dB" if metric == "psnr" else "100"
    return Markup(
        '<svg class="legend" viewBox="0 0 420 14" width="420" height="14" role="img" '
        'aria-label="colour scale from 0 to {0}; hatched cells have no score">'
        '<text class="ax" x="16" y="11" text-anchor="end">0</text>{1}<text class="ax" x="{2}" y="11">{0}</text>'
        '<g class="cell none"><rect x="{3}" y="0" width="22" height="12" rx="2"/></g>'
        '<text class="ax" x="{4}" y="11">no score</text></svg>'
    ).format(top, bars, end + 6, end + 58, end + 88)


def _cut(label: str, limit: int = 30) -> str:
    label = _words.visible(label)
    return label if len(label) <= limit else label[: limit - 1] + "…"
