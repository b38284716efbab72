"""Peak signal-to-noise ratio of recovered images in [0, 1], in dB (as in Geiping et al. 2020, arXiv:2003.14053).

A batch's value is the mean of its images' decibels; a reference without an answer counts 0 dB. Where the error is
below what float32 pixels can show the value stays at 150 dB, so that a perfect answer has a mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._images import over, squared_error

if TYPE_CHECKING:
    from lmleak.records import Reconstruction, Reference

IMAGES = True
KEYS = ("psnr",)
BEST = 150.0  #: dB


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Mean over the references of 10 log10(1 / mse), in dB; None where the reference is no image."""
    return {"psnr": over(reconstruction, reference, _psnr, missing=0.0)}


def _psnr(x: Any, y: Any) -> float:
    error = squared_error(x, y)
    return min(BEST, -10 * math.log10(error)) if error > 0 else BEST
