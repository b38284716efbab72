"""Settings of a study side by side: what attacks read by epsilon, by module and d', and what each setting costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmleak.report import _words
from lmleak.report._study import Place, measured
from lmleak.runs.results import recovered


@dataclass(frozen=True)
class Point:
    """One attack under one setting."""

    place: Place
    epsilon: float | None  #: None: nothing is promised
    score: float
    ends: tuple[float, float] | None  #: of the score, from the paired difference to no defense where there is one


@dataclass(frozen=True)
class Panel:
    """What was observed, under one clip scope: each attack's points, the undefended one last."""

    title: str
    attacks: Mapping[str, Sequence[Point]]
    bound: Sequence[tuple[float, float]]  #: (epsilon, success that no attack exceeds)


def noise(place: Place) -> float | None:
    """Noise multiplier of DP-SGD; None for another defense."""
    return (place.line.get("privacy") or {}).get("noise_multiplier")


def scope(place: Place) -> str:
    """What is clipped, as a setting's name has it."""
    return str((place.line.get("privacy") or {}).get("clip_scope", ""))


def observed(place: Place) -> str:
    """The selection in words: components and layers."""
    layer = f", layer {place.layer}" if place.layer not in ("", "all") else ""
    return f"{place.component}{layer}" + (f" · {place.other}" if place.other else "")


def panels(cells: Sequence[Place], metric: str) -> list[Panel]:
    """One for each selection and clip scope that was noised at two levels or more."""
    plain = {(observed(p), p.attack): p for p in cells if not p.defended}
    groups: dict[tuple[str, str], dict[str, list[Point]]] = {}
    bounds: dict[tuple[str, str], dict[float, float]] = {}
    for place in cells:
        epsilon = (place.line.get("privacy") or {}).get("epsilon")
        score = level(place, metric)
        if not noise(place) or epsilon is None or score is None:
            continue
        key = observed(place), scope(place)
        base = plain.get((observed(place), place.attack))
        point = Point(place, epsilon, score["mean"], _ends(place, base, metric, score))
        groups.setdefault(key, {}).setdefault(place.attack, []).append(point)
        found = measured(place.line, "reconstruction_bound", "here")
        if found and found["mean"] is not None:
            bounds.setdefault(key, {})[epsilon] = found["mean"]
    made = []
    for key, attacks in groups.items():
        if len({point.epsilon for points in attacks.values() for point in points}) < 2:
            continue
        for name, points in attacks.items():
            points.sort(key=lambda point: point.epsilon or 0.0)
            base = plain.get((key[0], name))
            score = level(base, metric) if base else None
            if base and score:
                points.append(Point(base, None, score["mean"], _ends(base, None, metric, score)))
        several = len({scope for name, scope in groups if name == key[0]}) > 1
        title = key[0] + (f", clipped by the {key[1]}'s norm" if several else "")
        made.append(Panel(title, attacks, sorted(bounds.get(key, {}).items())))
    return made


def level(place: Place, metric: str) -> Mapping[str, Any] | None:
    """Mean over every attacked batch, a best guess or nothing where there is no answer: a refusal has read nothing."""
    rows = place.run.batches.get(place.cell, {}).values()
    values = [
        (recovered(row) or {}).get(metric, 0.0) for row in rows if row["status"] not in ("failed", "not_applicable")
    ]
    if not values:
        return None
    from lmleak.metrics import summarise

    made = summarise(values)
    return {"mean": made.mean, "low": made.low, "high": made.high, "n": made.n} if made else None


def _ends(place: Place, base: Place | None, metric: str, score: Mapping[str, Any]) -> tuple[float, float] | None:
    if base is not None:
        from lmleak import metrics

        mine, theirs = (one.run.batches.get(one.cell, {}) for one in (place, base))
        pairs = [
            ((recovered(mine[i]) or {}).get(metric), (recovered(theirs[i]) or {}).get(metric))
            for i in sorted(mine.keys() & theirs.keys())
            if "failed" not in (mine[i]["status"], theirs[i]["status"])
        ]
        both = [(a or 0.0, b) for a, b in pairs if b is not None]
        made = metrics.paired_difference([a for a, _ in both], [b for _, b in both]) if both else None
        if made and made.low is not None and made.high is not None:
            middle = sum(b for _, b in both) / len(both)
            return middle + made.low, middle + made.high
    low, high = score.get("low"), score.get("high")
    return (low, high) if low is not None and high is not None else None


@dataclass(frozen=True)
class Tokens:
    """Tokens of like d' under one attack: how many, and how many of them came back in place."""

    d: float  #: geometric mean
    count: int
    hits: int


EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 14.0, 30.0, 60.0)  #: of d'; 0.5 is as good as blind, 7 is readable


def promised(cells: Sequence[Place]) -> dict[str, list[Tokens]]:
    """For each attack the tokens of all its cells by their own d': single sentences whose tokens were measured."""
    found: dict[str, dict[int, list[tuple[float, bool]]]] = {}
    for place in cells:
        texts = place.run.examples.get(place.cell, {})
        for batch, row in place.run.batches.get(place.cell, {}).items():
            details = ((row.get("measures") or {}).get("dp_distinguishability") or {}).get("details") or {}
            truth = (texts.get(batch) or {}).get("reference", {}).get("tokens") or []
            if row["status"] in ("failed", "not_applicable") or len(truth) != 1 or not details.get("tokens"):
                continue
            answer = ((texts[batch]["reconstruction"]["tokens"] or [[]])[0]) if batch in texts else []
            for i, (token, d) in enumerate(zip(truth[0], details["tokens"][0], strict=False)):
                bin_ = sum(d > edge for edge in EDGES[1:])
                hit = i < len(answer) and answer[i] == token
                found.setdefault(place.attack, {}).setdefault(bin_, []).append((d, hit))
    return {
        attack: [
            Tokens(_middle([d for d, _ in rows]), len(rows), sum(hit for _, hit in rows))
            for _, rows in sorted(bins.items())
        ]
        for attack, bins in found.items()
    }


def _middle(values: Sequence[float]) -> float:
    import math

    return math.exp(sum(math.log(max(value, 1e-3)) for value in values) / len(values))


def costs(cells: Sequence[Place]) -> list[tuple[str, str, str, str]]:
    """Each attack, its CPU seconds a batch (least to most over settings), its evaluations, and whether its settings
    were the same under every defense."""
    rows = []
    for name in dict.fromkeys(p.attack for p in cells):
        own = [p for p in cells if p.attack == name]
        times = [p.seconds for p in own if p.seconds is not None]
        spent = [
            row["details"]["evaluations"]
            for p in own
            for row in p.run.batches.get(p.cell, {}).values()
            if isinstance((row.get("details") or {}).get("evaluations"), (int, float))
        ]
        blocks = {_words.key(p.setting.get("attack") or {}) for p in own}
        span = f"{_words.cpu(min(times))} to {_words.cpu(max(times))}" if times else "–"
        work = f"{_words.number(min(spent))} to {_words.number(max(spent))}" if spent else "–"
        same = "one, under every setting" if len(blocks) == 1 else f"{len(blocks)} different"
        rows.append((name, span, work, same))
    return rows
