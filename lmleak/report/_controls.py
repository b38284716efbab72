"""Control cells beside the cells they control: their scores, and the gain, score minus control on the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmleak.report import _words
from lmleak.report._study import Place
from lmleak.runs.results import recovered

Gains = dict[str, dict[str, Any]]


def gains(cells: Sequence[Place]) -> dict[tuple[str, str], Gains]:
    """(run, cell) -> control -> `{cell, status, scores: {metric: {mean, low, high, n}}}`, for cells that have controls.

    A batch counts where the attack itself answered or ran out of budget. Its control counts by what came back, an
    answer, a best guess or nothing: an attack that refuses a gradient of another batch has recovered nothing from it.
    """
    found: dict[tuple[str, str], Gains] = {}
    own = {_key(place): place for place in cells if not place.control}
    for place in cells:
        base = own.get(_key(place))
        if place.control and place.control != "replay" and base is not None:
            gain = {"cell": place.cell, "status": place.status, "scores": _paired(base, place)}
            found.setdefault((base.run.name, base.cell), {})[place.control] = gain
    return found


def _key(place: Place) -> tuple[str, str]:
    return place.run.name, _words.key({k: v for k, v in place.setting.items() if k != "control"})


def _paired(base: Place, control: Place) -> dict[str, Any]:
    from lmleak import metrics

    mine, theirs = (place.run.batches.get(place.cell, {}) for place in (base, control))
    rows = [
        (a, b)
        for batch in sorted(mine.keys() & theirs.keys())
        if mine[batch]["status"] in ("ok", "budget_exhausted")
        and (a := recovered(mine[batch])) is not None
        and (b := recovered(theirs[batch])) is not None
    ]
    found = {}
    for name in dict.fromkeys(name for a, _ in rows for name in a):
        score = metrics.paired_difference([a.get(name) for a, _ in rows], [b.get(name) for _, b in rows])
        if score:
            found[name] = {"mean": score.mean, "low": score.low, "high": score.high, "n": score.n}
    return found


def replayed(line: Mapping[str, Any]) -> str:
    """`unexplained 2e-13, outside 3e-06`: an attack's own measures at the true input; empty where there are none."""
    values = {name: score.get("mean") for name, score in (line.get("replay") or {}).items()}
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items() if value is not None)


def table(cells: Sequence[Place], metric: str | None) -> list[tuple[Place, list[tuple[str, Place, Any]]]]:
    """For the page: each controlled cell with (control, its cell, its gain in `metric` or None)."""
    every = gains(cells)
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in cells:
        if place.control:
            groups.setdefault(_key(place), []).append(place)
    found = []
    for place in cells:
        own = groups.get(_key(place), []) if not place.control else []
        gain = every.get((place.run.name, place.cell), {})
        rows = [(c.control, c, gain.get(c.control, {}).get("scores", {}).get(metric)) for c in own]
        if rows:
            found.append((place, rows))
    return found
