"""Reads a run folder, finished or not: one line a cell, one row a batch, or everything scored anew."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmleak.errors import RunError
from lmleak.runs import pictures, store
from lmleak.runs.folder import Lock, read_facts, write_facts
from lmleak.runs.measured import over_batches

if TYPE_CHECKING:
    import pandas

Line = dict[str, Any]


def read_results(run_dir: str | Path) -> list[Line]:
    """The result line of every unit that has one, by cell and batch.

    Raises:
        RunError: no run folder.
    """
    return _ordered(Path(run_dir), store.RESULTS)


def read_reconstructions(run_dir: str | Path) -> list[Line]:
    """The reconstruction line of every unit that was attacked to an end, by cell and batch.

    Raises:
        RunError: no run folder.
    """
    folder = Path(run_dir)
    done = {(line["cell"], line["batch"]) for line in read_results(folder) if line["status"] != "failed"}
    return [line for line in _ordered(folder, store.RECONSTRUCTIONS) if (line["cell"], line["batch"]) in done]


def cell_lines(run_dir: str | Path) -> list[Line]:
    """One aggregated line a cell, in the order of the sweep: what `lmleak run --json` prints.

    A cell of which no batch is done has no line yet; one under way says under `batches` how many are missing.

    Raises:
        RunError: no run folder.
    """
    folder = Path(run_dir)
    facts = _facts(folder)
    units: dict[str, list[Line]] = {}
    for line in read_results(folder):
        units.setdefault(line["cell"], []).append(line)
    return [cell_line(cell, facts, units[cell["id"]]) for cell in facts["cells"] if cell["id"] in units]


def cell_line(cell: Mapping[str, Any], facts: Mapping[str, Any], units: Sequence[Line]) -> Line:
    """Aggregates the batches of one cell.

    The status is `failed` if any batch failed (its reason says how many), else `ok` if any is ok, else the most common
    one. `scores` are means over the batches that are ok; `n` and `batches` say how many those are. `scores_all` are
    means over all batches that were attacked, with the best guess of those that ended without an answer and nothing
    for those that were refused: the number that does not flatter an attack which answers only where it is easy. It is
    null where no batch was answered or searched, as a refusal alone is no score of 0. Cells of the control `replay`
    have `replay` instead: means of the attack's own measures at the true input.

    Args:
        cell: its entry in run.json.
        facts: run.json.
        units: its result lines, by batch.
    """
    counts = Counter(line["status"] for line in units)
    status = next((status for status in ("failed", "ok") if counts[status]), counts.most_common(1)[0][0])
    other = [line for line in units if line["status"] != "ok"]
    first = next((line for line in other if line["status"] == status), other[0] if other else None)
    reason = first and first["reason"]
    if first and len(counts) > 1:
        reason = f"{counts[first['status']]} of {len(units)} batches {first['status']}: {reason}"
    scores = None
    if status == "ok":
        scores = _means([line["scores"] or {} for line in units if line["status"] == "ok"])
    came = [recovered(line) for line in units if line["status"] != "failed"]
    searched = counts["ok"] or counts["budget_exhausted"]
    replayed = [line["details"]["replay"] for line in units if "replay" in (line.get("details") or {})]
    timed = [line["seconds"] for line in units if line.get("seconds")]
    missing = cell["batches"] - len(units)
    return {
        "cell": cell["id"],
        "status": status,
        "reason": reason,
        "axes": cell["axes"],
        "select": facts["selections"].get(cell["selection"]),
        "scores": scores,
        "privacy": next((line["privacy"] for line in units if line.get("privacy")), None),
        "seconds": {
            "observe_cpu": _mean(row.get("observe_cpu") for row in timed),
            "attack_cpu": _mean(row.get("attack_cpu") for row in timed),
            "total": sum(row["total"] for row in timed),
        },
        "batches": {**counts, **({"missing": missing} if missing else {})},
        "scores_all": None if not searched or any(row is None for row in came) else _means(came),
        **({"replay": _means(replayed)} if replayed else {}),
        **over_batches(units),
    }


def recovered(line: Mapping[str, Any]) -> Mapping[str, float | None] | None:
    """Scores of what came back for a batch, answer or best guess or nothing; None where that was not stored."""
    return line["scores"] if line["status"] == "ok" else line.get("guess")


def _means(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    from lmleak.metrics import summarise

    names = dict.fromkeys(name for row in rows for name in row or ())
    made = {name: summarise([(row or {}).get(name) for row in rows]) for name in names}
    return {
        name: {"mean": s.mean, "low": s.low, "high": s.high, "n": s.n} if s else _UNDEFINED for name, s in made.items()
    } or None


_UNDEFINED = {"mean": None, "low": None, "high": None, "n": 0}


def load_results(run_dir: str | Path) -> pandas.DataFrame:
    """A run as a table: one row a cell and batch.

    Columns: `cell`, `batch`, one a sweep axis under its dotted name, `status`, `reason`, one a metric, `reference` and
    `recovered` (texts, one line a sentence), `share` (of the model's parameters that are observed, 0..1), `epsilon`,
    `delta`, `mu` and `rdp_epsilon` (of the single release), `observe_cpu`, `attack_cpu` and `total` (seconds).

    Raises:
        RunError: no run folder.
    """
    import pandas

    folder = Path(run_dir)
    facts = _facts(folder)
    cells = {cell["id"]: cell for cell in facts["cells"]}
    texts = {(line["cell"], line["batch"]): line for line in read_reconstructions(folder)}
    rows = []
    for line in read_results(folder):
        cell = cells[line["cell"]]
        text = texts.get((line["cell"], line["batch"]), {})
        privacy = line.get("privacy") or {}
        rows.append(
            {
                "cell": line["cell"],
                "batch": line["batch"],
                **cell["axes"],
                "status": line["status"],
                "reason": line["reason"],
                **(line["scores"] or {}),
                "reference": _joined(text.get("reference")),
                "recovered": _joined(text.get("reconstruction")),
                "share": facts["selections"][cell["selection"]]["share"],
                **{name: privacy.get(name) for name in ("epsilon", "delta", "mu", "rdp_epsilon")},
                **line["seconds"],
            }
        )
    return pandas.DataFrame(rows)


def rescore(run_dir: str | Path, metrics: Sequence[str | Mapping[str, Any]] | None = None) -> int:
    """Scores the stored reconstructions anew and replaces the scores of their results.

    Args:
        run_dir: run folder; no run may be working in it.
        metrics: kinds or blocks; those of the run's recipe by default.

    Returns:
        number of batches scored.

    Raises:
        RunError: no run folder, or one in use.
        LmleakError: a metric is unknown or cannot be loaded.
    """
    from lmleak.metrics import prepare, score
    from lmleak.records import Reconstruction, Reference

    folder = Path(run_dir)
    facts = _facts(folder)
    if metrics is not None:
        new = [{"kind": metric} if isinstance(metric, str) else dict(metric) for metric in metrics]
        facts["cells"] = [{**cell, "metrics": new} for cell in facts["cells"]]
    asked = {cell["id"]: cell["metrics"] for cell in facts["cells"]}
    for each in asked.values():
        prepare(each)
    lock = Lock(folder)
    lock.take()
    try:
        made: dict[tuple[str, int], Any] = {}
        for line in read_reconstructions(folder):
            found, truth = line["reconstruction"], line["reference"]
            images = pictures.load(folder, line.get("images"))
            reconstruction = Reconstruction(
                _tuples(found["tokens"]),
                tuple(found["texts"]),
                images.get("reconstruction"),
                confidence=tuple(found["confidence"]),
                status=found["status"],
                reason=found["reason"],
            )
            reference = Reference(
                _tuples(truth["tokens"]), tuple(truth["texts"]), images.get("reference"), tuple(truth["labels"])
            )
            came = score(replace(reconstruction, status="ok"), reference, asked[line["cell"]])
            made[line["cell"], line["batch"]] = came
        for path in sorted(folder.glob(f"{store.RESULTS}-*.jsonl")):
            lines = list(store.lines(path))
            for line in lines:
                if line["status"] == "failed" or "replay" in line["details"]:
                    continue
                name = "scores" if line["status"] == "ok" else "guess"
                line[name] = made.get((line["cell"], line["batch"]))
            store.replace_lines(path, lines)
        write_facts(folder, {**facts, "rescored": store.now()})
    finally:
        lock.release()
    return len(made)


def _facts(folder: Path) -> Line:
    facts = read_facts(folder)
    if facts is None:
        raise RunError(f"{folder}: no run folder (it has no run.json)")
    return facts


def _ordered(folder: Path, name: str) -> list[Line]:
    place = {cell["id"]: i for i, cell in enumerate(_facts(folder)["cells"])}
    found = store.read(folder, name)
    return [found[key] for key in sorted(found, key=lambda key: (place.get(key[0], -1), key[1])) if key[0] in place]


def _joined(side: Mapping[str, Any] | None) -> str | None:
    return None if side is None else "\n".join(side["texts"])


def _tuples(rows: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def to_json(line: Mapping[str, Any]) -> str:
    """A cell line as `--json` prints it."""
    return json.dumps(store.plain(line), allow_nan=False)
