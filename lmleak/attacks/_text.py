"""Token ids -> Reconstruction, and what the tokenizer puts around every sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmleak.records import Knowledge, Reconstruction, Status, Victim


def put(sentence: tuple[int, ...], place: int, token: int) -> tuple[int, ...]:
    """The sentence with another token in one place."""
    return (*sentence[:place], token, *sentence[place + 1 :])


@dataclass(frozen=True)
class Frame:
    """Special tokens before and after every sentence ([CLS] and [SEP] for BERT; none for GPT-2)."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of special tokens."""
        return len(self.first) + len(self.last)


def special_frame(victim: Victim, knowledge: Knowledge) -> Frame:
    """The frame, read off the tokenizer by encoding one letter; empty where it is not granted."""
    if not knowledge.special_tokens:
        return Frame((), ())
    plain = victim.processor("a", add_special_tokens=False)["input_ids"]
    whole = victim.processor("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return Frame(tuple(whole[:start]), tuple(whole[start + len(plain) :]))


def sentence(
    victim: Victim,
    sequences: Sequence[Sequence[int]],
    confidence: Sequence[float],
    details: Mapping[str, Any],
    *,
    status: Status = "ok",
    reason: str | None = None,
) -> Reconstruction:
    """A Reconstruction of token sequences: special tokens removed, decoded."""
    special = set(victim.processor.all_special_ids)
    tokens = tuple(tuple(int(t) for t in row if int(t) not in special) for row in sequences)
    return Reconstruction(
        tokens=tokens,
        texts=tuple(victim.processor.decode(list(row), skip_special_tokens=True) for row in tokens),
        confidence=tuple(float(c) for c in confidence),
        status=status,
        reason=reason,
        details=dict(details),
    )


def refuse(status: Status, reason: str, details: Mapping[str, Any] | None = None) -> Reconstruction:
    """An honest non-answer: nothing recovered, and why."""
    return Reconstruction(status=status, reason=reason, details=dict(details or {}))
