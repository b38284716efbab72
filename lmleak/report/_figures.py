"""The figures of a comparison of settings: against epsilon, against what a setting costs, and against d'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lmleak.report import _palette, _settings, _words
from lmleak.report._plane import BOTTOM, LEFT, PERCENT, RIGHT, TOP, Plane, logarithmic, powers, straight, upwards
from lmleak.report._settings import Panel, Tokens
from lmleak.report._study import Place

_COLOURS = len(_palette.SERIES_LIGHT)
_SMALL = (330.0, 232.0)
_LARGE = (640.0, 330.0)
_STRONG = 10.0  #: an epsilon up to here is what practice calls strong to moderate


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    title: str
    svg: Markup


def colours(cells: Sequence[Place]) -> dict[str, int]:
    """The colour of each attack, the same in every figure."""
    return {name: i % _COLOURS for i, name in enumerate(dict.fromkeys(p.attack for p in cells))}


def by_epsilon(panels: Sequence[Panel], hues: Mapping[str, int], metric: str, bounded: bool) -> list[Figure]:
    """Score against epsilon of one release, one figure a panel, on the same axes."""
    known = [p.epsilon for panel in panels for points in panel.attacks.values() for p in points if p.epsilon]
    if not known:
        return []
    low, high = min(min(known), _STRONG / 3), max(max(known), 10 * min(known))
    width, height = _SMALL
    open_end = width - RIGHT - 14
    made = []
    for panel in panels:
        plane = Plane(width, height, logarithmic(low, high, LEFT + 12, open_end - 34), upwards(height))
        plane.band(LEFT, plane.x(_STRONG), "")
        plane.grid(PERCENT)
        plane.below(powers(low, high), "ε of one release, δ as stated")
        plane.text(open_end, height - BOTTOM + 17, "none", "middle")
        if bounded:
            plane.line([(plane.x(e), plane.y(b)) for e, b in panel.bound], "bound")
        for name, points in panel.attacks.items():
            shift = 3.0 * (hues[name] - (len(hues) - 1) / 2)
            spots = [(shift + (open_end if p.epsilon is None else plane.x(p.epsilon)), p) for p in points]
            plane.line([(x, plane.y(p.score)) for x, p in spots if p.epsilon is not None], f"s{hues[name]}")
            last = [(x, plane.y(p.score)) for x, p in spots[-2:]]
            if points[-1].epsilon is None:
                plane.line(last, f"broken s{hues[name]}")
            for x, p in spots:
                where = "no defense" if p.epsilon is None else f"ε {_words.number(p.epsilon)}"
                plane.point(x, plane.y(p.score), hues[name], f"{name}, {where}: {_told(p.score, p.ends)}", p.ends)
        made.append(Figure(panel.title, plane.svg(f"{_words.metric_name(metric)} against epsilon, {panel.title}")))
    return made


def _told(score: float, ends: tuple[float, float] | None) -> str:
    spread = f" [{_words.percent(ends[0])}, {_words.percent(ends[1])}]" if ends else ""
    return _words.percent(score) + spread


def by_distance(tokens: Mapping[str, Sequence[Tokens]], hues: Mapping[str, int], candidates: int) -> Figure | None:
    """Tokens recovered against their own d', with what the best test among as many equidistant ones would do."""
    from lmleak.measures._bound import equidistant_success

    known = [one.d for rows in tokens.values() for one in rows]
    if not known:
        return None
    low, high = max(min(*known, 0.3), 0.01), max(*known, 30.0)
    width, height = _LARGE
    plane = Plane(width, height, logarithmic(low, high, LEFT + 14, width - RIGHT - 14), upwards(height))
    plane.grid(PERCENT)
    plane.below(
        sorted([*(t for t in powers(low, high) if t[0] != 10), (7.0, "7")]),
        "d' of a token against its nearest substitute, noise standard deviations",
    )
    steps = [low * (high / low) ** (i / 80) for i in range(81)]
    plane.line([(plane.x(d), plane.y(equidistant_success(d, candidates, 1 / candidates))) for d in steps], "bound")
    plane.upright(plane.x(7.0), "mark")
    for name, rows in tokens.items():
        shift = 3.0 * (hues[name] - (len(hues) - 1) / 2)
        spots = [(plane.x(one.d) + shift, plane.y(one.hits / one.count)) for one in rows]
        plane.line(spots, f"s{hues[name]}")
        for (x, y), one in zip(spots, rows, strict=True):
            ends = wilson(one.hits, one.count)
            plane.point(
                x, y, hues[name], f"{name}, d' about {_words.number(one.d)}: {one.hits} of {one.count} tokens", ends
            )
    return Figure("", plane.svg("tokens recovered against their d'"))


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    share, rest = hits / count, z * z / count
    middle = (share + rest / 2) / (1 + rest)
    half = z * math.sqrt(share * (1 - share) / count + rest / (4 * count)) / (1 + rest)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class Choice:
    """A defense with both of its sides."""

    label: str
    utility: Mapping[str, float]  #: mean, low, high over seeds
    leak: Mapping[str, Any]
    attack: str
    best: bool  #: no other defense is better on both sides


def choices(cells: Sequence[Place], trained: Sequence[Mapping[str, Any]], metric: str, score: str) -> list[Choice]:
    """Defenses that were both attacked and trained under: the most that any attack read, beside what is left of use."""
    found = []
    for line in trained:
        same = [p for p in cells if strength(_defense(p)) == strength(_trained_under(line))]
        levels = [(level, p) for p in same if (level := _settings.level(p, metric))]
        if levels:
            worst, place = max(levels, key=lambda pair: pair[0]["mean"])
            found.append((place.defense, line[score], worst, place.attack))
    return [
        Choice(label, use, leak, attack, not any(_beats(other, (use, leak)) for other in found))
        for label, use, leak, attack in found
    ]


def _beats(other: tuple[str, Any, Any, str], one: tuple[Any, Any]) -> bool:
    more, less = other[1]["mean"] - one[0]["mean"], one[1]["mean"] - other[2]["mean"]
    return more >= 0 and less >= 0 and more + less > 0


def _defense(place: Place) -> Mapping[str, Any]:
    return place.setting.get("defense") or {"kind": "none"}


def _trained_under(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The defense with its noise, where it was calculated from an epsilon."""
    from lmleak.defenses import dp_sgd

    defense = line["defense"]
    if defense.get("kind") != "dp_sgd" or defense.get("noise_multiplier") is not None:
        return defense
    config = dp_sgd.Config(**{name: value for name, value in defense.items() if name != "kind"})
    return {**defense, "noise_multiplier": dp_sgd.sigma(config)}


def strength(defense: Mapping[str, Any]) -> str:
    """What must agree for a release and a training run to be under one defense: not what only the accounting knows."""
    apart = ("clip_scope", "delta", "sample_rate", "steps", "epsilon")
    kept = {k: v for k, v in defense.items() if v is not None and not (defense.get("kind") == "dp_sgd" and k in apart)}
    return _words.key(kept)


def pareto(found: Sequence[Choice], metric: str, score: str, majority: float) -> Figure | None:
    """Leakage against utility: right and low is good."""
    if len(found) < 2:
        return None
    width, height = _LARGE
    ends = [float(c.utility[end]) for c in found for end in ("low", "high")] + [majority]
    low, high = min(ends) - 0.02, max(ends) + 0.02
    plane = Plane(width, height, straight(low, high, LEFT, width - RIGHT), upwards(height))
    plane.grid(PERCENT)
    name = "accuracy" if score == "accuracy" else "MCC"
    step = 0.05 if high - low < 0.4 else 0.1
    ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    plane.below([(t, f"{100 * t:.0f}") for t in ticks], f"{name} of a model trained under it, percent")
    plane.upright(plane.x(majority), "mark")
    plane.text(plane.x(majority) + 5, TOP + 12, "always the commonest label", "start", dim=True)
    front = sorted((c for c in found if c.best), key=lambda c: c.utility["mean"])
    plane.line([(plane.x(c.utility["mean"]), plane.y(c.leak["mean"])) for c in front], "front")
    for c in found:
        x, y = plane.x(c.utility["mean"]), plane.y(c.leak["mean"])
        plane.line([(plane.x(c.utility["low"]), y), (plane.x(c.utility["high"]), y)], "bar s0")
        spread = (c.leak["low"], c.leak["high"]) if c.leak.get("low") is not None else None
        told = (
            f"{c.label}: {name} {_words.percent(c.utility['mean'])}, {c.attack} reads {_words.percent(c.leak['mean'])}"
        )
        plane.point(x, y, 0 if c.best else 5, told, spread)
        right = x > width - 150
        plane.text(x + (-8 if right else 8), y - 7, c.label, "end" if right else "start")
    return Figure("", plane.svg(f"{_words.metric_name(metric)} against {name}"))


def modules(cells: Sequence[Place], metric: str) -> tuple[list[str], list[tuple[str, list[dict[str, Any]]]]]:
    """Rows: what is observed and the clip scope; columns: noise; in each cell d' and what the best attack read."""
    noised = [p for p in cells if _settings.noise(p)]
    levels = sorted({float(_settings.noise(p) or 0) for p in noised})
    rows: dict[str, list[dict[str, Any]]] = {}
    names = dict.fromkeys((_settings.observed(p), _settings.scope(p)) for p in noised)
    for what, scope in names:
        row = []
        for sigma in levels:
            here = [
                p for p in noised
                if (_settings.observed(p), _settings.scope(p)) == (what, scope) and _settings.noise(p) == sigma
            ]  # fmt: skip
            scored = [(level, p) for p in here if (level := _settings.level(p, metric))]
            best = max(scored, key=lambda pair: pair[0]["mean"], default=None)
            measured = [p.line["measures"]["dp_distinguishability"]["all"] for p in here
                        if "dp_distinguishability" in (p.line.get("measures") or {})]  # fmt: skip
            d = next((m["token_nearest"]["mean"] for m in measured if m), None)
            row.append(
                {
                    "d": _words.number(d),
                    "score": _words.percent(best[0]["mean"], metric) if best else "–",
                    "shade": _palette.shade(best[0]["mean"]) if best else 0,
                    "attack": best[1].attack if best else "",
                    "n": best[0]["n"] if best else 0,
                }
            )
        rows[f"{what}, clipped by the {scope}'s norm"] = row
    return [_words.number(level) for level in levels], list(rows.items())
