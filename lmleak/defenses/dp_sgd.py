"""DP-SGD: per-sample gradients clipped and summed, Gaussian noise added (Abadi et al., 2016, arXiv 1607.00133).

What is released is the sum, `sum_i clip_C(g_i) + N(0, (noise_multiplier C)^2)`, before any division by a batch size:
the same thing that Opacus' optimizer computes inside `step()`, and what an observer of the update sees.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lmleak.defenses._mechanism import Gaussian
from lmleak.defenses._noise import add_normal

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "sum"
IDENTITY = {"max_grad_norm": 1e9, "noise_multiplier": 0.0}  #: fields at which the release is the clean sum
EXAMPLE = {"max_grad_norm": 1.0, "noise_multiplier": 0.1}  #: fields at which the defense does its work


class Config(BaseModel):
    """Clipping, noise, and the delta at which epsilon is stated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_grad_norm: float = Field(default=1.0, strict=True, description="C: L2 norm that samples are clipped to")
    noise_multiplier: float = Field(strict=True, description="standard deviation of the noise over max_grad_norm")
    clip_scope: Literal["model", "selection", "per_layer"] = Field(
        default="model",
        description="whose norm is clipped: the whole model's, the released selection's, or each released tensor's",
    )
    delta: float = Field(default=1e-5, strict=True, description="failure probability at which epsilon is stated")

    @field_validator("max_grad_norm")
    @classmethod
    def _max_grad_norm(cls, value: float) -> float:
        if not 0 < value < math.inf:
            raise ValueError(f"the clipping norm must be above 0, not {value}")
        return value

    @field_validator("noise_multiplier")
    @classmethod
    def _noise_multiplier(cls, value: float) -> float:
        if not 0 <= value < math.inf:
            raise ValueError(f"the noise multiplier must be 0 (clipping only) or more, not {value}")
        return value

    @field_validator("delta")
    @classmethod
    def _delta(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"delta is a probability strictly between 0 and 1, not {value}")
        return value


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The noised sum of clipped per-sample gradients.

    With `per_layer`, each tensor is clipped to C / sqrt(tensors), so that what is released still moves by at most C.

    Returns:
        Entry name -> tensor of the entry's shape; noise of standard deviation noise_multiplier * max_grad_norm.
    """
    clipped = client.clipped_sum(config.max_grad_norm, config.clip_scope)
    std = config.noise_multiplier * config.max_grad_norm
    return {name: add_normal(tensor, std, generator) for name, tensor in clipped.items()}


def gaussian(config: Config) -> Gaussian:
    """Noise and clipping, as everybody may know them."""
    return Gaussian(config.noise_multiplier * config.max_grad_norm, config.max_grad_norm, config.clip_scope)


def privacy(config: Config, batch_size: int) -> dict[str, Any]:
    """The guarantee of this single release; a training run of many steps spends more (`training_epsilon`).

    Args:
        config: clipping and noise.
        batch_size: samples in the released batch.

    Returns:
        JSON-serialisable: `epsilon` (exact; None without noise), `delta`, `mu` (Gaussian DP), `rdp_epsilon` (for
        comparison), what it refers to (`unit`, `adjacency`, `clip_scope`), and all of it in one `statement`.
    """
    from lmleak.defenses._accounting import gaussian_epsilon, rdp_epsilon

    sigma = config.noise_multiplier
    epsilon = gaussian_epsilon(sigma, config.delta)
    noisy = math.isfinite(epsilon)
    return {
        "epsilon": epsilon if noisy else None,
        "delta": config.delta,
        "mu": 1 / sigma if noisy else None,
        "noise_multiplier": sigma,
        "max_grad_norm": config.max_grad_norm,
        "clip_scope": config.clip_scope,
        "batch_size": batch_size,
        "unit": "one sample of the batch",
        "adjacency": "add or remove one sample",
        "accountant": "analytic Gaussian mechanism, one release, no subsampling" if noisy else "none: clipped only",
        "rdp_epsilon": rdp_epsilon(sigma, config.delta) if noisy else None,
        "statement": _statement(config, epsilon, batch_size),
    }


def _statement(config: Config, epsilon: float, batch_size: int) -> str:
    scope = {
        "model": "The norm of the whole model's gradient is clipped, so the guarantee covers the whole gradient.",
        "selection": "Only the norm of the released selection is clipped: the guarantee holds for this selection "
        "alone, and is lost if any other gradient of the same samples leaves too.",
        "per_layer": "Each released tensor is clipped on its own, to max_grad_norm / sqrt(number of tensors): the "
        "guarantee holds for this selection alone, and is lost if any other gradient of the same samples leaves too.",
    }[config.clip_scope]
    if not math.isfinite(epsilon):
        return f"Clipped only, no noise: no differential privacy (epsilon is infinite). {scope}"
    samples = "1 sample" if batch_size == 1 else f"{batch_size} samples"
    return (
        f"This single release of a batch of {samples} is ({epsilon:.3g}, {config.delta:g})-differentially private for "
        f"adding or removing one sample (batch size public, no subsampling). {scope} A training run releases many "
        "times and spends more."
    )
