"""What a sentence is worth before any gradient is seen: words and pairs of words of a text, or a language model."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lmleak.attacks._prior import Task, load_prior
from lmleak.errors import LmleakError
from lmleak.records import Victim

LogPrior = Callable[[Sequence[tuple[int, ...]]], list[float]]  #: token sequences -> natural log of their prior
PAIRS = 0.7  #: weight of pairs of words over single ones


def log_prior(source: str, victim: Victim, task: Task) -> tuple[LogPrior, Tensor | None]:
    """A prior over token sequences, and how often each token occurs where that is known, [v].

    Args:
        source: a text file (`.txt`, one sentence a line), or a language model as `matching` takes it.
        victim: its tokenizer reads the text.
        task: of the language model.

    Raises:
        LmleakError: the file cannot be read.
        ModelError: the model cannot be had.
    """
    if not source.endswith(".txt"):
        surprise = load_prior(source, victim, task)
        special = set(victim.processor.all_special_ids)

        def by_model(rows: Sequence[tuple[int, ...]]) -> list[float]:
            own = [[t for t in row if t not in special] for row in rows]
            texts = [victim.processor.decode(row) for row in own]
            return [-float(s) * len(row) for s, row in zip(surprise(texts).tolist(), own, strict=True)]

        return by_model, None
    try:
        lines = [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LmleakError(f"attack.prior: cannot read '{source}': {error}") from None
    if not lines:
        raise LmleakError(f"attack.prior: '{source}' has no text")
    coded = victim.processor(lines, verbose=False)["input_ids"]  # a line longer than the model is no fault here
    single = Counter(token for row in coded for token in row)
    pairs = Counter(pair for row in coded for pair in itertools.pairwise(row))
    first = Counter(token for row in coded for token in row[:-1])
    size, total = len(victim.processor), sum(single.values())

    def by_counts(rows: Sequence[tuple[int, ...]]) -> list[float]:
        return [_log(row, single, pairs, first, total, size) for row in rows]

    counts = torch.ones(victim.module.get_input_embeddings().num_embeddings)
    for token, count in single.items():
        counts[token] += count
    return by_counts, counts


def _log(row: tuple[int, ...], single: Counter, pairs: Counter, first: Counter, total: int, size: int) -> float:
    """Add-one over single words, mixed with what followed the word before."""
    out = 0.0
    for before, token in zip((None, *row), row, strict=False):
        alone = (single[token] + 1) / (total + size)
        seen = first[before] if before is not None else 0
        out += math.log(PAIRS * pairs[before, token] / seen + (1 - PAIRS) * alone if seen else alone)
    return out
