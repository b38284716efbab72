"""Runs a recipe to its end, or on from where the last start of it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmleak.config import Cell, Recipe, cells, load_recipe
from lmleak.errors import LmleakError, RunError
from lmleak.runs import folder as folders
from lmleak.runs import plan, provenance, ranks, store
from lmleak.runs.unit import do
from lmleak.runs.watch import RunResult, Watch
from lmleak.runs.workbench import Workbench, check

_log = logging.getLogger("lmleak")
_STOP = ".stop"  #: a rank that fails under --fail-fast leaves this for the others


@dataclass(frozen=True)
class _Job:
    """What rank 0 tells the others."""

    folder: Path
    hands: list[list[plan.Unit]]  #: units of each rank
    identities: dict[str, str] = field(default_factory=dict)


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | Path | None = None,
    root: str | Path = "runs",
    fresh: bool = False,
    fail_fast: bool = False,
    evenly: bool = False,
    json_lines: bool = False,
    quiet: bool = False,
    argv: Sequence[str] | None = None,
) -> RunResult:
    """Runs a recipe; called again with the same recipe it goes on where it stopped and retries what failed.

    Under `accelerate launch` or torchrun every process calls this; units are split between them, rank 0 alone prints
    and returns after the slowest. Several hosts need a run folder that all of them see.

    Args:
        recipe: name, path, mapping, or a loaded recipe.
        overrides: `dotted.key=value` strings.
        run_dir: the run folder; by default the latest of this recipe under `root`, else a new one there.
        root: where run folders are found and made.
        fresh: start a new run folder even where the recipe has one.
        fail_fast: stop at the first unit that fails.
        evenly: take every cell's first batch before any cell's second.
        json_lines: print one JSON line a cell on stdout, when the cell is done.
        quiet: no progress on stderr.
        argv: command to be stored; this process's by default.

    Returns:
        the run folder and how the run ended.

    Raises:
        LmleakError: the recipe, its model, data, selection or metrics are wrong, or the folder is another run's or in
            use. Nothing has run then. Ranks other than 0 raise SystemExit with the error's exit code instead.
        KeyboardInterrupt: Ctrl-C; finished units are kept.
    """
    if not isinstance(recipe, Recipe) or overrides:
        source = recipe.model_dump() if isinstance(recipe, Recipe) else recipe
        recipe = load_recipe(source, overrides)
    points = cells(recipe)
    state = ranks.join()
    if state.num_processes > 1 and any(point.recipe.attack.get("across_processes") for point in points):
        if not state.is_main_process:
            raise SystemExit(RunError.exit_code)
        # Ranks that attack different batches would wait for each other's seeds for ever.
        raise RunError("attack.across_processes: a run on several processes splits batches between them, not seeds")
    lock: folders.Lock | None = None
    bench = Workbench()
    try:
        if state.is_main_process:
            try:
                place, lock, facts = _open(recipe, points, run_dir, Path(root), fresh, bench)
                done = store.read(place, store.RESULTS)
                ids = [cell["id"] for cell in facts["cells"]]
                left = plan.remaining([cell["batches"] for cell in facts["cells"]], ids, done)
                hands = plan.deal(left, [plan.model_key(point) for point in points], state.num_processes, evenly)
                _start(place, facts, provenance.describe(argv, state.device, state.num_processes))
                watch = Watch(place, facts, done, left, json_lines, quiet)
            except LmleakError as error:
                ranks.share(state, error.exit_code)
                raise
            lock.take(shared=True)  # before the others hear of the folder, or they find it locked
            job = ranks.share(state, _Job(place, hands, bench.identities))
        else:
            job = ranks.share(state, None)
            if isinstance(job, int):
                raise SystemExit(job)
            lock = folders.Lock(job.folder)
            lock.take(shared=True)
            bench, watch = Workbench(job.identities), None
        return _work(job, points, bench, state, watch, fail_fast)
    finally:
        if lock:
            lock.release()


def _open(
    recipe: Recipe, points: Sequence[Cell], run_dir: str | Path | None, root: Path, fresh: bool, bench: Workbench
) -> tuple[Path, folders.Lock, dict[str, Any]]:
    """The locked run folder and its run.json, after everything that is still to run has been checked."""
    place = Path(run_dir) if run_dir is not None else None if fresh else folders.find(recipe, root)
    facts = None
    if place is not None:
        folders.check_owner(place, recipe)
        facts = folders.read_facts(place)
        if fresh and facts is not None:
            raise RunError(f"{place}: --fresh deletes nothing; name a new folder by --run-dir, or delete this one")
    if place is None or facts is None:
        facts = {"format": 1, "name": recipe.name, "recipe": recipe.id, **_describe(points, bench)}
        place = place or folders.create(recipe, root)
        place.mkdir(parents=True, exist_ok=True)
    lock = folders.Lock(place)
    lock.take()
    try:
        known = folders.read_facts(place)  # another start may have finished while this one was checking
        if known is None:
            store.replace(place / "recipe.yaml", recipe.to_yaml().encode())
        else:
            facts = known
            bench.identities.update(facts["identities"])
            done = {key for key, line in store.read(place, store.RESULTS).items() if line["status"] != "failed"}
            todo = [
                point
                for point, cell in zip(points, facts["cells"], strict=True)
                if any((cell["id"], batch) not in done for batch in range(cell["batches"]))
            ]
            check(todo, bench)
        (place / _STOP).unlink(missing_ok=True)
        return place, lock, {**facts, "identities": bench.identities}
    except BaseException:
        lock.release()
        raise


def _describe(points: Sequence[Cell], bench: Workbench) -> dict[str, Any]:
    """What run.json says of the cells. Equal selections are stored once: the names of a whole model are 10 kB."""
    counts, selections = check(points, bench)
    keys = [plan.selection_key(point) for point in points]
    names = {key: str(place) for place, key in enumerate(dict.fromkeys(keys))}
    known = {
        names[key]: {"parameters": [e.name for e in chosen.entries], "share": chosen.share, "values": chosen.numel}
        for key, chosen in zip(keys, selections, strict=True)
    }
    entries = [
        {
            "id": point.id,
            "axes": dict(point.axes),
            "batches": count,
            "selection": names[key],
            "metrics": point.recipe.metrics,
        }
        for point, count, key in zip(points, counts, keys, strict=True)
    ]
    return {"cells": entries, "selections": known, "identities": bench.identities}


def _start(place: Path, facts: dict[str, Any], made_with: dict[str, Any]) -> None:
    if "versions" in facts:
        changes = provenance.changed(facts, made_with)
        if changes:
            _log.warning("%s: goes on under another setting: %s", place, "; ".join(changes))
    stamp = store.now()
    facts.update(made_with, status="running", started=facts.get("started", stamp), finished=None)
    facts["starts"] = [*facts.get("starts", []), stamp]
    folders.write_facts(place, facts)


def _work(
    job: _Job, points: Sequence[Cell], bench: Workbench, state: Any, watch: Watch | None, fail_fast: bool
) -> RunResult:
    """This rank's units, then the end of the run."""
    interrupted = True
    result: RunResult | None = None
    try:
        with _logged(job.folder, state.process_index), ranks.graceful() as stop:
            with store.Store(job.folder, state.process_index) as out:
                for unit in job.hands[state.process_index]:
                    if stop.asked or (job.folder / _STOP).exists():
                        break
                    status = do(points[unit.cell], unit.batch, bench, out, watch)
                    if status == "failed" and fail_fast:
                        (job.folder / _STOP).touch()
            if not stop.asked:
                ranks.wait(state, stop)
            if stop.asked:
                raise SystemExit(143)  # 128 + SIGTERM
        interrupted = False
    finally:
        if watch:
            result = watch.end(interrupted)
    return result or RunResult(job.folder, "done", len(points), 0, len(job.hands[state.process_index]), 0)


@contextmanager
def _logged(place: Path, rank: int) -> Iterator[None]:
    """log.txt takes what every rank logs, tracebacks included; appended lines of several processes do not mix."""
    handler = logging.FileHandler(place / "log.txt", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{rank}] %(levelname)s %(name)s: %(message)s"))
    # A traceback goes to the file; to stderr, where no handler is set, it must not.
    spoke = _log.propagate, _log.level
    _log.propagate = False
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.info("start")
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.propagate, level = spoke
        _log.setLevel(level)
        handler.close()
