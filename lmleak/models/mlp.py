"""MLP over flattened pixels, with ReLU: PRECODE's demonstration network (Scheliga et al., 2021, arXiv 2108.04725)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmleak.models._images import Common

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "load", "outline"]

MODEL_TYPES = ()
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = r"hidden\.(\d+)"
COMPONENTS = {"head": ("linear",)}


class Shape(BaseModel):
    """The architecture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(3, ge=1)
    image_size: int = Field(32, ge=1)
    hidden: tuple[int, ...] = (1024, 1024)


class Config(Common):
    """How large, and how pixels are normalised."""

    weights: Literal["random"] = "random"
    config: Shape = Field(default_factory=lambda: Shape.model_validate({}))


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models import _images, _loading

    shape = config.config
    with _loading._own_generator(seed):
        module = _build(config)
    name = _images.drawn("mlp", shape.model_dump() | {"num_labels": config.num_labels}, seed)
    form = _images.image_format(config, shape.channels, (shape.image_size,) * 2, None, None)
    return _images.finished(config, module, form, sys.modules[__name__], "mlp", name)


def outline(config: Config) -> Victim:
    """Names and shapes alone, on the meta device."""
    import torch

    from lmleak.records import Victim

    with torch.device("meta"):
        module = _build(config)
    return Victim(module, None, sys.modules[__name__], "mlp", config.task, config.weights)


def _build(config: Config) -> Any:
    from lmleak.models._mlp import Mlp

    shape = config.config
    return Mlp((shape.channels * shape.image_size**2, *shape.hidden), config.num_labels)
