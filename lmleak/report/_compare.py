"""The report's section on settings side by side: which figures there are, and what they are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmleak.report import _figures, _settings, _words
from lmleak.report._study import Place, Run

_METRICS = ("token_accuracy", "rouge1")  #: read against epsilon; the bound is one on naming a token in its place


def trained_of(runs: Sequence[Run], folders: Iterable[Path] = ()) -> Sequence[Mapping[str, Any]]:
    """What `lmleak utility` kept: of the named folders, else of those beside the runs that bear their recipes' names.

    Args:
        runs: run folders as read.
        folders: of `lmleak utility`.

    Returns:
        lines of `runs.utility.summary`.
    """
    from lmleak.runs.utility import read, summary

    places = list(folders) or [run.folder.resolve().parent / f"{run.recipe.get('name')}-utility" for run in runs]
    return summary([line for place in dict.fromkeys(places) for line in read(place)])


def section(cells: Sequence[Place], trained: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Values of `settings.html.j2`; None where no two settings of DP-SGD are there to be compared."""
    hues = _figures.colours(cells)
    main = next((m for m in _METRICS if any(p.score(m) or p.guess(m) for p in cells)), None)
    if main is None or len({_settings.noise(p) for p in cells if _settings.noise(p)}) < 2:
        return None
    shown = [m for m in _METRICS if any(_settings.level(p, m) for p in cells)]
    panels = {m: _settings.panels(cells, m) for m in shown}
    tokens = _settings.promised(cells)
    bound, near = _measure(cells, "reconstruction_bound"), _measure(cells, "dp_distinguishability")
    candidates = int(bound.get("candidates", 30_000))
    # Accuracy of a lopsided test flatters the commonest label.
    score = "mcc" if trained and trained[0]["majority"]["accuracy"] > 0.6 else "accuracy"
    chosen = _figures.choices(cells, trained, main, score)
    levels, rows = _figures.modules(cells, main)
    costs = _settings.costs(cells)
    return {
        "hues": hues,
        "batches": min(len(place.run.batches.get(place.cell, {})) for place in cells),
        "by_epsilon": [(m, _figures.by_epsilon(panels[m], hues, m, m == "token_accuracy")) for m in shown if panels[m]],
        "bounded": any(panel.bound for panel in panels.get("token_accuracy", ())),
        "distance": _figures.by_distance(tokens, hues, candidates),
        "substitutes": near.get("substitutes", 100),
        "candidates": candidates,
        "main": main,
        "map_levels": levels,
        "map_rows": rows,
        "pareto": _figures.pareto(chosen, main, score, trained[0]["majority"][score] if trained else 0.0),
        "chosen": chosen,
        "used": {"accuracy": "accuracy", "mcc": "MCC"}[score],
        "costs": costs,
        "parity": all(same.startswith("one") for *_, same in costs),
    }


def _measure(cells: Sequence[Place], kind: str) -> Mapping[str, Any]:
    """The fields of a measure as the first cell's recipe has them."""
    blocks = [block for place in cells[:1] for block in place.setting.get("measures") or () if _words.is_block(block)]
    return next((block for block in blocks if block["kind"] == kind), {})
