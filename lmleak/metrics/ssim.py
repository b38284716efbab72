"""Structural similarity of recovered images in [0, 1], 1 is best (Wang et al. 2004; as in Scheliga, arXiv:2108.04725).

Computed by scikit-image with its window of 7 pixels (the largest that fits smaller pictures) over each channel.
A reference without an answer counts 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._images import over

if TYPE_CHECKING:
    import numpy as np

    from lmleak.records import Reconstruction, Reference

IMAGES = True
KEYS = ("ssim",)


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Mean over the references, at most 1; None where the reference is no image."""
    return {"ssim": over(reconstruction, reference, _ssim, missing=0.0)}


def prepare(config: Config) -> None:
    """Imports scikit-image, so that the first batch is not charged for it."""
    import skimage.metrics  # noqa: F401


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    from skimage.metrics import structural_similarity

    side = min(7, *x.shape[1:])
    window = side if side % 2 else side - 1
    if window < 3:
        return float((x == y).all())
    return float(structural_similarity(x, y, channel_axis=0, data_range=1.0, win_size=window))
