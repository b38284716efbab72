"""A run folder as the report sees it; the lines themselves are read by `lmleak.runs.results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lmleak.errors import RunError
from lmleak.report._study import Run
from lmleak.runs import results


def read(folder: Path) -> Run:
    """Reads one run folder, finished or not.

    Raises:
        RunError: it is no run folder, or its recipe or run.json is damaged.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise RunError(f"{folder}: no run folder (it has no recipe.yaml)")
    text = recipe.read_text(encoding="utf-8", errors="replace")
    facts = folder / "run.json"
    try:
        settled = yaml.safe_load(text)
        known = json.loads(facts.read_text(encoding="utf-8", errors="replace")) if facts.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{folder}: damaged recipe.yaml or run.json: {error}") from error
    if not isinstance(settled, dict) or not isinstance(known, dict):
        raise RunError(f"{folder}: damaged recipe.yaml or run.json: should be mappings")
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
    """cell -> batch -> line; a batch that was redone counts as its last line."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(str(line["cell"]), {})[int(line["batch"])] = line
    return found
