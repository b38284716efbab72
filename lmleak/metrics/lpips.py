"""Learned perceptual distance of recovered images, 0 is best (Zhang et al. 2018, arXiv:1801.03924).

Computed by the package `lpips` (extra `lpips`), version 0.1 of its weights. The network under it is torchvision's,
downloaded once: `alex` 233 MB, `vgg` 528 MB, `squeeze` 5 MB. Without the internet, put torchvision's file where the
message says. A reference without an answer counts 1. Pictures below 32 pixels a side are too small for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import LmleakError, MissingExtra
from lmleak.metrics._images import over, pairs

if TYPE_CHECKING:
    import numpy as np

    from lmleak.records import Reconstruction, Reference

IMAGES = True
LOWER_IS_BETTER = True
KEYS = ("lpips",)
SMALLEST = 32  #: pixels a side; AlexNet's three poolings leave nothing of less


class Config(BaseModel):
    """Which network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    net: Literal["alex", "vgg", "squeeze"] = Field("alex", description="alex is what the package's authors compare by")


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def prepare(config: Config) -> None:
    """Loads the network.

    Raises:
        MissingExtra: the package is not installed, or torchvision is not the one that fits torch.
        LmleakError: its weights cannot be had.
    """
    _network(config.net)


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Mean over the references; None where the reference is no image, or one that is too small.

    Raises:
        MissingExtra, LmleakError: as for `prepare`.
    """
    found = pairs(reconstruction, reference)
    if not found or min(found[0][0].shape[1:]) < SMALLEST:
        return {"lpips": None}
    network = _network(config.net)
    return {"lpips": over(reconstruction, reference, lambda x, y: _distance(network, x, y), missing=1.0)}


def _distance(network: Any, x: np.ndarray, y: np.ndarray) -> float:
    import torch

    # Pixels in -1..1, grey as RGB.
    both = [torch.from_numpy(image).float().expand(3, -1, -1)[None] * 2 - 1 for image in (x, y)]
    with torch.no_grad():
        return float(network(*both))


@lru_cache(maxsize=1)
def _network(net: str) -> Any:
    try:
        import lpips
    except Exception as error:  # a torchvision that does not fit torch fails by RuntimeError
        raise MissingExtra(
            f"metric 'lpips': {error}: pip install 'lmleak[lpips]' (torchvision of the same release as torch)"
        ) from error
    import torch

    try:
        with torch.random.fork_rng(devices=[]):  # the network is drawn before it is filled
            return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
    except Exception as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise LmleakError(
            f"metric 'lpips': the weights of '{net}' cannot be had ({error}); without the internet, put torchvision's "
            f"file into {folder} (TORCH_HOME names another place), or use ssim"
        ) from error
