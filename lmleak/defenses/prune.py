"""Gradient pruning: the smallest values of the mean gradient set to zero (Lin et al., 2017, arXiv 1712.01887).

Sold as a bandwidth saver, and as a defense from a share of 0.2 on (Zhu et al., 2019, arXiv 1906.08935). What is left is
exact, so it gives no guarantee of any kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "mean"
IDENTITY = {"share": 0.0}  #: fields at which the release is the clean gradient
EXAMPLE = {"share": 0.9}  #: fields at which the defense does its work


class Config(BaseModel):
    """How much is set to zero, and among what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(
        strict=True, ge=0, lt=1, description="of the values that is set to zero; 0.99 keeps the top 1 %"
    )
    scope: Literal["tensor", "selection"] = Field(
        "tensor", description="whose largest values stay: each released tensor's, or those of all released together"
    )


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The batch's mean gradient with its largest values alone; at least one value of each scope is kept.

    Returns:
        Entry name -> tensor of the entry's shape.
    """
    import torch

    mean = client.mean()
    if config.scope == "tensor":
        return {name: _largest(tensor, config.share) for name, tensor in mean.items()}
    flat = _largest(torch.cat([tensor.flatten() for tensor in mean.values()]), config.share)
    parts = flat.split([tensor.numel() for tensor in mean.values()])
    return {name: part.reshape(tensor.shape).clone() for (name, tensor), part in zip(mean.items(), parts, strict=True)}


def _largest(tensor: Tensor, share: float) -> Tensor:
    import torch

    flat = tensor.flatten()
    count = max(1, round((1 - share) * len(flat)))
    # By place, not by a threshold: equal values (a row of zeros, a quantised gradient) would all stay or all go.
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee: what is left is exact."""
    return None
