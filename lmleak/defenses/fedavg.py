"""FedAvg: several local SGD steps, of which the weights' difference leaves (McMahan et al., 2016, arXiv 1602.05629).

What is released is the pseudo-gradient (theta_0 - theta_T) / lr: the sum of the gradients met on the way. One step on
the whole batch is the mean gradient. The difference is taken as a client takes it, of weights in the model's dtype: it
carries their rounding, of the order of 1e-8 / lr for weights of 0.1 in float32. Attacks that assume one gradient meet a
mixture. No guarantee follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients

REDUCTION = "mean"
IDENTITY = {"steps": 1, "lr": 1.0}  #: fields at which the release is the clean gradient
EXAMPLE = {"steps": 4, "lr": 0.1, "local_batch_size": 1}  #: fields at which the defense does its work


class Config(BaseModel):
    """The client's local training: plain SGD, no momentum, no weight decay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(strict=True, ge=1, description="local steps")
    lr: float = Field(strict=True, gt=0, lt=float("inf"), description="local learning rate")
    local_batch_size: int | None = Field(
        None, ge=1, description="samples of a step, taken in order and from the start again; all of them by default"
    )


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The pseudo-gradient of the local steps; every trainable parameter moves, the model itself does not.

    Returns:
        Entry name -> tensor of the entry's shape.

    Raises:
        ValueError: the local steps diverged.
    """
    import torch

    from lmleak.gradients.losses import model_losses
    from lmleak.gradients.observe import client_mode, cut

    batch, victim = client.batch, client.victim
    observed = {entry.parameter for entry in client.entries}
    size = min(config.local_batch_size or len(batch.labels), len(batch.labels))
    parts = [slice(at, at + size) for at in range(0, len(batch.labels), size)]
    with client_mode(victim, client.seed) as module, torch.enable_grad():
        start = {
            name: parameter.detach()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad or name in observed
        }
        now = dict(start)
        for step in range(config.steps):
            rows = parts[step % len(parts)]
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in now.items()}
            inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
            loss = model_losses(module, inputs, batch.labels[rows], victim.task, "mean", leaves).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            now = {
                name: leaf.detach() - config.lr * grad for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
            }
    moved = {name: (start[name] - now[name]) / config.lr for name in observed}
    if not all(torch.isfinite(tensor).all() for tensor in moved.values()):
        raise ValueError(f"{config.steps} local steps at learning rate {config.lr:g} diverged")
    return {entry.name: cut(moved[entry.parameter], entry).clone() for entry in client.entries}


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee."""
    return None
