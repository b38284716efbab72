"""Models, batches and selections of cells, each loaded once and kept while the next unit needs it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lmleak.config import Cell
from lmleak.errors import DataError, LmleakError, RecipeError, RunError
from lmleak.runs import controls
from lmleak.runs.plan import changed_by, data_key, model_key, selection_key
from lmleak.seeds import derive

if TYPE_CHECKING:
    from lmleak.records import Batch, Observation, Reconstruction, Selection, Victim

_log = logging.getLogger("lmleak")


class Workbench:
    """One process's models and data.

    One model at a time: two of BERT-base's size would cost 0.9 GB, and units come ordered by model.
    """

    def __init__(self, identities: Mapping[str, str] | None = None):
        """`identities` are those a former start of the run stored; loading anything else then is an error."""
        self.identities = dict(identities or {})
        self._victim: tuple[str, Victim] | None = None
        self._changed: tuple[str, Victim] | None = None  # by a defense that changes the model
        self._batches: dict[str, list[Batch]] = {}
        self._selections: dict[str, Selection] = {}
        self._told: tuple[str, dict[int, dict[str, Any]]] | None = None  # measures, by batch

    def victim(self, cell: Cell) -> Victim:
        """The cell's model, changed where the cell's defense does that.

        Raises:
            ModelError, RunError: it cannot be loaded; its weights are not those the run began with.
            SelectionError: the defense names a module that is not there.
        """
        loaded, change = self._loaded(cell), changed_by(cell)
        if change is None:
            return loaded
        key = json.dumps([model_key(cell), change], sort_keys=True)
        if self._changed is None or self._changed[0] != key:
            from lmleak.defenses import install

            self._changed = None
            self._changed = key, install(loaded, change, derive(cell.recipe.seed, "install"))
        return self._changed[1]

    def _loaded(self, cell: Cell) -> Victim:
        key = model_key(cell)
        if self._victim is None or self._victim[0] != key:
            from lmleak.models import load_model

            self._victim = self._changed = None  # before the next one is loaded, or both are in memory
            victim = load_model(**cell.recipe.model, seed=cell.recipe.seed)
            if cell.recipe.train and cell.recipe.train["epochs"]:
                victim = self._trained(victim, cell)
            self._same("model", key, victim.weights)
            self._victim = key, victim
        return self._victim[1]

    def _trained(self, victim: Victim, cell: Cell) -> Victim:
        from lmleak.data import load_batches
        from lmleak.utility import fitted

        block, seed = cell.recipe.train or {}, cell.recipe.seed
        data = {**block["data"], "batch_size": 1}
        return fitted(victim, lambda: load_batches(victim, **data, seed=seed), block, seed, _log.info)

    def batches(self, cell: Cell) -> list[Batch]:
        """The cell's batches; those of the last two data blocks are kept.

        Raises:
            DataError, RunError: they cannot be loaded; they are not those the run began with.
        """
        key = data_key(cell)
        if key not in self._batches:
            from lmleak.data import load_batches

            made = load_batches(self.victim(cell), **cell.recipe.data, seed=cell.recipe.seed)
            content = [[list(batch.reference.tokens), list(batch.reference.labels)] for batch in made]
            content += [_pixels(batch) for batch in made if batch.reference.images is not None]
            self._same("data", key, _digest(json.dumps(content, default=list)))
            while len(self._batches) > 1:
                self._batches.pop(next(iter(self._batches)))
            self._batches[key] = made
        return self._batches[key]

    def selection(self, cell: Cell) -> Selection:
        """What the cell observes.

        Raises:
            SelectionError: an entry selects nothing.
        """
        key = selection_key(cell)
        if key not in self._selections:
            from lmleak.gradients import select

            self._selections[key] = select(self.victim(cell), **cell.recipe.select)
        return self._selections[key]

    def observe(self, cell: Cell, index: int) -> tuple[Batch, Observation]:
        """A batch and what the client releases of it. Noise draws from (recipe seed, purpose, batch)."""
        from lmleak.gradients import observe

        recipe, victim = cell.recipe, self.victim(cell)
        batch = self.batches(cell)[index]
        seed = derive(recipe.seed, "observe", index)
        return batch, observe(victim, batch, self.selection(cell), recipe.defense, seed=seed)

    def attack(
        self, cell: Cell, index: int, progress: Callable[[str], None] | None = None
    ) -> tuple[Batch, Observation, Reconstruction, dict[str, float]]:
        """One unit: the client's release, then the attack on it, which is given nothing else of the batch.

        Noise and attack draw from (recipe seed, purpose, batch), so every setting of a sweep, and every control, meets
        the same draws.

        Returns:
            the batch, the observation, the reconstruction, and CPU seconds (all threads) of client and attack.
        """
        from lmleak.attacks import attack
        from lmleak.gradients import grant

        recipe, victim = cell.recipe, self.victim(cell)
        start = time.process_time()
        batch, observation = self.observe(cell, index)
        if cell.control == "wrong_update":
            observation = self.observe(cell, controls.other(index, len(self.batches(cell))))[1]
        elif cell.control == "no_gradient":
            observation = controls.without_gradient(observation, derive(recipe.seed, "no_gradient", index))
        knowledge = grant(victim, batch, **recipe.knowledge)
        middle = time.process_time()
        if cell.control == "replay":
            made = controls.replay(recipe.attack, observation, knowledge, victim, batch)
        else:
            seed = derive(recipe.seed, "attack", index)
            made = attack(observation, victim, **recipe.attack, knowledge=knowledge, seed=seed, progress=progress)
        seconds = {"observe_cpu": middle - start, "attack_cpu": time.process_time() - middle}
        return batch, observation, made, seconds

    def measures(self, cell: Cell, index: int) -> dict[str, Any] | None:
        """What the cell's measures say of one batch's release; None where it asks for none.

        Draws depend on (recipe seed, batch) alone, so settings of a sweep meet the same alternatives. What compares
        many batches is told with the cell's first. Cells that differ in their attack alone share what was measured.
        """
        recipe = cell.recipe
        if not recipe.measures or cell.control:
            return None
        key = json.dumps([data_key(cell), selection_key(cell), recipe.defense, recipe.measures], sort_keys=True)
        if self._told is None or self._told[0] != key:
            self._told = key, {}
        if index not in self._told[1]:
            self._told[1][index] = self._measured(cell, index)
        return self._told[1][index]

    def _measured(self, cell: Cell, index: int) -> dict[str, Any]:
        from lmleak.measures import measure, over_data

        recipe, found = cell.recipe, {}
        for block in recipe.measures:
            many = over_data(block["kind"])
            if many and index:
                continue
            made = measure(
                self.victim(cell),
                self._sample(cell, block["samples"]) if many else self.batches(cell)[index],
                self.selection(cell),
                **block,
                defense=recipe.defense,
                seed=derive(recipe.seed, "measures", index),
            )
            found[block["kind"]] = {"rows": made.rows, "reason": made.reason, "details": made.details}
        return found

    def _sample(self, cell: Cell, count: int) -> list[Batch]:
        """Up to `count` batches of the cell's data: `data.limit` is for attacks, which cost more."""
        data = {**cell.recipe.data, "limit": count * cell.recipe.data["batch_size"]}
        recipe = cell.recipe.model_copy(update={"data": data})
        return self.batches(replace(cell, recipe=recipe))

    def _same(self, what: str, key: str, now: str) -> None:
        known = self.identities.setdefault(f"{what}:{_digest(key)}", now)
        if known != now:
            raise RunError(
                f"{what}: not what it was when this run began ({_short(known)} then, {_short(now)} now); "
                "start a new run with --fresh"
            )


def check(cells: Sequence[Cell], bench: Workbench) -> tuple[list[int], list[Selection]]:
    """Loads every model, data set, selection and metric that the cells name, before the first of them runs.

    The model that the first cell needs comes last, so that it is still loaded when the run starts.

    Returns:
        number of batches and selection of each cell.

    Raises:
        LmleakError: everything that is wrong, each with its place in the recipe.
    """
    counts: dict[int, int] = {}
    selections: dict[int, Selection] = {}
    faults: dict[str, LmleakError] = {}
    order = {key: -place for place, key in enumerate(dict.fromkeys(map(model_key, cells)))}
    for place in sorted(range(len(cells)), key=lambda place: order[model_key(cells[place])]):
        cell = cells[place]
        if _fault(faults, cell, "model", partial(bench.victim, cell)) is None:
            continue
        found = _fault(faults, cell, "data", partial(bench.batches, cell))
        counts[place] = len(found or ())
        if found is not None and cell.control == "wrong_update":
            _fault(faults, cell, "controls", partial(_two, len(found)))
        selections[place] = _fault(faults, cell, "select", partial(bench.selection, cell))
    for metrics in {json.dumps(cell.recipe.metrics): cell for cell in cells}.values():
        _fault(faults, metrics, "metrics", partial(_metrics, metrics))
    if faults:
        kinds = {type(error) for error in faults.values()}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        raise RecipeError(faults) if kind is RecipeError else kind("\n".join(faults))
    return [counts[place] for place in range(len(cells))], [selections[place] for place in range(len(cells))]


def _two(count: int) -> None:
    if count < 2:
        raise DataError(f"wrong_update takes the gradient of another batch, and the data makes {count} only")


def _metrics(cell: Cell) -> bool:
    from lmleak.metrics import prepare

    prepare(cell.recipe.metrics)
    return True


def _fault(faults: dict[str, LmleakError], cell: Cell, field: str, do: Callable[[], Any]) -> Any:
    """The result of `do`; where it fails, None, and the error joins `faults` under its place."""
    try:
        return do()
    except RunError:
        raise
    except LmleakError as error:
        faults.setdefault(cell.recipe.explain(error, field), error)
        return None


def _pixels(batch: Batch) -> list[Any]:
    return [hashlib.sha256(batch.reference.images.contiguous().numpy().tobytes()).hexdigest()]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _short(text: str) -> str:
    return text if len(text) < 60 else f"{text[:57]}..."
