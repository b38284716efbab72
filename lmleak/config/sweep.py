"""A recipe's sweep -> its cells. A cell is the unit of work, of resume and of result."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmleak.config.overrides import put
from lmleak.config.recipe import CELL_FIELDS, Recipe, digest, expand, resolve
from lmleak.config.schema import ROOM_OF, Problem, compact, short
from lmleak.config.source import Key, dotted
from lmleak.errors import RecipeError, did_you_mean

MAX_CELLS = 100_000  # a year of CPU at five minutes a cell; more is a slip of the pen


@dataclass(frozen=True)
class Cell:
    """One point of a recipe's sweep: `recipe` has the axes' values in it and no sweep."""

    id: str  #: 12 hex digits of everything that can change the result
    axes: Mapping[str, Any]  #: dotted field -> its value here; the same fields for every cell of a recipe
    recipe: Recipe
    control: str | None = None  #: of `recipe.CONTROLS`; None for the attack itself


def cells(recipe: Recipe) -> tuple[Cell, ...]:
    """The cells of a recipe in the order of its sweep: the last axis moves fastest, products follow each other.

    A point that two products share is one cell. Each is followed by its controls, which have one more axis, `control`
    (`none` for the cell itself, whose id is that of the recipe without controls).

    Raises:
        RecipeError: a point of the sweep is not a valid recipe; all faults of all points.
    """
    base = recipe._said({"sweep", "name", "controls", "utility"})
    axes = list(dict.fromkeys(axis for product in recipe.sweep for axis in product))
    out: dict[str, Cell] = {}
    problems: dict[str, None] = {}
    for number, product in enumerate(recipe.sweep or [{}]):
        for point in _points(product):
            data, wrong = _with(base, {axis: product[axis][i] for axis, i in point.items()})
            resolved, found = resolve(data) if not wrong else ({}, wrong)
            for problem in found or wrong:
                problems[_line(recipe, number, point, problem)] = None
            if problems:
                continue
            key = digest(resolved)
            made = recipe.model_copy(update={**resolved, "sweep": [], "controls": []})
            values = {axis: _value(resolved, axis) for axis in axes} | ({"control": "none"} if recipe.controls else {})
            out.setdefault(key, Cell(key, values, made))
            for control in recipe.controls:
                own = digest({**resolved, "control": control})
                out.setdefault(own, Cell(own, {**values, "control": control}, made, control))
    if problems:
        raise RecipeError(problems)
    return tuple(out.values())


def read_sweep(raw: Any) -> tuple[list[dict[str, list[Any]]], list[Problem]]:
    """Checks the form of a sweep: a mapping of fields to lists, or a list of such mappings whose union is wanted."""
    if raw is None or raw == {} or raw == []:
        return [], []
    listed = isinstance(raw, list)
    problems: list[Problem] = []
    for number, product in enumerate(raw if listed else [raw]):
        at: Key = ("sweep", number) if listed else ("sweep",)
        if not isinstance(product, Mapping):
            problems.append(Problem(at, f"should map fields to lists of values, not {short(product)}"))
            continue
        for axis, values in product.items():
            problems += _axis((*at, axis), axis, values)
    products = [dict(product) for product in (raw if listed else [raw])] if not problems else []
    count = sum(math.prod(len(values) for values in product.values()) for product in products)
    if count > MAX_CELLS:
        problems.append(Problem(("sweep",), f"{count:,} cells; the limit is {MAX_CELLS:,}"))
    return products, problems


def _axis(key: Key, axis: str, values: Any) -> Iterator[Problem]:
    head = axis.split(".")[0]
    if head not in CELL_FIELDS:
        near = did_you_mean(head, CELL_FIELDS) or f" (fields: {', '.join(CELL_FIELDS)})"
        yield Problem(key, f"no field of this name can be swept{near}", "key")
    if not isinstance(values, list):
        hint = f"; write {axis}.{next(iter(values))}: [...]" if isinstance(values, dict) and values else ""
        yield Problem(key, f"should be a list of values, not {short(values)}{hint}")
    elif not values:
        yield Problem(key, "has no values")
    else:
        seen: dict[str, int] = {}
        for i, value in enumerate(values):
            first = seen.setdefault(digest(value), i)
            if first != i:
                yield Problem((*key, i), f"{short(value)} is given twice")


def _points(product: Mapping[str, list[Any]]) -> Iterator[dict[str, int]]:
    for indices in itertools.product(*(range(len(values)) for values in product.values())):
        yield dict(zip(product, indices, strict=True))


def _with(base: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """`base` with axes put in: whole blocks before their fields, `kind` before the other fields."""
    data = copy.deepcopy(dict(base))
    problems: list[Problem] = []
    for axis in sorted(values, key=lambda axis: (axis.count("."), not axis.endswith(".kind"))):
        path = tuple(axis.split("."))
        fault = put(data, path, copy.deepcopy(values[axis]))
        if fault:
            problems.append(Problem(path, fault, "key"))
        elif len(path) == 1:
            data = expand(data)
    return data, problems


def _value(resolved: Mapping[str, Any], axis: str) -> Any:
    """What a table shows for this axis; None where the kind of this cell has no such field."""
    value: Any = resolved
    for part in axis.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if axis in ROOM_OF:
        return compact(ROOM_OF[axis], value)
    if axis in ("select", "knowledge"):
        return {k: v for k, v in value.items() if v not in (None, [], "all")}
    return value


def _line(recipe: Recipe, number: int, point: Mapping[str, int], problem: Problem) -> str:
    """A problem of one point, placed at the sweep value that brought it in, or else where the recipe has it."""
    axis = max((axis for axis in point if _covers(axis, problem.key)), key=len, default=None)
    if axis is None:
        return f"{recipe.place(*problem.key)}: {dotted(problem.key)}: {problem.what}"
    path = axis.split(".")
    about_axis = problem.about == "key" and len(problem.key) <= len(path)
    inner: Key = () if about_axis else (point[axis], *problem.key[len(path) :])
    key: Key = ("sweep", axis, *inner)
    if recipe.has(("sweep", number, axis)):
        key = ("sweep", number, axis, *inner)
    return f"{recipe.place(*key)}: {dotted(problem.key)}: {problem.what}"


def _covers(axis: str, key: Key) -> bool:
    path = tuple(axis.split("."))
    return key[: len(path)] == path or path[: len(key)] == key
