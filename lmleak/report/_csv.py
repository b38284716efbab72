"""The cells of one or more runs as a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from lmleak.report import _study
from lmleak.report._study import Run


def table(runs: Sequence[Run]) -> str:
    """cells.csv: one row a cell; scores in 0..1 with the ends of their intervals. Text cannot start a formula."""
    cells = _study.places(runs)
    axes = list(dict.fromkeys(axis for p in cells for axis in p.line.get("axes") or {}))
    metrics = _study.metrics(cells)
    head = ["run", "cell", "status", "reason", *axes, "share"]
    head += [f"{m}{end}" for m in metrics for end in ("", "_low", "_high", "_n", "_all")]
    head += ["attack_cpu_seconds", "total_seconds", "epsilon", "delta"]
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
        row += [time.get("attack_cpu"), time.get("total"), privacy.get("epsilon"), privacy.get("delta")]
        rows.writerow(_plain(value) for value in row)
    return text.getvalue()


def _axis(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A spreadsheet runs text that starts like a formula; a leading apostrophe keeps it text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
