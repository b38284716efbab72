"""ResNet of Hugging Face transformers, ResNet-50 by default (He et al., 2015, arXiv 1512.03385).

Layers are residual blocks, counted through all stages. `mode: train` normalises by the batch's own statistics.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lmleak.models._images import Common

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "load"]

MODEL_TYPES = ("resnet",)
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)"
COMPONENTS = {
    "conv": (r".*\.convolution",),
    "norm": (r".*\.normalization",),
    "stage": (r"(?:resnet\.)?encoder\.stages\.\d+",),
    "head": (r"classifier\.1",),
}


class Config(Common):
    """Which weights, and what pictures they read."""

    image_size: int = Field(224, ge=1, description="pixels a side; the architecture takes any")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the Hugging Face config, e.g. depths; for `weights: random`"
    )


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._images import load as load_any

    return load_any(config, seed, sys.modules[__name__], "hf_resnet")
