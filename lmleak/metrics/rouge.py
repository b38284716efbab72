"""ROUGE-1, ROUGE-2 and ROUGE-L F-measure of the recovered text (Lin 2004, aclanthology.org/W04-1013).

Computed by Google's rouge-score without stemming, sentence by sentence; a batch's value is the mean over its
references. The answers of a batch are assigned to its references by the largest total of ROUGE-1 + ROUGE-2, as in
LAMP's and DAGER's evaluation. ROUGE-2 of a reference of one word is undefined, not 0.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._align import align, answers, mean
from lmleak.metrics._words import Words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

    from lmleak.records import Reconstruction, Reference

KEYS = ("rouge1", "rouge2", "rougeL")


class Config(BaseModel):
    """No settings: a stemmed or differently cut ROUGE is another number under the same name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def prepare(config: Config) -> None:
    """Imports rouge-score (and with it nltk, 2 CPU seconds), so that the first batch is not charged for it."""
    _scorer()


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """F-measures in 0..1, None where the reference has no such n-gram or is no text."""
    texts = [text for text in reference.texts if text.strip()]
    recovered = align(texts, answers(reconstruction, reconstruction.texts, len(texts), ""), _similarity)
    rows = [_one(text, answer) for text, answer in zip(texts, recovered, strict=True)]
    return {key: mean([row[key] for row in rows]) for key in KEYS}


def _one(reference: str, answer: str) -> dict[str, float | None]:
    values = {key: float(value.fmeasure) for key, value in _scorer().score(reference, answer).items()}
    return values | ({"rouge2": None} if len(Words().tokenize(reference)) < 2 else {})


def _similarity(reference: str, answer: str) -> float:
    row = _one(reference, answer)
    return sum(row[key] or 0.0 for key in ("rouge1", "rouge2"))


@cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(KEYS, use_stemmer=False, tokenizer=Words())
