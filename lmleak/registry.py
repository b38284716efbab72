"""kind -> file. A room's folder is its registry: file stem = `kind` in a recipe; `_private.py` files are not kinds.

Third parties add a kind without touching this tree by an entry point of group `lmleak.<room>`.
Listing reads docstrings with `ast`, so it imports nothing heavier than the standard library.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from lmleak.errors import LmleakError, did_you_mean

ROOMS = ("models", "data", "defenses", "attacks", "measures", "metrics")


def _folder(room: str) -> Path:
    if room not in ROOMS:
        raise LmleakError(f"no room '{room}'{did_you_mean(room, ROOMS)} (rooms: {', '.join(ROOMS)})")
    return Path(__file__).parent / room


def _third_party(room: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"lmleak.{room}")}


def kinds(room: str) -> tuple[str, ...]:
    """Names of a room's kinds, built-in ones first, each group in alphabetical order.

    Raises:
        LmleakError: no such room.
    """
    built_in = sorted(path.stem for path in _folder(room).glob("*.py") if not path.stem.startswith("_"))
    return (*built_in, *sorted(set(_third_party(room)) - set(built_in)))


@cache
def summary(room: str, kind: str) -> str:
    """First line of the kind's module docstring, read without importing the module.

    Raises:
        LmleakError: no such room or kind.
    """
    path = _folder(room) / f"{kind}.py"
    if not path.exists():
        point = _third_party(room).get(kind)
        # find_spec imports the parent package only, never the module itself.
        spec = point and importlib.util.find_spec(point.module)
        if not spec or not spec.origin:
            raise _unknown(room, kind)
        path = Path(spec.origin)
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.split("\n", 1)[0]


def load(room: str, kind: str) -> ModuleType:
    """Imports and returns the module behind `kind`.

    Raises:
        LmleakError: no such room or kind; the message lists the nearest one.
    """
    if (_folder(room) / f"{kind}.py").exists() and not kind.startswith("_"):
        return importlib.import_module(f"lmleak.{room}.{kind}")
    point = _third_party(room).get(kind)
    if point is None:
        raise _unknown(room, kind)
    return importlib.import_module(point.module)


def _unknown(room: str, kind: str) -> LmleakError:
    names = kinds(room)
    return LmleakError(f"no kind '{kind}' in {room}{did_you_mean(kind, names)} (there are: {', '.join(names)})")
