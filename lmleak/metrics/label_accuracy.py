"""Share of a batch's labels that an attack names, whatever their order (as in Yin et al. 2021, arXiv:2104.07586).

Labels are counted as often as they occur: of 1, 3, 3, 7 the answer 1, 3, 7, 7 has three. An attack that names no label
has recovered none. Labels that the recipe grants to the attack are its answer too: then this is 1 and says nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._align import answers

if TYPE_CHECKING:
    from lmleak.records import Reconstruction, Reference

KEYS = ("label_accuracy",)


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Share of the reference's labels, 0..1; None where it has none (language models)."""
    if not reference.labels:
        return {"label_accuracy": None}
    found = answers(reconstruction, list(reconstruction.labels), len(reference.labels), None)
    return {"label_accuracy": (Counter(found) & Counter(reference.labels)).total() / len(reference.labels)}
