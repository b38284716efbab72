"""A recipe's name, path or mapping, and overrides -> a Recipe whose every cell is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmleak.config import library
from lmleak.config.overrides import apply
from lmleak.config.recipe import FIELDS, Recipe, check_name, expand, read_controls, resolve
from lmleak.config.schema import short
from lmleak.config.source import Key, Source, dotted, read
from lmleak.config.sweep import cells, read_sweep
from lmleak.config.utility import read_utility
from lmleak.errors import RecipeError


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Loads and validates a recipe and every cell of its sweep.

    Args:
        source: name of a packaged recipe, path of a YAML file, or the recipe itself as a mapping.
        overrides: `dotted.key=value` strings; the value is a YAML scalar or flow collection.

    Raises:
        RecipeError: every fault at once, each with its place: `path:line:col: dotted.key: what is wrong`.
    """
    if isinstance(source, Mapping):
        value = json.loads(json.dumps(dict(source), default=str))
        found, stem = Source("recipe", value, _places(value)), "recipe"
    else:
        path = library.find(str(source))
        found, stem = read(path), path.stem
    if not isinstance(found.value, dict):
        raise RecipeError([f"{found.place(())}: should be a mapping of {', '.join(FIELDS)}, not {short(found.value)}"])
    found = Source(found.name, expand(found.value), found.places)
    found = apply(found, overrides)
    data = expand(found.value)

    resolved, problems = resolve(data)
    sweep, wrong = read_sweep(data.get("sweep"))
    controls, unknown = read_controls(data.get("controls"))
    utility, missing = read_utility(data.get("utility"))
    name = data.get("name", _file_safe(stem))
    problems += [*wrong, *unknown, *missing, *check_name(name)]
    if problems:
        raise RecipeError(_lines(found, problems))
    recipe = Recipe(name=name, sweep=sweep, controls=controls, utility=utility, **resolved)
    recipe._source = Source(found.name, data, found.places)
    cells(recipe)
    return recipe


def _lines(source: Source, problems: Iterable[Any]) -> list[str]:
    """One line a problem, in the order of the file."""
    lines = {f"{source.place(problem.key)}: {dotted(problem.key)}: {problem.what}": None for problem in problems}
    return sorted(lines, key=lambda line: [int(number) for number in re.findall(r":(\d+)(?=:)", line)[:2]])


def _places(value: Any, key: Key = ()) -> dict[Key, str]:
    """A mapping has no lines: every key's place is the mapping itself."""
    out: dict[Key, str] = {key: "recipe"}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for inner, item in items:
        out |= _places(item, (*key, inner))
    return out


def _file_safe(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", stem)
