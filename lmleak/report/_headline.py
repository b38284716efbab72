"""The answer in plain words, derived from the numbers: what leaks, from how little, and what stops it."""

from __future__ import annotations

from collections.abc import Sequence

from lmleak.report import _grade, _study, _words
from lmleak.report._study import Place

ENOUGH = 100  #: batches below which a score is an impression, not a claim


def headline(cells: Sequence[Place], metric: str | None) -> str:
    """One sentence. Honest where nothing leaked, nothing ran or nothing applied."""
    scored = [place for place in cells if metric and place.score(metric)]
    if not cells:
        return "This run holds no finished cell yet."
    if not scored or not metric:
        return _nothing_scored(cells)
    plain = [place for place in scored if not place.defended] or scored
    best = _best(plain, metric)
    behind = f" Behind {best.defense}:" if best.defended else ""
    level = best.mean(metric)
    who = f"{behind} Anyone who sees the gradient of {_seen(best)}".strip()
    if metric == "exact_match" and level > 0:
        return f"{who} reads {_count(best, metric)} word for word."
    words = next((m for m in ("rouge1", "rougeL", "token_accuracy") if best.score(m)), None)
    if metric == "exact_match" and words:
        best = _best(plain, words)
        level = best.mean(words)
        if level > 0:
            return (
                f"No sentence was read word for word. At most {_words.percent(level)} % of the words came back "
                f"({_words.metric_name(words)}), from the gradient of {_seen(best)}."
            )
    if _grade.recovered(metric, level):
        unit = " dB" if metric == "psnr" else "" if metric in _grade.LOWER else " %"
        return (
            f"{who} recovers the data at {_words.metric_name(metric)} {_words.percent(level, metric)}{unit}.".replace(
                ", dB", ""
            )
        )
    if metric in _grade.RECOGNISABLE:
        shown = f"{_words.metric_name(metric).removesuffix(', dB')} {_words.percent(level, metric)}"
        return f"No picture was recovered{_grade.limit(metric)}: the best answer has {shown}."
    return (
        f"Nothing was recovered in any of the {len(scored):,} settings that were tried."
        if len(scored) > 1
        else "Nothing was recovered."
    )


def _nothing_scored(cells: Sequence[Place]) -> str:
    statuses = {place.status for place in cells}
    if statuses == {"failed"}:
        what = "The only cell failed" if len(cells) == 1 else f"All {len(cells):,} cells failed"
        return f"{what}: this run says nothing about leakage."
    if statuses == {"not_applicable"}:
        return "The attack does not apply to what was observed: this run says nothing about leakage."
    return "No cell has a score: this run says nothing about leakage."


def notes(cells: Sequence[Place], metric: str | None) -> list[str]:
    """Two to five sentences under the headline: where it stops, what a defense did, and what to be careful about."""
    scored = [place for place in cells if metric and place.score(metric)]
    if not scored or not metric:
        return []
    found = [*_extent(scored, metric), *_defenses(scored, metric)]
    if not any(_grade.recovered(metric, place.mean(metric)) for place in scored):
        found.append("That an attack fails is no proof of safety: a stronger one may succeed.")
    without = len(cells) - len(scored)
    if without:
        counts = {status: sum(place.status == status for place in cells) for status in _words.STATUSES}
        parts = [
            f"{count} {_words.STATUSES[status].replace('n/a', 'not applicable')}"
            for status, count in counts.items()
            if count
        ]
        found.append(
            f"{without:,} of {len(cells):,} cells have no score ({', '.join(parts) or 'undefined'}); "
            "they do not count as 0, and are not shown to be safe."
        )
    counted = {int((place.score(metric) or {}).get("n") or 0) for place in scored}
    if min(counted) < ENOUGH:
        batches = f"{_between(min(counted), max(counted))} batch{'es' if max(counted) != 1 else ''}"
        found.append(f"Scores rest on {batches} a cell: an impression. A claim takes {ENOUGH} or more.")
    return found


def _extent(scored: Sequence[Place], metric: str) -> list[str]:
    plain = [place for place in scored if not place.defended] or list(scored)
    verb = "at least one sentence is read word for word" if metric == "exact_match" else "something is recovered"
    verb = f"pictures are recovered{_grade.limit(metric)}" if metric in _grade.RECOGNISABLE else verb
    leaking = [place for place in plain if _grade.recovered(metric, place.mean(metric))]
    found = []
    if len(plain) > 1 and leaking:
        kind = "undefended " if any(place.defended for place in scored) and not plain[0].defended else ""
        found.append(f"In {len(leaking):,} of {len(plain):,} {kind}settings {verb}.")
    layers = [layer for layer in _study.ordered(plain, "layer") if layer.lstrip("-").isdigit()]
    if len(layers) > 1 and leaking:
        open_ones = {place.layer for place in leaking}
        safe = [layer for layer in layers if layer not in open_ones]
        if safe:
            found.append(f"It happens in {_runs(layers, open_ones)}, and nowhere in {_runs(layers, set(safe))}.")
    return found


def _defenses(scored: Sequence[Place], metric: str) -> list[str]:
    if not any(place.defended for place in scored) or not any(not place.defended for place in scored):
        return []
    found: list[str] = []
    stopped: list[str] = []
    untold: list[str] = []
    read = {_watched(p) for p in scored if not p.defended and _grade.recovered(metric, p.mean(metric))}
    names = [d for d in _study.ordered(scored, "defense") if any(p.defense == d and p.defended for p in scored)]
    for name in names:
        best = _best([place for place in scored if place.defense == name], metric)
        epsilon = (best.line.get("privacy") or {}).get("epsilon")
        label = f"{name} (ε\u00a0{_words.number(epsilon)})" if epsilon is not None else name
        level = best.mean(metric)
        if not _grade.recovered(metric, level):
            behind = {_watched(place) for place in scored if place.defense == name}
            (stopped if behind & read else untold).append(label)
        elif metric == "exact_match":
            found.append(f"With {label} the attack still reads {_count(best, metric)}.")
        else:
            found.append(f"With {label} the best score is {_words.percent(level, metric)}.")
    if len(found) > 3:
        found[3:] = [f"{len(found) - 3} more defense settings leak too."]
    what = "none word for word" if metric == "exact_match" else "nothing"
    if stopped:
        found.append(f"The attack reads {what} with {_listed(stopped)}.")
    if untold:
        found.append(f"It reads {what} with or without {_listed(untold)}: what they stop, this run does not tell.")
    return found


def _watched(place: Place) -> tuple[str, str, str]:
    """What a defended cell shares with the undefended one that it is compared to: any attack may have read that."""
    return place.component, place.layer, place.other


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")


def _best(cells: Sequence[Place], metric: str) -> Place:
    """Highest score; among equals the one that needed to see least."""
    return min(
        cells,
        key=lambda place: (-_grade.worth(metric, place.mean(metric)), 1.0 if place.share is None else place.share),
    )


def _seen(place: Place) -> str:
    what = _words.seen(place.setting.get("select") or {})
    return (
        f"{what} ({_words.share(place.share)} of the model)"
        if place.share is not None and place.share < 0.9995
        else what
    )


def _count(place: Place, metric: str) -> str:
    score = place.score(metric) or {}
    total = int(score.get("n") or 0) * place.batch_size
    hits = round(float(score["mean"]) * total)
    unit = "sentence" if total == 1 else "sentences"
    if total == 0:
        return f"{_words.percent(score['mean'])} % of the sentences"
    return f"all {total:,} {unit}" if hits == total and total > 1 else f"{hits:,} of {total:,} {unit}"


def _runs(order: Sequence[str], chosen: set[str]) -> str:
    """`{0, 1, 2, 5}` -> `layers 0–2, 5`."""
    numbers = sorted(int(layer) for layer in order if layer in chosen)
    name = "layer " if len(numbers) == 1 else "layers "
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return name + ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
