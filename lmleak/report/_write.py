"""run folders -> report.html and cells.csv."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lmleak.errors import RunError
from lmleak.report import (
    _atlas,
    _chart,
    _compare,
    _controls,
    _csv,
    _diff,
    _grade,
    _headline,
    _heat,
    _lines,
    _measured,
    _palette,
    _pictures,
    _store,
    _study,
    _words,
)
from lmleak.report._study import Place, Run

OPEN_ROWS = 40  #: a longer table is folded
PANELS = 12  #: heat maps shown at once; the others are folded
EXAMPLE_CELLS = 40  #: cells with examples; 3 batches of 120 words each keep them below 1 MB
OPEN_EXAMPLES = 8  #: cells with examples listed at once; the others are folded
_MAPS = 240  #: heat maps drawn at all: 1,000 cells in 1,000 panels would say nothing and weigh megabytes


def write(
    run_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    utility: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Writes one self-contained HTML page about one or more runs, and their cells as CSV beside it.

    The page has no script and loads nothing: it opens with the network off, and whatever text an attack recovered is
    inert in it. A run that is still going, or that failed, can be reported too.

    Args:
        run_dirs: a run folder, or several.
        out: the HTML file to write; `report.html` in the first run folder by default. The CSV is `cells.csv`, or
            named after `out`.
        utility: folders of `lmleak utility` that say what the defenses cost; those beside the runs by default.

    Returns:
        Path of the HTML file.

    Raises:
        RunError: no folder given, or one that is no run folder.
    """
    folders = [run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else list(run_dirs)
    if not folders:
        raise RunError("no run folder given to report on")
    runs = [_store.read(Path(folder)) for folder in folders]
    path = Path(out) if out is not None else Path(folders[0]) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, page(runs, _compare.trained_of(runs, [Path(folder) for folder in utility])))
    _put(path.with_suffix(".csv") if out is not None else path.with_name("cells.csv"), _csv.table(runs))
    return path


def compare(run_dirs: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The cells of several runs as one list of lines.

    Returns:
        Each cell's stable JSON line as in its own run, with `run` (the folder's name) and `difference` added: the
        scores minus those of the undefended cell (else the first) that is equal in every other axis, paired by batch,
        with 95 % intervals: `{"to": cell, "run": name, "scores": {metric: {mean, low, high, n}}}`, or None.

    Raises:
        RunError: a folder is no run folder.
    """
    return _lines.lines_of([_store.read(Path(folder)) for folder in run_dirs])


def _put(path: Path, text: str) -> None:
    """Atomic, so that a reader never sees half a page; lone surrogates in recovered text cannot be encoded."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(text.encode("utf-8", "replace"))
    new.replace(path)


def page(runs: Sequence[Run], trained: Sequence[Mapping[str, Any]] = ()) -> str:
    """The HTML page."""
    every = _study.places(runs)
    cells = [place for place in every if not place.control]  # a control is shown beside its cell, never as a finding
    metrics = _study.metrics(cells)
    main = metrics[0] if metrics else None
    moving = _study.varying(cells)
    usual: tuple[str, ...] = ("exact_match", "rouge1", "rouge2", "token_accuracy", "ssim", "psnr", "label_accuracy")
    shown = [*([m for m in usual if m in metrics] or metrics[:3] or usual[:1]), _heat.SECONDS]
    charted = next((m for m in ("rougeL", "rouge1", *metrics) if m in metrics), None)
    several = len({p.seed for p in cells}) > 1
    leaks = main is not None and any(_grade.recovered(main, p.mean(main)) for p in cells if p.score(main))
    return _template().render(
        leaks=leaks,
        runs=runs,
        title=" + ".join(dict.fromkeys(str(run.recipe.get("name") or run.name) for run in runs)),
        headline=_headline.headline(cells, main),
        notes=_headline.notes(cells, main),
        facts=_facts(runs, cells),
        maps=[(m, _words.metric_name(m), _heat.legend(m, cells), _heat.panels(cells, m)[:_MAPS]) for m in shown]
        if cells
        else [],
        panels=PANELS,
        cells=cells,
        metrics=metrics,
        columns=[*(moving or ["component", "layer"]), *(["seed"] if several else [])],
        names={
            (p.run.name, p.cell): _study.describe(p, moving or ["component", "layer"])
            + (f" · seed {p.seed}" if several else "")
            for p in every
        },
        open_rows=OPEN_ROWS,
        open_examples=OPEN_EXAMPLES,
        examples=_examples(cells, main),
        pictures=any(line.get("images") for run in runs for found in run.examples.values() for line in found.values()),
        private=_private(cells),
        controlled=_controls.table(every, main),
        replayed={(p.run.name, p.cell): _controls.replayed(p.line) for p in every},
        measured=_measured.tables(cells),
        atlas=_atlas.maps(cells, main),
        links=_atlas.links(cells, charted),
        verdicts=_atlas.verdicts(cells, main),
        verdict_columns=list(_atlas.readers(cells)),
        threat=_atlas.threat(cells) if cells else "",
        unclipped=any(_kind(p) == "gaussian_noise" for p in cells),
        settings=_compare.section(cells, trained),
        charts=_chart.charts(cells, charted) if charted else [],
        charted=_words.metric_name(charted or ""),
        failures=[p for p in cells if p.status != "ok" or p.line.get("reason")],
        where=[_where(run) for run in runs],
        style=Markup(_palette.stylesheet()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


@cache
def _template() -> jinja2.Template:
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(
        score=_lines.scored,
        gain=_lines.difference,
        percent=_words.percent,
        share=_words.share,
        seconds=_words.seconds,
        number=_words.number,
        cpu=_words.cpu,
        metric=_words.metric_name,
        visible=lambda value: _words.visible(str(value)),
        status=lambda value: _words.STATUSES.get(value, value),
    )
    return made.get_template("report.html.j2")


def _kind(place: Place) -> str:
    return str((place.setting.get("defense") or {}).get("kind", "none"))


def _facts(runs: Sequence[Run], cells: Sequence[Place]) -> list[tuple[str, str]]:
    """What was studied, from the recipes: one value where all cells agree, else the number of them."""

    def common(block: str, *fields: str) -> str:
        values = [tuple(_words.number((p.setting.get(block) or {}).get(f)) for f in fields) for p in cells]
        distinct = list(dict.fromkeys(values))
        shown = [" ".join(part for part in value if part != "–") for value in distinct[:3]]
        return ", ".join(shown) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")

    knowledge = [p.setting.get("knowledge") or {} for p in cells]
    granted = sorted({name for block in knowledge for name in ("labels", "lengths") if block.get(name)})
    total = sum((p.line.get("seconds") or {}).get("total") or 0.0 for p in cells)
    facts = [
        ("Model", common("model", "kind", "weights")),
        ("Task", common("model", "task")),
        ("Client's mode", common("model", "mode")),
        ("Data", common("data", "kind", "path", "id", "split")),
        ("Batch size", common("data", "batch_size")),
        ("Attack", ", ".join(dict.fromkeys(p.attack for p in cells))[:200]),
        ("Attacker knows", "weights, tokenizer, batch size" + "".join(f", {name}" for name in granted)),
        ("Cells", f"{len(cells):,}" + (f" from {len(runs)} runs" if len(runs) > 1 else "")),
        ("Seed", ", ".join(dict.fromkeys(_words.number(p.setting.get("seed")) for p in cells))[:80]),
        ("Time in cells", _words.seconds(total) if total else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _examples(
    cells: Sequence[Place], metric: str | None
) -> list[tuple[Place, list[tuple[str, int, str, list[_diff.Pair]]]]]:
    """Best, median and worst batch of cells that stored reconstructions, best-scoring cells first."""

    def level(place: Place) -> float:
        score = place.score(metric) if metric else None
        return _grade.worth(metric or "", score["mean"]) if score else -1.0

    found = []
    for place in sorted(cells, key=level, reverse=True):
        stored = place.run.examples.get(place.cell) or {}
        if not stored:
            continue
        results = place.run.batches.get(place.cell) or {}
        scores = {batch: (results.get(batch, {}).get("scores") or {}).get(metric) for batch in stored}
        if all(value is None for value in scores.values()):
            continue  # what is not an answer is not shown as one
        picks = [
            (what, batch, _words.percent(scores[batch], metric or ""), _pairs(place, stored[batch]))
            for what, batch in _diff.worth_showing(
                {b: None if v is None else _grade.worth(metric or "", v) for b, v in scores.items()}
            )
        ]
        found.append((place, [pick for pick in picks if pick[3]]))
        if len(found) == EXAMPLE_CELLS:
            break
    return [(place, picks) for place, picks in found if picks]


def _pairs(place: Place, line: Mapping[str, Any]) -> list[_diff.Pair]:
    return _pictures.pairs(place.run.folder, line) if line.get("images") else _diff.pairs(line)[:8]


def _private(cells: Sequence[Place]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each distinct guarantee once: the defense's label and its numbers."""
    found = {(p.defense, _words.key(p.line["privacy"])): p.line["privacy"] for p in cells if p.line.get("privacy")}
    return [(label, numbers) for (label, _), numbers in found.items()]


def _where(run: Run) -> dict[str, Any]:
    """What ran where: run.json flattened, the recipe, and the commands that do it again."""
    argv = run.facts.get("argv")
    command = shlex.join(str(part) for part in argv) if isinstance(argv, list) else str(argv or "")
    left_out = {"argv", "cells", "selections"}  # said elsewhere on the page, and long
    return {
        "name": run.name,
        "command": command,
        "facts": [(k, _short(v)) for k, v in _flat(run.facts) if k.split(".")[0] not in left_out],
        "recipe": run.recipe_text,
    }


def _flat(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in facts.items():
        found += (
            _flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else [(f"{before}{key}", value)]
        )
    return found


def _short(value: Any, limit: int = 400) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
