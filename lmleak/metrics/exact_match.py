"""Share of sentences recovered whole, token for token (as in DAGER, Petrov et al. 2024, arXiv:2405.15586).

Tokens are the model's own, special tokens removed, so case and spelling count where the tokenizer keeps them.
In a batch each answer counts once: two equal references need two equal answers.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._align import answers

if TYPE_CHECKING:
    from lmleak.records import Reconstruction, Reference

KEYS = ("exact_match",)


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Share of the references in 0..1; None where no reference has a token."""
    truth = [tuple(tokens) for tokens in reference.tokens if tokens]
    if not truth:
        return {"exact_match": None}
    recovered = Counter(tuple(tokens) for tokens in answers(reconstruction, reconstruction.tokens, len(truth), ()))
    return {"exact_match": (Counter(truth) & recovered).total() / len(truth)}
