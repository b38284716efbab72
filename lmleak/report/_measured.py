"""What the measures of a study say, as columns beside the scores and as tables of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmleak.report import _words
from lmleak.report._study import Place, measured

ROWS = 200  #: modules listed of one setting; a whole large model has more


class Table(NamedTuple):
    """One measure over the settings of a study."""

    kind: str
    units: Mapping[str, str]  #: value -> what it is
    shown: Sequence[str]  #: its values
    settings: Sequence[tuple[Place, Sequence[str], str | None]]  #: all that is observed together; why there is none
    modules: Sequence[tuple[Place, Sequence[tuple[str, Sequence[str]]]]]


def columns(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The first value of every measure that any line has: its kind and name."""
    found: dict[str, str] = {}
    for line in lines:
        for kind, one in (line.get("measures") or {}).items():
            for name in list(one["all"])[:1]:
                found.setdefault(kind, name)
    return list(found.items())


def shown(line: Mapping[str, Any], kind: str, name: str) -> str:
    """`6.7 [5.1, 8]`, or a dash."""
    score = measured(line, kind, name)
    if not score or score["mean"] is None:
        return "–"
    ends = score["low"], score["high"]
    interval = "" if None in ends or ends[0] == ends[1] else f" [{_words.number(ends[0])}, {_words.number(ends[1])}]"
    return _words.number(score["mean"]) + interval


def tables(cells: Sequence[Place]) -> list[Table]:
    """One table a measure. Cells that differ in their attack alone share a line: measures know no attack."""
    kinds = dict.fromkeys(kind for place in cells for kind in place.line.get("measures") or {})
    made = []
    for kind in kinds:
        found: dict[tuple[str, ...], Place] = {}
        for place in cells:
            if kind in (place.line.get("measures") or {}):
                found.setdefault((place.run.name, place.component, place.layer, place.defense, place.other), place)
        settings = list(found.values())
        every = [place.line["measures"][kind] for place in settings]
        values = list(dict.fromkeys(name for one in every for name in one["all"]))
        made.append(
            Table(
                kind,
                _units(kind),
                values,
                [
                    (
                        place,
                        [shown(place.line, kind, name) for name in values],
                        one["reason"] if not one["all"] else None,
                    )
                    for place, one in zip(settings, every, strict=True)
                ],
                [
                    (place, [_row(name, row, values) for name, row in list(one["modules"].items())[:ROWS]])
                    for place, one in zip(settings, every, strict=True)
                    if len(one["modules"]) > 1
                ],
            )
        )
    return made


def _row(name: str, row: Mapping[str, float | None], values: Sequence[str]) -> tuple[str, list[str]]:
    return name, [_words.number(row.get(value)) for value in values]


def _units(kind: str) -> Mapping[str, str]:
    from lmleak import measures
    from lmleak.errors import LmleakError

    try:
        return measures.units(kind)
    except LmleakError:  # a run made with a package that is not installed here
        return {}
