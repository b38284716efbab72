"""`dotted.key=value` from the command line, put into a recipe before it is validated."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

from lmleak.config.recipe import BLOCKS, FIELDS
from lmleak.config.schema import short
from lmleak.config.source import Key, Source, dotted, parse
from lmleak.errors import RecipeError, did_you_mean


class Override(NamedTuple):
    key: tuple[str, ...]
    value: Any
    place: str


def apply(source: Source, overrides: Iterable[str]) -> Source:
    """Returns `source` with the overrides in it and their places known.

    An override of a swept field pins it: that axis leaves the sweep. Order does not matter, so a field given twice is
    an error, and `attack.kind=` is put in before `attack.steps=`.

    Raises:
        RecipeError: every override that cannot take effect.
    """
    given, problems = _read(overrides)
    data, places = copy.deepcopy(source.value), dict(source.places)
    for override in sorted(given, key=lambda one: (len(one.key), one.key[-1] != "kind")):
        if override.key[0] == "sweep" and len(override.key) > 1:
            key, fault = _put_axis(data, override)
        else:
            key, fault = override.key, _pin(data, override) or put(data, override.key, override.value)
        if fault:
            problems.append(f"{override.place}: {dotted(override.key)}: {fault}")
            continue
        places = {old: place for old, place in places.items() if old[: len(key)] != key}
        places[key] = override.place
    if problems:
        raise RecipeError(problems)
    return Source(source.name, data, places)


def put(data: dict[str, Any], key: tuple[str, ...], value: Any) -> str | None:
    """Sets `key` in nested mappings, in place. Another `kind` drops the fields of the kind before it.

    Returns:
        what is wrong, or None.
    """
    node = data
    for i, part in enumerate(key[:-1]):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return f"'{dotted(key[: i + 1])}' holds {short(node)}, which has no field '{key[i + 1]}'"
    if len(key) == 2 and key[0] in BLOCKS and key[1] == "kind" and node.get("kind") != value:
        node.clear()
    node[key[-1]] = value
    return None


def _read(overrides: Iterable[str]) -> tuple[list[Override], list[str]]:
    given: dict[tuple[str, ...], Override] = {}
    problems: list[str] = []
    for text in overrides:
        place = f"override '{text}'"
        name, equals, value = text.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or not all(key):
            problems.append(f"{place}: not of the form dotted.key=value")
        elif key in given:
            problems.append(f"{place}: {name}: already given by {given[key].place}")
        elif key[0] not in FIELDS:
            near = did_you_mean(key[0], FIELDS) or f" (keys: {', '.join(FIELDS)})"
            problems.append(f"{place}: {name}: unknown key{near}")
        else:
            try:
                given[key] = Override(key, parse(value, place, only_place=place).value, place)
            except RecipeError as error:
                problems += error.problems
    return list(given.values()), problems


def _pin(data: dict[str, Any], override: Override) -> str | None:
    """Takes the axes that `override` fixes out of the sweep; it must be felt in at least one product."""
    sweep = data.get("sweep")
    products = [product for product in (sweep if isinstance(sweep, list) else [sweep]) if isinstance(product, dict)]
    above = {tuple(override.key[:end]) for end in range(1, len(override.key))}
    hidden = [[axis for axis in product if tuple(axis.split(".")) in above] for product in products]
    if products and all(hidden):
        axis = hidden[0][0]
        return f"the sweep sets the whole of '{axis}', so this would have no effect; override sweep.{axis}"
    for product in products:
        for axis in [axis for axis in product if tuple(axis.split("."))[: len(override.key)] == override.key]:
            del product[axis]
    return None


def _put_axis(data: dict[str, Any], override: Override) -> tuple[Key, str | None]:
    """`sweep.select.layers=[[0]]` or, in a list of products, `sweep.1.select.layers=[[0]]`."""
    sweep = data.setdefault("sweep", {})
    key: Key = ("sweep",)
    rest = override.key[1:]
    if isinstance(sweep, list):
        if not rest[0].isdecimal() or int(rest[0]) >= len(sweep) or len(rest) < 2:
            return (), f"this sweep is a list: write sweep.N.field with N from 0 to {len(sweep) - 1}"
        product, key, rest = sweep[int(rest[0])], (*key, int(rest[0])), rest[1:]
    else:
        product = sweep
    if not isinstance(product, dict):
        return (), f"'{dotted(key)}' is not a mapping of fields to lists"
    product[dotted(rest)] = override.value
    return (*key, dotted(rest)), None
