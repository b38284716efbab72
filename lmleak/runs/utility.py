"""Fine-tunes a recipe's model under each of its defenses, and keeps what came of it; resumed by the same call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmleak.config import Recipe, cells, load_recipe
from lmleak.config.recipe import digest
from lmleak.errors import DataError, LmleakError
from lmleak.runs import store
from lmleak.runs.folder import Lock

if TYPE_CHECKING:
    from lmleak.records import Batch, Victim

RESULTS = "utility-0.jsonl"
Line = dict[str, Any]


def utility(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    root: str | Path = "runs",
    said: Callable[[str], None] = lambda _: None,
) -> tuple[Path, list[Line]]:
    """Trains under every defense of a recipe and under none, with every seed.

    A kill costs the epoch it was in. Runs are found again by what they are, so that a recipe with one defense more
    trains that one alone.

    Args:
        recipe: name, path, mapping, or a loaded recipe with a `utility` block.
        overrides: `dotted.key=value` strings.
        root: where the folder `<recipe>-utility` is.
        said: told each epoch and each run that ends.

    Returns:
        the folder, and one line a run in the order of defenses and seeds.

    Raises:
        LmleakError: no `utility` block; data, model or a defense that cannot be trained with.
    """
    if not isinstance(recipe, Recipe) or overrides:
        recipe = load_recipe(recipe.model_dump() if isinstance(recipe, Recipe) else recipe, overrides)
    if recipe.utility is None:
        raise LmleakError(f"{recipe.name}: has no `utility` block (train, test, epochs, ...) to train by")
    folder = Path(root) / f"{recipe.name}-utility"
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    lock.take()
    try:
        done = {line["key"]: line for line in read(folder)}
        wanted = list(_runs(recipe))
        states: dict[str, Any] = {}  # of frozen blocks: the same in every run of one model
        for key, model, defense, seed in wanted:
            if key in done:
                continue
            # Weights that are drawn differ by seed, those of a checkpoint in the head alone.
            same = states.setdefault(digest([model, seed if model.get("weights") == "random" else None]), {})
            made = _one(recipe, model, defense, seed, folder / f"{key}.pt", partial(_say, said, defense, seed), same)
            about = {"key": key, "model": model, "defense": defense, "seed": seed}
            done[key] = store.plain({**about, **made, "time": store.now()})
            store.replace_lines(folder / RESULTS, list(done.values()))
        return folder, [done[key] for key, *_ in wanted]
    finally:
        lock.release()


def read(folder: str | Path) -> list[Line]:
    """Every run that was trained to its end. The file is replaced as a whole, so there is never half a line."""
    path = Path(folder) / RESULTS
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def folder_of(name: str, root: str | Path = "runs") -> Path:
    """Folder of `utility`, given by path or by its recipe's name.

    Raises:
        LmleakError: nothing was trained there.
    """
    places = Path(name), Path(root) / f"{name}-utility"
    found = next((path for path in places if (path / RESULTS).is_file()), None)
    if found is None:
        raise LmleakError(f"--utility {name}: nothing was trained under that name; `lmleak utility {name}` does it")
    return found


def _say(said: Callable[[str], None], defense: Mapping[str, Any], seed: int, text: str) -> None:
    said(f"{json.dumps(defense)} seed {seed}: {text}")


def _runs(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], int]]:
    """Key, model, defense and seed of every run; without any defense first."""
    budget = {name: value for name, value in (recipe.utility or {}).items() if name != "seeds"}
    points = cells(recipe)
    models = {digest(point.recipe.model): point.recipe.model for point in points}
    for model in models.values():
        defenses = [{"kind": "none"}, *(point.recipe.defense for point in points if point.recipe.model == model)]
        for defense in {digest(defense): defense for defense in defenses}.values():
            for seed in (recipe.utility or {})["seeds"]:
                yield digest([model, defense, budget, recipe.seed, seed]), model, defense, seed


def _one(
    recipe: Recipe,
    model: Mapping[str, Any],
    defense: Mapping[str, Any],
    seed: int,
    checkpoint: Path,
    said: Callable[[str], None],
    states: dict[Any, Any],
) -> Line:
    from lmleak.defenses import install
    from lmleak.models import load_model
    from lmleak.utility import Plan, fine_tune

    block = recipe.utility or {}
    victim = install(load_model(**model, seed=seed), defense, seed)
    train, test = _records(victim, block, recipe.seed)
    fields = {name: value for name, value in block["select"].items() if value is not None}
    plan = Plan(block["epochs"], block["batch_size"], block["lr"], fields, block["micro_batch"])
    made = fine_tune(victim, train, test, defense, plan, seed, checkpoint, said, states)
    return {
        **made,
        "majority": _majority(test),
        "privacy": _spent(defense, plan.batch_size / len(train), plan.epochs * plan.steps(len(train)), len(train)),
        "records": len(train),
        "tested_on": len(test),
    }


def _records(victim: Victim, block: Mapping[str, Any], seed: int) -> tuple[list[Batch], list[Batch]]:
    """Batches of one record each; the test's sentences are never among the training's.

    Raises:
        DataError: nothing is left of one of them.
    """
    from lmleak.data import load_batches

    train = {**block["train"], "batch_size": 1}
    if block["test"] is None:
        if train.get("limit"):
            train["limit"] += block["holdout"]
        every = load_batches(victim, **train, seed=seed)
        learned, tested = every[: -block["holdout"]], every[-block["holdout"] :]
    else:
        learned = load_batches(victim, **train, seed=seed)
        tested = load_batches(victim, **{**block["test"], "batch_size": 1}, seed=seed)
    known = {record.reference.tokens for record in tested}
    learned = [record for record in learned if record.reference.tokens not in known]
    if len(learned) < block["batch_size"] or not tested:
        raise DataError(f"utility: {len(learned)} records to train on and {len(tested)} to test with are too few")
    return learned, tested


def _majority(test: Sequence[Batch]) -> dict[str, float]:
    labels = Counter(int(record.labels) for record in test)
    return {"accuracy": max(labels.values()) / len(test), "mcc": 0.0}


def _spent(defense: Mapping[str, Any], rate: float, steps: int, records: int) -> dict[str, Any] | None:
    """What the whole training run spent; None for a defense without a guarantee."""
    if defense["kind"] != "dp_sgd":
        return None
    from lmleak.defenses import dp_sgd
    from lmleak.defenses._calibration import training

    config = dp_sgd.Config(**{name: value for name, value in defense.items() if name != "kind"})
    return training(dp_sgd.sigma(config), min(rate, 1.0), steps, config.delta, records)


def summary(lines: Sequence[Line]) -> list[Line]:
    """One line a model and defense: mean and range over seeds."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(digest([line["model"], line["defense"]]), []).append(line)
    return [
        {
            "model": group[0]["model"],
            "defense": group[0]["defense"],
            "seeds": [line["seed"] for line in group],
            **{name: _range([line[name] for line in group]) for name in ("accuracy", "mcc")},
            "majority": group[0]["majority"],
            "privacy": group[0]["privacy"],
            "seconds": sum(line["seconds"] for line in group) / len(group),
        }
        for group in groups.values()
    ]


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
