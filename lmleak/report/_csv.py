"""The cells of one or more runs as a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from lmleak.report import _study
from lmleak.report._study import Place, Run

_RELEASE = (
    "noise_multiplier", "max_grad_norm", "clip_scope", "batch_size", "epsilon", "delta", "mu", "rdp_epsilon",
)  # fmt: skip
_TRAINING = ("steps", "sample_rate", "epsilon", "prv_epsilon", "rdp_epsilon", "accountant")


def table(runs: Sequence[Run]) -> str:
    """cells.csv: one row a cell; scores in 0..1 and measures with the ends of their intervals, and what is promised.

    `epsilon`, `mu` and `rdp_epsilon` are of the single release, `training.*` of the whole run it is a step of. Text
    cannot start a formula.
    """
    cells = _study.places(runs)
    axes = list(dict.fromkeys(axis for p in cells for axis in p.line.get("axes") or {}))
    metrics = _study.metrics(cells)
    head = ["run", "cell", "status", "reason", *axes, "share"]
    head += [f"{m}{end}" for m in metrics for end in ("", "_low", "_high", "_n", "_all")]
    head += ["attack_cpu_seconds", "total_seconds", *_RELEASE, *(f"training.{name}" for name in _TRAINING)]
    measures = _measures(cells)
    head += [f"{kind}.{name}{end}" for kind, name in measures for end in ("", "_low", "_high")]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_plain(name) for name in head)
    for p in cells:
        answers, every = p.line.get("scores") or {}, p.line.get("scores_all") or {}
        scores = [{**(answers.get(m) or {}), "all": (every.get(m) or {}).get("mean")} for m in metrics]
        time, privacy = p.line.get("seconds") or {}, p.line.get("privacy") or {}
        row = [p.run.name, p.cell, p.status, p.line.get("reason")]
        row += [_axis((p.line.get("axes") or {}).get(axis)) for axis in axes]
        row += [p.share, *(score.get(end) for score in scores for end in ("mean", "low", "high", "n", "all"))]
        row += [time.get("attack_cpu"), time.get("total"), *(privacy.get(name) for name in _RELEASE)]
        row += [(privacy.get("training") or {}).get(name) for name in _TRAINING]
        for kind, name in measures:
            value = _study.measured(p.line, kind, name) or {}
            row += [value.get(end) for end in ("mean", "low", "high")]
        rows.writerow(_plain(value) for value in row)
    return text.getvalue()


def _measures(cells: Sequence[Place]) -> list[tuple[str, str]]:
    """Every value of every measure that any cell has, of all that is observed together."""
    kinds = [item for p in cells for item in (p.line.get("measures") or {}).items()]
    return list(dict.fromkeys((kind, name) for kind, measured in kinds for name in measured["all"]))


def _axis(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A spreadsheet runs text that starts like a formula; a leading apostrophe keeps it text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
