"""Reference against recovered text, word by word, with the differences marked; and which batches are worth showing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lmleak.report import _words

#: a word, one ideograph or kana (no spaces between those), or one mark
_PIECES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+(?:['’]\w+)*|[^\w\s]")
WORDS = 120  #: shown of each text; the rest is counted
_LETTERS = 60  #: of one word, before it is cut


@dataclass(frozen=True)
class Pair:
    """One sequence: the truth and what was recovered, both as inert HTML."""

    reference: Markup
    recovered: Markup
    same: bool


def pieces(text: str) -> list[tuple[str, str]]:
    """(white space before it, word or mark); the white space is shown as one space and never compared."""
    found, end = [], 0
    text = _words.visible(text)
    for match in _PIECES.finditer(text):
        found.append((" " if match.start() > end else "", match[0]))
        end = match.end()
    return found


def pair(reference: str, recovered: str | None) -> Pair:
    """Marks what of the reference is missing (`del`) and what of the recovered text is not in the reference (`ins`)."""
    left, right = pieces(reference), pieces(recovered or "")
    # Comparison ignores case, as uncased models cannot tell it.
    keys, found = ([word.casefold() for _, word in side] for side in (left, right))
    matcher = difflib.SequenceMatcher(None, keys[:WORDS], found[:WORDS], autojunk=False)
    before: list[Markup] = []
    after: list[Markup] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        # difflib runs to the end of what it was given, so every shown word is in one of the pieces.
        before.append(_join(left[i:j], "" if tag == "equal" else "del"))
        after.append(_join(right[k:m], "mark" if tag == "equal" else "ins"))
    return Pair(_close(before, len(left)), _close(after, len(right)), keys == found)


def _close(parts: Sequence[Markup], words: int) -> Markup:
    text = Markup("").join(parts)
    return text + Markup(" <i>… {} more words</i>").format(f"{words - WORDS:,}") if words > WORDS else text


def _join(words: Sequence[tuple[str, str]], tag: str) -> Markup:
    """Words as they were spaced, inside one element."""
    if not words:
        return Markup()
    short = [(gap, word if len(word) <= _LETTERS else word[: _LETTERS - 1] + "…") for gap, word in words]
    text = Markup.escape("".join(gap + word for gap, word in short)[len(short[0][0]) :])
    return Markup(short[0][0]) + (Markup("<{0}>{1}</{0}>").format(Markup(tag), text) if tag else text)


def pairs(example: Mapping[str, Any]) -> list[Pair]:
    """One pair for each reference sequence; recovered ones are matched to them by shared words, as the metrics do."""
    references = [str(text) for text in (example.get("reference") or {}).get("texts") or ()]
    recovered = [str(text) for text in (example.get("reconstruction") or {}).get("texts") or ()]
    order = _assign(references, recovered)
    return [pair(text, recovered[order[i]] if i in order else None) for i, text in enumerate(references)]


def _assign(references: Sequence[str], recovered: Sequence[str]) -> dict[int, int]:
    if len(references) <= 1 or not recovered:
        return {0: 0} if references and recovered else {}
    from scipy.optimize import linear_sum_assignment

    left = [{word.casefold() for _, word in pieces(text)} for text in references]
    right = [{word.casefold() for _, word in pieces(text)} for text in recovered]
    gain = [[2 * len(a & b) / max(1, len(a) + len(b)) for b in right] for a in left]
    rows, columns = linear_sum_assignment(gain, maximize=True)
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def worth_showing(scores: Mapping[int, float | None], count: int = 3) -> list[tuple[str, int]]:
    """Best, median and worst batch of a cell as (what, batch); unscored ones come last, ties go to the first."""
    order = sorted(scores, key=lambda b: (scores[b] is None, -(scores[b] or 0.0), b))
    if not order:
        return []
    if len({scores[b] for b in order}) == 1:
        return [("every batch alike" if len(order) > 1 else "the batch", b) for b in order[: min(2, count)]]
    picks = dict.fromkeys([0, len(order) // 2, len(order) - 1])
    names = ["best", "median", "worst"] if len(order) > 2 else ["best", "worst"]
    return [(name, order[i]) for name, i in zip(names, list(picks)[:count], strict=False)]
