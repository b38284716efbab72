"""Gradients in fewer bits: half precision, int8, or signs alone (QSGD, Alistarh et al., 2016, arXiv 1610.02132).

Signs are those of signSGD (Bernstein et al., 2018, arXiv 1802.04434) times the tensor's mean magnitude (Karimireddy et
al., 2019, arXiv 1901.09847). What leaves is what the receiver decodes, in the model's dtype. No guarantee follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "mean"
IDENTITY = {"to": "float32"}  #: fields at which the release is the clean gradient
EXAMPLE = {"to": "int8"}  #: fields at which the defense does its work


class Config(BaseModel):
    """What a value is written in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    to: Literal["float32", "float16", "bfloat16", "int8", "sign"] = Field(
        description="number format; int8 has 255 even steps up to each tensor's largest magnitude"
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="of int8: to the nearest step, or up or down at random so that the mean is right"
    )


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The batch's mean gradient, written and read back.

    Values below float16's range become zero, above it the largest finite one.

    Returns:
        Entry name -> tensor of the entry's shape.
    """
    return {name: _decoded(tensor, config, generator) for name, tensor in client.mean().items()}


def _decoded(tensor: Tensor, config: Config, generator: Generator) -> Tensor:
    import torch

    if config.to == "sign":
        return tensor.sign() * tensor.abs().mean()
    if config.to != "int8":
        dtype = getattr(torch, config.to)
        most = torch.finfo(dtype).max
        return tensor.clamp(-most, most).to(dtype).to(tensor.dtype, copy=True)
    step = tensor.abs().max() / 127
    if step == 0:
        return tensor.clone()
    steps = tensor / step
    if config.rounding == "stochastic":
        # On the CPU, so that every device meets the same draw.
        draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        return (steps + draw).floor().clamp(-127, 127) * step
    return steps.round() * step


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee: rounding depends on the data alone."""
    return None
