"""Small convolutional network of any sizes; by default the sigmoid LeNet of DLG (Zhu et al., 2019, arXiv 1906.08935).

A number for kernels, strides, paddings or pools holds for every convolution. Layers count the convolutions, then the
hidden fully connected layers. The ConvNet of Inverting Gradients (Geiping et al., 2020, arXiv 2003.14053) is
`channels_out: [64, 128, 128, 256, 256, 256, 256, 256, 256]`, `kernels: 3`, `strides: 1`, `paddings: 1`,
`pools: [1, 1, 1, 1, 1, 3, 1, 1, 3]`, `norm: batch`, `activation: relu`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lmleak.errors import ModelError
from lmleak.models import _images

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "build", "load"]

MODEL_TYPES = ()
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = r"layers\.(\d+)"
COMPONENTS = {
    "conv": ("conv",),
    "norm": ("norm",),
    "linear": ("dense",),
    "head": ("linear",),
}


class Shape(_images.Shape):
    """The architecture."""

    channels_out: tuple[PositiveInt, ...] = Field((12, 12, 12), description="of each convolution; may be empty")
    kernels: PositiveInt | tuple[PositiveInt, ...] = 5
    strides: PositiveInt | tuple[PositiveInt, ...] = (2, 2, 1)
    paddings: NonNegativeInt | tuple[NonNegativeInt, ...] = 2
    pools: PositiveInt | tuple[PositiveInt, ...] = Field(1, description="max pooling behind it, places a side; 1: none")
    hidden: tuple[PositiveInt, ...] = Field((), description="widths of fully connected layers before the head")
    activation: Literal["relu", "leaky_relu", "tanh", "sigmoid", "softplus"] = "sigmoid"
    norm: Literal["none", "batch"] = Field("none", description="batch norm between convolution and activation")
    bias: bool = True
    spread: float | None = Field(
        None, gt=0, description="draws weights and biases evenly from -spread to spread (DLG: 0.5); else PyTorch's rule"
    )


class Config(_images.Common):
    """How large, and how pixels are normalised."""

    weights: str = Field("random", description="a checkpoint file, or `random`")
    config: Shape = Field(default_factory=lambda: Shape.model_validate({}))


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    return _images.build(config, seed, sys.modules[__name__], "convnet")


def build(config: Config) -> Any:
    """The module with drawn weights.

    Raises:
        ModelError: lists of different lengths, or pictures too small for the convolutions.
    """
    import torch

    from lmleak.models._convnet import ConvNet, Step

    shape, count = config.config, len(config.config.channels_out)
    each: dict[str, tuple[int, ...]] = {}
    for name in ("kernels", "strides", "paddings", "pools"):
        value = getattr(shape, name)
        each[name] = (value,) * count if isinstance(value, int) else value
        if len(each[name]) != count:
            raise ModelError(f"model.config.{name}: {len(each[name])} values for {count} convolutions (channels_out)")
    steps = [Step(*values) for values in zip(shape.channels_out, *each.values(), strict=True)]
    size = shape.image_size
    for place, step in enumerate(steps):
        size, before = step.after(size), size
        if size < 1:
            raise ModelError(f"model.config: convolution {place} has no place for its kernel in {before} x {before}")
    module = ConvNet(
        shape.channels,
        shape.image_size,
        steps,
        shape.hidden,
        config.num_labels,
        activation=shape.activation,
        norm=shape.norm == "batch",
        bias=shape.bias,
    )
    if shape.spread is not None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.uniform_(-shape.spread, shape.spread)
    return module
