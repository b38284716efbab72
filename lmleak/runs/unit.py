"""One unit: the client's release, the attack, the scores, and the line that commits them."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmleak.runs import pictures, store
from lmleak.runs.controls import other
from lmleak.runs.progress import safe

if TYPE_CHECKING:
    from lmleak.config import Cell
    from lmleak.runs.watch import Watch
    from lmleak.runs.workbench import Workbench

_log = logging.getLogger("lmleak")


def do(cell: Cell, batch: int, bench: Workbench, out: store.Store, watch: Watch | None) -> str:
    """Does one unit and commits it. Whatever goes wrong in it is its result, not the run's end.

    Returns:
        its status.
    """
    start = time.monotonic()
    result: dict[str, Any] = {"cell": cell.id, "batch": batch, "scores": None, "privacy": None, "details": {}}
    recovered = None
    try:
        measured = bench.measures(cell, batch)
        if measured is not None:
            result["measures"] = measured
        private, observation, made, seconds = bench.attack(cell, batch, watch.progress.text if watch else None)
        result |= {"status": made.status, "reason": made.reason, "details": made.details}
        result["privacy"] = observation.privacy
        if cell.control != "replay":
            result |= _scored(made, private.reference, cell.recipe.metrics)
        if cell.control == "wrong_update":
            # What it read of the batch whose gradient it got: an answer that is neither is a wrong sentence.
            place = other(batch, len(bench.batches(cell)))
            theirs = _scored(made, bench.batches(cell)[place].reference, cell.recipe.metrics)
            result["details"] = {**made.details, "wrong_update": {"gradient_of": place, **theirs}}
        recovered = {"cell": cell.id, "batch": batch, **_texts(private.reference, made)}
        images = pictures.save(out.folder, cell.id, batch, private.reference, made)
        recovered |= {"images": images} if images else {}
        result["seconds"] = {**seconds, "total": time.monotonic() - start}
        result, recovered = store.plain(result), store.plain(recovered)
    except Exception as error:
        _log.error("cell %s batch %d failed", cell.id, batch, exc_info=True)
        reason = f"{type(error).__name__}: {safe(str(error))}"[:2000]
        result |= {"status": "failed", "reason": reason, "scores": None, "details": {}}
        result["seconds"] = {"observe_cpu": None, "attack_cpu": None, "total": time.monotonic() - start}
        recovered = None
    out.append(result, recovered)
    if watch:
        watch.poll()
        watch.progress.unit(result["scores"], tuple(recovered["reconstruction"]["texts"]) if recovered else ())
    return result["status"]


def _scored(made: Any, reference: Any, metrics: Any) -> dict[str, Any]:
    """`scores` of an answer; of anything else, under `guess`, those of what came back, be it nothing."""
    from lmleak.metrics import score

    if made.status == "ok":
        return {"scores": score(made, reference, metrics)}
    return {"scores": None, "guess": score(replace(made, status="ok"), reference, metrics)}


def _texts(reference: Any, made: Any) -> dict[str, Any]:
    return {
        "reference": {"tokens": reference.tokens, "texts": reference.texts, "labels": reference.labels},
        "reconstruction": {
            "tokens": made.tokens,
            "texts": made.texts,
            "labels": made.labels,
            "confidence": made.confidence,
            "status": made.status,
            "reason": made.reason,
        },
    }
