"""No defense: the batch's mean gradient as it is, as in federated SGD (McMahan et al., 2016, arXiv 1602.05629)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "mean"
IDENTITY: dict[str, float] = {}  #: fields at which the release is the clean gradient
EXAMPLE: dict[str, float] = {}  #: fields at which the defense does its work


class Config(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The batch's mean gradient.

    Returns:
        Entry name -> tensor of the entry's shape.
    """
    return {name: tensor.clone() for name, tensor in client.mean().items()}


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee."""
    return None
