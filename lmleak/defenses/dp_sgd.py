"""DP-SGD: per-sample gradients clipped and summed, Gaussian noise added (Abadi et al., 2016, arXiv 1607.00133).

What is released is the sum, `sum_i clip_C(g_i) + N(0, (noise_multiplier C)^2)`, before any division by a batch size:
the same thing that Opacus' optimizer computes inside `step()`, and what an observer of the update sees.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lmleak.defenses._calibration import check, meaning, noise_for_epsilon, training
from lmleak.defenses._mechanism import Gaussian
from lmleak.defenses._noise import add_normal

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "sum"
IDENTITY = {"max_grad_norm": 1e9, "noise_multiplier": 0.0}  #: fields at which the release is the clean sum
EXAMPLE = {"max_grad_norm": 1.0, "noise_multiplier": 0.1}  #: fields at which the defense does its work


class Config(BaseModel):
    """Clipping, noise, and the training run that the release is a step of.

    Noise is given as `noise_multiplier`, or by the `epsilon` that the run may spend. The observed batch is the same for
    every `sample_rate` and `steps`: they say what the whole run spends, not what one release shows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_grad_norm: float = Field(default=1.0, strict=True, description="C: L2 norm that samples are clipped to")
    noise_multiplier: float | None = Field(
        default=None, strict=True, description="standard deviation of the noise over max_grad_norm; 0 clips only"
    )
    epsilon: float | None = Field(
        default=None, strict=True, description="instead of noise_multiplier: what the run may spend at this delta"
    )
    clip_scope: Literal["model", "selection", "per_layer"] = Field(
        default="model",
        description="whose norm is clipped: the whole model's, the released selection's, or each released tensor's",
    )
    delta: float = Field(default=1e-5, strict=True, description="failure probability at which epsilon is stated")

    sample_rate: float = Field(
        default=1.0, strict=True, description="of the run: Poisson sampling rate; 1: full batches"
    )
    steps: int = Field(default=1, strict=True, description="of the run: number of releases")

    @field_validator("max_grad_norm")
    @classmethod
    def _max_grad_norm(cls, value: float) -> float:
        if not 0 < value < math.inf:
            raise ValueError(f"the clipping norm must be above 0, not {value}")
        return value

    @field_validator("noise_multiplier", "epsilon", "delta", "sample_rate", "steps")
    @classmethod
    def _means_something(cls, value: Any, field: ValidationInfo) -> Any:
        if value is not None and field.field_name:
            check(**{field.field_name: value})
        return value

    @model_validator(mode="after")
    def _one_noise(self) -> Config:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give either noise_multiplier, or the epsilon that it is to be calculated from")
        sigma(self)
        return self


def sigma(config: Config) -> float:
    """The noise multiplier, as given or as epsilon needs it."""
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    assert config.epsilon is not None
    return noise_for_epsilon(config.epsilon, config.delta, config.sample_rate, config.steps)


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The noised sum of clipped per-sample gradients.

    With `per_layer`, each tensor is clipped to C / sqrt(tensors), so that what is released still moves by at most C.

    Returns:
        Entry name -> tensor of the entry's shape; noise of standard deviation noise_multiplier * max_grad_norm.
    """
    clipped = client.clipped_sum(config.max_grad_norm, config.clip_scope)
    std = sigma(config) * config.max_grad_norm
    return {name: add_normal(tensor, std, generator) for name, tensor in clipped.items()}


def gaussian(config: Config) -> Gaussian:
    """Noise and clipping, as everybody may know them."""
    return Gaussian(sigma(config) * config.max_grad_norm, config.max_grad_norm, config.clip_scope)


def privacy(config: Config, batch_size: int) -> dict[str, Any]:
    """The guarantee of this single release, and of the training run it is a step of where the recipe says which.

    Args:
        config: clipping and noise.
        batch_size: samples in the released batch.

    Returns:
        JSON-serialisable: `epsilon` (exact; None without noise), `delta`, `mu` (Gaussian DP), `rdp_epsilon` (for
        comparison), what it refers to (`unit`, `adjacency`, `clip_scope`), all of it in one `statement`; `training`,
        the same of the whole run with `steps`, `sample_rate` and the accountant used, or None.
    """
    from lmleak.defenses._accounting import gaussian_epsilon, rdp_epsilon

    noise = sigma(config)
    epsilon = gaussian_epsilon(noise, config.delta)
    noisy = math.isfinite(epsilon)
    return {
        "epsilon": epsilon if noisy else None,
        "delta": config.delta,
        "mu": 1 / noise if noisy else None,
        "noise_multiplier": noise,
        "max_grad_norm": config.max_grad_norm,
        "clip_scope": config.clip_scope,
        "batch_size": batch_size,
        "unit": "one sample of the batch",
        "adjacency": "add or remove one sample",
        "accountant": "analytic Gaussian mechanism, one release, no subsampling" if noisy else "none: clipped only",
        "rdp_epsilon": rdp_epsilon(noise, config.delta) if noisy else None,
        "statement": _statement(config, epsilon, batch_size),
        "training": training(noise, config.sample_rate, config.steps, config.delta, batch_size / config.sample_rate)
        if _in_a_run(config)
        else None,
    }


def _in_a_run(config: Config) -> bool:
    return config.steps > 1 or config.sample_rate < 1


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
        f"adding or removing one sample (batch size public, no subsampling). {scope}"
        + ("" if _in_a_run(config) else " A training run releases many times and spends more.")
        + meaning(epsilon, config.delta, batch_size)
    )
