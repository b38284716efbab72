"""Share of positions whose token was recovered in place (as in TAG, Deng et al. 2021, arXiv:2103.06819).

Tokens are the model's own, special tokens removed. The denominator is the reference's length: positions beyond it
neither help nor hurt (exact_match sees them). One missing token shifts the rest, which is meant: use ROUGE for
what does not depend on the place. Answers of a batch are assigned to references by the largest total of this metric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._align import align, answers, mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmleak.records import Reconstruction, Reference

KEYS = ("token_accuracy",)


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Mean share over the references, 0..1; None where no reference has a token."""
    truth = [tokens for tokens in reference.tokens if tokens]
    recovered = align(truth, answers(reconstruction, reconstruction.tokens, len(truth), ()), _share)
    return {"token_accuracy": mean([_share(*pair) for pair in zip(truth, recovered, strict=True)])}


def _share(reference: Sequence[int], answer: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(reference, answer, strict=False)) / len(reference)
