"""Gaussian noise of fixed size on the mean gradient, not clipped: no epsilon (Zhu et al., 2019, arXiv 1906.08935).

Without clipping one sample can move the gradient by any amount, so no epsilon follows from the noise: for a guarantee
use `dp_sgd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmleak.defenses._mechanism import Gaussian
from lmleak.defenses._noise import add_normal

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "mean"
IDENTITY = {"std": 0.0}  #: fields at which the release is the clean gradient
EXAMPLE = {"std": 1e-3}  #: fields at which the defense does its work


class Config(BaseModel):
    """How much noise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    std: float = Field(strict=True, description="standard deviation of the noise, in the gradient's own units")

    @model_validator(mode="before")
    @classmethod
    def _no_epsilon(cls, fields: Any) -> Any:
        for name in ("epsilon", "delta", "noise_multiplier", "max_grad_norm"):
            if isinstance(fields, dict) and name in fields:
                raise ValueError(f"noise without clipping has no epsilon, so there is no {name} here; use dp_sgd")
        return fields

    @field_validator("std")
    @classmethod
    def _std(cls, value: float) -> float:
        if not 0 <= value < float("inf"):
            raise ValueError(f"the noise's standard deviation must be 0 or more, not {value}")
        return value


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The batch's mean gradient plus noise, independent for every value.

    Returns:
        Entry name -> tensor of the entry's shape.
    """
    return {name: add_normal(tensor, config.std, generator) for name, tensor in client.mean().items()}


def gaussian(config: Config) -> Gaussian:
    """The noise; nothing is clipped."""
    return Gaussian(config.std, None, None)


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee: the gradient is not clipped, so its sensitivity is unbounded."""
    return None
