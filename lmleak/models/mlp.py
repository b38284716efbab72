"""MLP over flattened pixels, with ReLU: PRECODE's demonstration network (Scheliga et al., 2021, arXiv 2108.04725)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lmleak.models import _images

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "build", "load"]

MODEL_TYPES = ()
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = r"hidden\.(\d+)"
COMPONENTS = {"linear": (BLOCK,), "head": ("linear",)}


class Shape(_images.Shape):
    """The architecture."""

    hidden: tuple[int, ...] = (1024, 1024)


class Config(_images.Common):
    """How large, and how pixels are normalised."""

    weights: str = Field("random", description="a checkpoint file, or `random`")
    config: Shape = Field(default_factory=lambda: Shape.model_validate({}))


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    return _images.build(config, seed, sys.modules[__name__], "mlp")


def build(config: Config) -> Any:
    """The module, its weights drawn by PyTorch's rule."""
    from lmleak.models._mlp import Mlp

    shape = config.config
    return Mlp((shape.channels * shape.image_size**2, *shape.hidden), config.num_labels)
