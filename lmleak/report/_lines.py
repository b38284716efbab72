"""`lmleak compare`: the cells of several runs as one list of lines, with paired differences, and as a plain table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

from lmleak.report import _controls, _grade, _measured, _study, _words
from lmleak.report._study import Place, Run


def lines_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each cell's own line, unchanged, with `run` and `difference` added, and `gain` where it has controls."""
    cells = _study.places(runs)
    bases, gains = _bases(cells), _controls.gains(cells)
    return [
        {
            **place.line,
            "run": place.run.name,
            "difference": _difference(place, bases.get(_apart(place))),
            **({"gain": gain} if (gain := gains.get((place.run.name, place.cell))) else {}),
        }
        for place in cells
    ]


def _apart(place: Place) -> tuple[str, ...]:
    """Everything that a cell is, except its defense: cells that agree in it are paired."""
    setting = {
        key: value for key, value in place.setting.items() if key not in ("defense", "name", "metrics", "measures")
    }
    return (_words.key(setting),)


def _bases(cells: Sequence[Place]) -> dict[tuple[str, ...], Place]:
    """For each setting the cell to compare with: the undefended one, else the first that was run."""
    found: dict[tuple[str, ...], Place] = {}
    for place in cells:
        base = found.get(_apart(place))
        if base is None or (base.defended and not place.defended):
            found[_apart(place)] = place
    return found


def _difference(place: Place, base: Place | None) -> dict[str, Any] | None:
    """Score minus the base's on the same batches, with interval; None for the base itself."""
    if base is None or base is place:
        return None
    from lmleak import metrics

    mine, theirs = place.run.batches.get(place.cell, {}), base.run.batches.get(base.cell, {})
    found = {}
    for name in place.line.get("scores") or {}:
        values = [
            (a, b)
            for batch in sorted(mine.keys() & theirs.keys())
            if (a := (mine[batch].get("scores") or {}).get(name)) is not None
            and (b := (theirs[batch].get("scores") or {}).get(name)) is not None
        ]
        if values:
            score = metrics.paired_difference([a for a, _ in values], [b for _, b in values])
            if score:
                found[name] = {"mean": score.mean, "low": score.low, "high": score.high, "n": score.n}
    return {"to": base.cell, "run": base.run.name, "scores": found} if found else None


_STATED = 6  #: guarantees told under a table; a study of 20 noise levels would fill two screens


def print_table(lines: Sequence[Mapping[str, Any]], file: IO[str] | None = None) -> None:
    """Prints lines of `compare` or of a run: axes, scores in percent with 95 % intervals, CPU seconds, share.

    Args:
        lines: as returned by `compare`, or the aggregated cell lines of a run.
        file: where to; standard output by default. A file that is no terminal gets the same table, uncoloured, whole.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not lines:
        console.print("no cells")
        return
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, markup=False, emoji=False, width=10_000)
    several = len({line.get("run") for line in lines}) > 1
    axes = list(dict.fromkeys(axis for line in lines for axis in line.get("axes") or {}))
    names = [m for m in ("exact_match", "rouge1", "rouge2", "rougeL", "token_accuracy") if _any(lines, m)]
    names += sorted(
        {m for line in lines for m in line.get("scores_all") or line.get("scores") or {}}
        - {*names, "exact_match", "rouge1", "rouge2", "rougeL", "token_accuracy"}
    )
    moved = {
        m: v for line in lines for m, v in ((line.get("difference") or {}).get("scores") or {}).items() if v["mean"]
    }
    compared = next((m for m in names if m in moved), None)
    measured = _measured.columns(lines)
    private = any((line.get("privacy") or {}).get("epsilon") is not None for line in lines)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [*(["run"] if several else []), *(axes or ["cell"]), "status", *names]
    gained = list(dict.fromkeys(control for line in lines for control in line.get("gain") or {})) if names else []
    columns += [
        *([f"{compared} vs base"] if compared else []),
        *(f"{names[0]} over {control}" for control in gained),
        *(["ε"] if private else []),
        *(name for _, name in measured),
    ]
    columns += ["CPU s", "share"]
    for column in columns:
        table.add_column(
            column, justify="left" if column in (*axes, "run", "cell", "status") else "right", no_wrap=True
        )
    named = _words.labels(v for line in lines for v in (line.get("axes") or {}).values() if _words.is_block(v))
    for line in lines:
        row = [*([str(line.get("run"))] if several else [])]
        values = [(a, (line.get("axes") or {}).get(a)) for a in axes]
        row += [named[_words.key(v)] if _words.is_block(v) else axis_value(v) for _, v in values] or [str(line["cell"])]
        row += [_status(line), *(scored(line, m) for m in names)]
        if compared:
            row.append(
                _shown(((line.get("difference") or {}).get("scores") or {}).get(compared), compared, signed=True)
            )
        for control in gained:
            gain = ((line.get("gain") or {}).get(control) or {}).get("scores") or {}
            row.append(_shown(gain.get(names[0]), names[0], signed=True))
        if private:
            row.append(_words.number((line.get("privacy") or {}).get("epsilon")))
        row += [_measured.shown(line, kind, name) for kind, name in measured]
        cpu = (line.get("seconds") or {}).get("attack_cpu")
        row += [_words.cpu(cpu), _words.share((line.get("select") or {}).get("share"))]
        table.add_row(*(Text(_words.visible(value)) for value in row))
    console.print(table)
    for line in lines:
        if measures := _controls.replayed(line):
            console.print(Text(f"replay: {line['cell']}: at the true input {measures}"))
    reasons: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line["status"] != "ok" and line.get("reason"):
            reasons.setdefault((str(line["status"]), str(line["reason"])), []).append(str(line["cell"]))
    for (status, reason), where in reasons.items():
        which = where[0] if len(where) == 1 else f"{len(where)} cells"
        console.print(Text(_words.visible(f"{status}: {which}: {reason}")[:500]))
    stated = _words.guarantees(line.get("privacy") for line in lines)
    for words in stated[:_STATED]:
        console.print(Text(_words.visible(f"privacy: {words}")))
    if len(stated) > _STATED:
        console.print(f"privacy: {len(stated) - _STATED} more settings; the report says what each guarantees")


def _status(line: Mapping[str, Any]) -> str:
    """`ok 3/5` where not every batch was answered."""
    counts = {k: v for k, v in (line.get("batches") or {}).items() if k != "missing"}
    part = line["status"] == "ok" and counts.get("ok") and len(counts) > 1
    return f"ok {counts['ok']}/{sum(counts.values())}" if part else str(line["status"])


def _any(lines: Sequence[Mapping[str, Any]], metric: str) -> bool:
    return any(metric in (line.get("scores_all") or line.get("scores") or {}) for line in lines)


def axis_value(value: Any) -> str:
    """A swept value in few characters: a block as its kind and fields, a list without brackets."""
    if isinstance(value, Mapping):
        fields = " ".join(f"{k}={_words.number(v)}" for k, v in value.items() if k != "kind" and v is not None)
        return f"{value.get('kind', '')} {fields}".strip()
    return "all" if value is None else _words.number(value) if not isinstance(value, int) else str(value)


def scored(line: Mapping[str, Any], metric: str) -> str:
    """`97 [93, 100]` in percent over all batches; in brackets where it is of best guesses alone; or a dash."""
    shown = _shown(_study.best(line, metric), metric)
    return f"({shown})" if line["status"] == "budget_exhausted" and shown != "–" else shown


def difference(score: Mapping[str, Any] | None, metric: str) -> str:
    """`+42 [30, 55]` in points, or a dash."""
    return _shown(score, metric, signed=True)


def _shown(score: Mapping[str, Any] | None, metric: str, signed: bool = False) -> str:
    if not score or score.get("mean") is None:
        return "–"

    def text(value: float) -> str:
        return ("+" if signed and value > 0 else "") + (
            _words.percent(value, metric)
            if not signed or metric == "psnr" or metric in _grade.LOWER
            else f"{100 * value:.0f}".replace("-", "−").replace("−0", "0")
        )

    if score.get("low") is None or score.get("high") is None:
        return text(score["mean"])
    return f"{text(score['mean'])} [{text(score['low'])}, {text(score['high'])}]"
