"""Mean squared error of recovered images in [0, 1], 0 is best (as in Geiping et al. 2020, arXiv:2003.14053).

A reference without an answer counts 1, the largest error there is. A batch's answers are assigned to its references.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._images import over, squared_error

if TYPE_CHECKING:
    from lmleak.records import Reconstruction, Reference

IMAGES = True
LOWER_IS_BETTER = True
KEYS = ("mse",)


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Mean over the references, 0..1; None where the reference is no image."""
    return {"mse": over(reconstruction, reference, squared_error, missing=1.0)}
