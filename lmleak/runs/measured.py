"""What a cell's measures say over its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ALL = "*"  #: a measure's row of everything that is observed together


def over_batches(units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"measures": {kind: {"reason", "all", "modules"}}}` of a cell's result lines; nothing where none was measured.

    `modules` are means; `all`, what is observed together, has 95 % intervals like a score.
    """
    batches = [line["measures"] for line in units if line.get("measures")]
    found = {}
    for kind in dict.fromkeys(kind for batch in batches for kind in batch):
        every = [batch[kind] for batch in batches if kind in batch]
        tables = [one["rows"] for one in every if one["rows"]]
        reason = next((one["reason"] for one in every if not one["rows"]), None)
        found[kind] = {
            "reason": reason,
            "all": {name: _score(numbers) for name, numbers in _columns(tables, _ALL).items()},
            "modules": {
                row: {name: _mean(numbers) for name, numbers in _columns(tables, row).items()}
                for row in (tables[0] if tables else ())
                if row != _ALL
            },
        }
    return {"measures": found} if found else {}


def _columns(tables: Sequence[Mapping[str, Any]], row: str) -> dict[str, list[float | None]]:
    return {name: [table[row][name] for table in tables] for name in tables[0][row]} if tables else {}


def _score(numbers: Sequence[float | None]) -> dict[str, Any]:
    from lmleak.metrics import summarise

    made = summarise(numbers)
    if made is None:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {"mean": made.mean, "low": made.low, "high": made.high, "n": made.n}


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None
