"""Distance of recovered images' Fourier magnitudes, 0 is best, blind to shifts (as in Yin et al., arXiv:2104.07586).

The mean over frequencies of `(|F x| - |F y|)^2` with the orthonormal two-dimensional transform of each channel, in
[0, 1]: at most the mean squared error (Parseval), and 0 for a picture moved in a circle. The paper names the measure
and not its norm: this one is ours, so compare it with itself. A reference without an answer counts 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lmleak.metrics._images import over

if TYPE_CHECKING:
    import numpy as np

    from lmleak.records import Reconstruction, Reference

IMAGES = True
LOWER_IS_BETTER = True
KEYS = ("fft2d",)


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Mean over the references, 0..1; None where the reference is no image."""
    return {"fft2d": over(reconstruction, reference, _distance, missing=1.0)}


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    import numpy as np

    magnitudes = [np.abs(np.fft.fft2(image, norm="ortho")) for image in (x, y)]
    return float(((magnitudes[0] - magnitudes[1]) ** 2).mean())
