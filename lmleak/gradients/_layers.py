"""Block indices as a recipe writes them: `0`, `-1`, `3-5`, `"0,3-5"`, or a list of those."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmleak.errors import SelectionError

_ONE = re.compile(r"\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*")


def resolve(layers: int | str | Sequence[int | str], count: int) -> tuple[int, ...]:
    """Block indices meant by `layers` in a model of `count` blocks, ascending, each once.

    Args:
        layers: an int, a range `"3-5"` (both ends included), negatives counted from the end (`-1`, `"-3--1"`),
            several separated by commas (`"0,3-5"`), or a list of any of these.
        count: number of blocks of the model.

    Raises:
        SelectionError: not a layer, a range that runs backwards, out of range, or nothing at all.
    """
    if isinstance(layers, int | str):
        layers = [layers]
    if not isinstance(layers, Sequence) or not layers:
        raise SelectionError(f"layers: {layers!r} names no layer; leave the key out for all layers")
    found: set[int] = set()
    for item in layers:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise SelectionError(f"layers: {item!r} is not a layer: write 0, -1, '3-5' or '0,3-5'")
        for word in str(item).split(","):
            match = _ONE.fullmatch(word)
            if not match:
                raise SelectionError(f"layers: {word!r} is not a layer: write 0, -1, '3-5' or '0,3-5'")
            first = _index(int(match[1]), word, count)
            last = first if match[2] is None else _index(int(match[2]), word, count)
            if last < first:
                raise SelectionError(f"layers: '{word}' runs backwards; did you mean '{last}-{first}'?")
            found.update(range(first, last + 1))
    return tuple(sorted(found))


def _index(index: int, word: str, count: int) -> int:
    if not -count <= index < count:
        what = f"'{word.strip()}': layer {index}" if word.strip() != str(index) else f"layer {index}"
        there = f"the model has {count} layers, 0 to {count - 1} (or -1 to -{count})"
        raise SelectionError(f"layers: {what} is out of range: {there}")
    return index % count
