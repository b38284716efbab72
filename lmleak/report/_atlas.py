"""The atlas: attack and measures of every module side by side, their rank correlation, and what may be shared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from lmleak.report import _grade, _heat, _palette, _study, _words
from lmleak.report._study import Place

LEAST = 6  #: modules below which a rank correlation says nothing
_ROW, _STEP = 30, 46


class Map(NamedTuple):
    """One value over components and layers, shaded between its least and its largest."""

    title: str
    about: str
    svg: Markup


class Link(NamedTuple):
    """Spearman's rank correlation of a measure with the attack's score over modules, with a 95 % bootstrap interval."""

    measure: str
    rho: float
    low: float
    high: float
    modules: int


class Verdict(NamedTuple):
    """One module's line of the answer."""

    place: Place
    word: str  #: a class of the page's style
    text: str
    values: Sequence[str]


Reader = Callable[[Place], float | None]


def readers(cells: Sequence[Place]) -> dict[str, Reader]:
    """First value of every measure that any cell has, as `kind: value`."""
    found: dict[str, Reader] = {}
    for place in cells:
        for kind, measured in (place.line.get("measures") or {}).items():
            for name in list(measured["all"])[:1]:
                found.setdefault(f"{kind}: {name}" if name != kind else kind, _reader(kind, name))
    return found


def _reader(kind: str, name: str) -> Reader:
    def read(place: Place) -> float | None:
        score = _study.measured(place.line, kind, name)
        return score["mean"] if score else None

    return read


def _modules(cells: Sequence[Place], metric: str | None) -> list[Place]:
    """Of several attacks on the same modules the one that read most: what may be shared hangs on the best of them."""
    found: dict[tuple[str, ...], Place] = {}
    for place in cells:
        key = (place.component, place.layer, place.defense, place.other, place.seed)
        if key not in found or _worth(place, metric) > _worth(found[key], metric):
            found[key] = place
    return list(found.values())


def _worth(place: Place, metric: str | None) -> float:
    level = _attack(metric)(place) if metric else None
    return -math.inf if metric is None or level is None else _grade.worth(metric, level)


def maps(cells: Sequence[Place], metric: str | None) -> list[Map]:
    """The attack's map and every measure's, where several modules were measured; nothing else is an atlas."""
    several = len({place.attack for place in cells}) > 1
    cells = _modules([place for place in cells if not place.defended] or cells, metric)
    measured = readers(cells)
    if not measured or len({(place.component, place.layer) for place in cells}) < 2:
        return []
    drawn: dict[str, tuple[Reader, Callable[[float], str]]] = {}
    if metric:
        drawn[f"{'best attack' if several else 'attack'}: {_words.metric_name(metric)}"] = (
            _attack(metric),
            lambda v: _words.percent(v, metric),
        )
    drawn |= {name: (read, _brief) for name, read in measured.items()}
    return [Map(name, _range(cells, read, show), _svg(cells, name, read, show)) for name, (read, show) in drawn.items()]


def _attack(metric: str) -> Reader:
    def read(place: Place) -> float | None:
        score = place.score(metric) or place.guess(metric)
        return float(score["mean"]) if score else None

    return read


def _brief(value: float) -> str:
    """Two digits, so that a square holds them: `0.85`, `1.8`, `4e-5`."""
    return f"{value:.2g}" if abs(value) >= 1e-2 or not value else f"{value:.0e}".replace("e-0", "e-")


def _range(cells: Sequence[Place], read: Reader, show: Callable[[float], str]) -> str:
    known = [value for place in cells if (value := read(place)) is not None]
    return f"{show(min(known))} to {show(max(known))}" if known else "no value"


def _svg(cells: Sequence[Place], name: str, read: Reader, show: Callable[[float], str]) -> Markup:
    rows, columns = _study.ordered(cells, "component"), _study.ordered(cells, "layer")
    at: dict[tuple[str, str], list[float]] = {}
    for place in cells:
        value = read(place)
        if value is not None and math.isfinite(value):
            at.setdefault((place.component, place.layer), []).append(value)
    means = {key: sum(values) / len(values) for key, values in at.items()}
    low, high = (min(means.values()), max(means.values())) if means else (0.0, 1.0)
    # Norms span decades: shaded straight, all but the largest would look alike.
    grade = math.log if low > 0 and high > 100 * low else float
    left = 16 + 6.6 * max(map(len, rows))
    parts = []
    for j, column in enumerate(columns):
        parts.append(
            Markup('<text class="ax" x="{:.0f}" y="14" text-anchor="middle">{}</text>').format(
                left + _STEP * (j + 0.5), column
            )
        )
    for i, row in enumerate(rows):
        y = 22 + _ROW * i
        parts.append(
            Markup('<text class="ax" x="{:.0f}" y="{:.0f}" text-anchor="end">{}</text>').format(
                left - 8, y + _ROW / 2 + 3, row
            )
        )
        for j, column in enumerate(columns):
            if (row, column) in means:
                value = means[row, column]
                span = grade(high) - grade(low)
                shade = _palette.shade((grade(value) - grade(low)) / span if span else 0.5)
                parts.append(_square(left + _STEP * j, y, shade, show(value), f"{row}, layer {column}: {show(value)}"))
    width, height = left + _STEP * len(columns) + 2, 24 + _ROW * len(rows)
    return Markup(
        '<svg class="map" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" role="img" '
        'aria-label="{2} by component and layer">{3}</svg>'
    ).format(width, height, name, Markup("").join(parts))


def _square(x: float, y: float, shade: int, text: str, title: str) -> Markup:
    box = Markup('x="{:.0f}" y="{:.0f}" width="{}" height="{}" rx="3"').format(x, y, _STEP - 2, _ROW - 2)
    return _heat._drawn("cell", title, f"h{shade}", box, _heat._lines(x, y, _STEP - 2, _ROW - 2, (text,), f"t{shade}"))


def links(cells: Sequence[Place], metric: str | None) -> list[Link]:
    """How far each measure foretells the attack: over the undefended modules that the attack applies to."""
    if not metric:
        return []
    cells = _modules([place for place in cells if not place.defended], metric)
    score = _attack(metric)
    found = []
    for name, read in readers(cells).items():
        pairs = np.array(
            [(a, b) for place in cells if (a := read(place)) is not None and (b := score(place)) is not None]
        )
        if len(pairs) >= LEAST and np.ptp(pairs, axis=0).all():
            found.append(Link(name, *spearman(pairs[:, 0], pairs[:, 1]), len(pairs)))
    return sorted(found, key=lambda link: -abs(link.rho))


def spearman(a: np.ndarray, b: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """Rank correlation and its 95 % percentile interval over resampled pairs."""
    from scipy.stats import rankdata

    def rho(x: np.ndarray, y: np.ndarray) -> float:
        x, y = rankdata(x), rankdata(y)
        return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else math.nan

    draw = np.random.default_rng(0)
    picks = draw.integers(len(a), size=(draws, len(a)))
    resampled = [value for pick in picks if not math.isnan(value := rho(a[pick], b[pick]))]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return rho(a, b), float(low), float(high)


def verdicts(cells: Sequence[Place], metric: str | None) -> list[Verdict]:
    """Modules from the most to the least that was found in them."""
    cells = _modules([place for place in cells if not place.defended], metric)
    if not metric or not readers(cells):
        return []
    score, measured = _attack(metric), readers(cells)

    def order(place: Place) -> tuple[float, float]:
        return -_worth(place, metric), -(_information(place) or (0.0, 0.0))[0]

    return [
        Verdict(place, *_word(place, metric, score(place)), [_words.number(read(place)) for read in measured.values()])
        for place in sorted(cells, key=order)
    ]


def _word(place: Place, metric: str, level: float | None) -> tuple[str, str]:
    told = _information(place)
    if level is not None and _grade.recovered(metric, level):
        return "failed", "no: an attack reads it"
    if told and told[0] > 0:
        return "bad", "no: no attack here read it, but its gradient tells of the data"
    if level is not None:
        return "", "nothing was found; that is no proof"
    return "", f"unknown: {_words.STATUSES.get(place.status, place.status)}"


def _information(place: Place) -> tuple[float, float] | None:
    """How far the lower end of usable information's interval is above its null's upper end, and the information."""
    names = ("low", "null_high", "usable_information")
    values = [(_study.measured(place.line, "usable_information", name) or {}).get("mean") for name in names]
    if values[0] is None or values[2] is None:
        return None
    return values[0] - max(values[1] or 0.0, 0.0), values[2]


def threat(cells: Sequence[Place]) -> str:
    """Under which threat model the answer holds."""
    knowledge = cells[0].setting.get("knowledge") or {}
    granted = [name for name, value in knowledge.items() if value is True]
    sizes = sorted({place.batch_size for place in cells})
    return (
        "The attacker sees one of these modules' gradients of one batch and knows the weights, the tokenizer or image "
        f"format, the batch size ({', '.join(map(str, sizes))})"
        + (f" and {', '.join(granted)}" if granted else "")
        + "; the measures are told by someone with data of the same kind."
    )
