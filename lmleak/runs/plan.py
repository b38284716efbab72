"""Which units (a cell's batch each) a run has, which are left, and which rank does which."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lmleak.config import Cell
from lmleak.defenses import installs


class Unit(NamedTuple):
    """The smallest piece of work: one batch under one cell."""

    cell: int  #: index into the run's cells
    batch: int  #: index into the cell's batches


def model_key(cell: Cell) -> str:
    """Equal for cells that load the same model."""
    return json.dumps(_model(cell), sort_keys=True)


def _model(cell: Cell) -> list[Any]:
    trained = [cell.recipe.train] if cell.recipe.train else []
    return [cell.recipe.model, cell.recipe.seed, *trained]


def data_key(cell: Cell) -> str:
    """Equal for cells that meet the same batches."""
    return json.dumps([*_model(cell), cell.recipe.data], sort_keys=True)


def selection_key(cell: Cell) -> str:
    """Equal for cells that observe the same tensors."""
    return json.dumps([cell.recipe.model, cell.recipe.seed, cell.recipe.select, changed_by(cell)], sort_keys=True)


def changed_by(cell: Cell) -> dict[str, Any] | None:
    """The cell's defense where it changes the model itself."""
    return cell.recipe.defense if installs(cell.recipe.defense) else None


def remaining(
    counts: Sequence[int], ids: Sequence[str], done: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[Unit]:
    """Units without a result, or with a failed one, in the order of cells and batches.

    Args:
        counts: batches of each cell.
        ids: of each cell.
        done: (cell id, batch) -> result line.
    """
    return [
        Unit(cell, batch)
        for cell, (key, count) in enumerate(zip(ids, counts, strict=True))
        for batch in range(count)
        if done.get((key, batch), {}).get("status", "failed") == "failed"
    ]


def deal(units: Collection[Unit], models: Sequence[str], ranks: int, evenly: bool = False) -> list[list[Unit]]:
    """Splits units between ranks, the same way on every rank and for every order of finishing.

    Cells of one model stay together where that keeps the ranks even; a model with more than its rank's share is
    dealt out unit by unit, so that cheap and dear cells meet on every rank.

    Args:
        units: what is left.
        models: `model_key` of each cell.
        ranks: number of processes.
        evenly: every cell's first batch before any cell's second, so that a run that is stopped leaves whole tables.

    Returns:
        one list a rank, models one after another, cells (or batches) in order.
    """
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(models[unit.cell], []).append(unit)
    hands: list[list[Unit]] = [[] for _ in range(ranks)]
    share = len(units) / ranks
    for group in sorted(groups.values(), key=lambda group: -len(group)):
        smallest = min(hands, key=len)
        if len(smallest) + len(group) <= share:
            smallest.extend(group)
            continue
        for unit in group:
            min(hands, key=len).append(unit)
    order = {model: place for place, model in enumerate(dict.fromkeys(models))}
    turn = (lambda unit: (unit.batch, unit.cell)) if evenly else (lambda unit: (unit.cell, unit.batch))
    return [sorted(hand, key=lambda unit: (order[models[unit.cell]], turn(unit))) for hand in hands]
