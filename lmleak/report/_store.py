"""A run folder as the report sees it; the lines themselves are read by `lmleak.runs.results`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lmleak.errors import RunError
from lmleak.report._study import Run
from lmleak.runs import results
from lmleak.runs.folder import read_facts


def read(folder: Path) -> Run:
    """Reads one run folder, finished or not.

    Raises:
        RunError: it is no run folder, or its recipe or run.json is damaged.
    """
    known = read_facts(folder)
    recipe = folder / "recipe.yaml"
    if known is None or not recipe.is_file():
        raise RunError(f"{folder}: no run folder (it has no {'run.json' if known is None else 'recipe.yaml'})")
    text = recipe.read_text(encoding="utf-8", errors="replace")
    try:
        settled = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{recipe}: damaged: {error}") from error
    if not isinstance(settled, dict):
        raise RunError(f"{recipe}: damaged: not a mapping")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        recipe=settled,
        recipe_text=text,
        facts=known,
        lines=tuple(results.cell_lines(folder)),
        batches=_by_cell(results.read_results(folder)),
        examples=_by_cell(results.read_reconstructions(folder)),
    )


def _by_cell(lines: Any) -> dict[str, dict[int, dict[str, Any]]]:
    """cell -> batch -> line."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(str(line["cell"]), {})[int(line["batch"])] = line
    return found
