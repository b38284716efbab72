"""Cell lines as a table on stdout: drawn by rich on a terminal, tab-free aligned text elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from lmleak.runs.progress import safe

_REASON = 60  #: characters of a reason that a table has room for; the JSON lines and the report have all of it


def show(lines: Iterable[Mapping[str, Any]], title: str = "", file: IO[str] | None = None) -> None:
    """Prints one row a cell: axes, share observed, scores with 95 % intervals, epsilon, CPU seconds a batch, status.

    Args:
        lines: as `cell_lines` returns them.
        title: stands above.
        file: stdout by default.
    """
    out = file or sys.stdout
    head, rows = table(list(lines))
    if out.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title or None, title_justify="left")
        for name in head:
            drawn.add_column(Text(name))
        for row in rows:
            drawn.add_row(*map(Text, row))
        Console(file=out).print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if title:
        print(title, file=out)
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)


def table(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text; columns that are empty everywhere are left out."""
    axes = list(dict.fromkeys(axis for line in lines for axis in line["axes"]))
    metrics = list(dict.fromkeys(name for line in lines for name in line["scores"] or {}))
    head = [*axes, "share", *metrics, "epsilon", "cpu s", "status"]
    rows = [
        [
            *(_value(line["axes"].get(axis)) for axis in axes),
            f"{line['select']['share']:.2%}" if line.get("select") else "",
            *(_score((line["scores"] or {}).get(name)) for name in metrics),
            f"{line['privacy']['epsilon']:.4g}" if (line.get("privacy") or {}).get("epsilon") is not None else "",
            f"{line['seconds']['attack_cpu']:.2f}" if line["seconds"].get("attack_cpu") is not None else "",
            _status(line),
        ]
        for line in lines
    ]
    kept = [i for i, name in enumerate(head) if name == "status" or any(row[i] for row in rows)]
    return [head[i] for i in kept], [[safe(row[i]) for i in kept] for row in rows]


def _value(value: Any) -> str:
    if isinstance(value, Mapping) and "kind" in value:
        rest = ", ".join(f"{key}={_value(item)}" for key, item in value.items() if key != "kind")
        return f"{value['kind']}({rest})" if rest else str(value["kind"])
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(map(_value, value))
    return "" if value is None else json.dumps(value)


def _score(score: Mapping[str, Any] | None) -> str:
    if not score or score["mean"] is None:
        return ""
    if score["low"] is None:
        return f"{score['mean']:.3f}"
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _status(line: Mapping[str, Any]) -> str:
    reason = line.get("reason")
    if not reason:
        return str(line["status"])
    return f"{line['status']}: {reason if len(reason) <= _REASON else reason[: _REASON - 3] + '...'}"
