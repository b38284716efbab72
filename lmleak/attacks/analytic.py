"""Pictures by division, where a linear layer with a bias reads the pixels (Geiping et al., 2020, arXiv 2003.14053).

Neuron r's weight gradient is the sum over samples of `delta_ir x_i`, its bias's the sum of `delta_ir`: for one picture
the quotient is the picture, whatever comes behind, a bottleneck that draws noise included. In a batch it is one
picture's wherever that picture alone passes neuron r's ReLU (Fowl et al., 2021, arXiv 2110.13057, who plant such
layers; here the layer is as it was trained): then several neurons say the same picture, and mixtures differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lmleak.attacks._objective import frozen
from lmleak.attacks._rowspace import matrix
from lmleak.attacks._text import refuse
from lmleak.gradients.losses import forward
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

IMAGES = True  #: reads pictures
#: Share of the weight's gradient, as a norm, that the quotient must explain. Noise: the root of 1 / pixels and less.
EXPLAINED = 0.5
AGREE = 1e-3  #: distance of two neurons' quotients, over their norm, at which they are one picture
OUTSIDE = 0.02  #: how far pixels may lie outside [0, 1]
#: An easy case, for the contract tests.
EXAMPLE = {
    "fields": {},
    "select": {"target_modules": ["hidden.0"]},
    "knowledge": {},
    "batch_size": 1,
    "answer": "images",
    "model": {"kind": "mlp", "config": {"image_size": 8, "hidden": [16]}},
}


class Config(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Divides the weight's gradient by the bias's in the layer that reads the pixels."""
    if victim.task != "image-classification":
        return refuse("not_applicable", "reads pictures, and this model reads text")
    layers = readers_of_pixels(victim)
    if not layers:
        return refuse("not_applicable", "no linear layer with a bias reads the pixels themselves")
    gradients = [_observed(observation, victim, name) for name in layers]
    read = [pair for pair in gradients if pair is not None]
    if not read:
        return refuse("not_applicable", f"needs the gradients of weight and bias of '{layers[0]}'")
    weight, bias = read[0]
    if not weight.any() or not bias.any():
        return refuse("no_signal", "the observed gradient is zero")
    found, details = _alone(weight, bias) if observation.batch_size == 1 else _shared(weight, bias, victim, observation)
    if isinstance(found, str):
        return refuse("no_signal", found, details)
    form = victim.processor
    images = form.plain(found.reshape(-1, form.channels, form.height, form.width)).float()
    return Reconstruction(images=images, confidence=(details["explained"],) * len(images), details=details)


def readers_of_pixels(victim: Victim) -> list[str]:
    """Linear layers with a bias whose input is the flattened picture; tried on a random one."""
    form, module = victim.processor, victim.module
    weight = next(module.parameters())
    shape = (1, form.channels, form.height, form.width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, args: tuple) -> None:
            if args[0].numel() == pixels.numel() and torch.equal(args[0].flatten(), pixels.flatten()):
                found.append(name)

        return hook

    linear = {n: part for n, part in module.named_modules() if isinstance(part, nn.Linear) and part.bias is not None}
    handles = [part.register_forward_pre_hook(look(name)) for name, part in linear.items()]
    try:
        with torch.no_grad(), frozen(module):
            forward(module, {"pixel_values": pixels})
    finally:
        for handle in handles:
            handle.remove()
    return found


def _observed(observation: Observation, victim: Victim, name: str) -> tuple[Tensor, Tensor] | None:
    """Gradients of weight [neurons, pixels] and bias [neurons] in float64."""
    parts = {e.parameter.rpartition(".")[2]: e for e in observation.entries if e.module == name and e.part is None}
    if not {"weight", "bias"} <= set(parts):
        return None
    weight = matrix(victim.module, parts["weight"], observation.gradients[parts["weight"].name])
    return weight.double(), observation.gradients[parts["bias"].name].double()


def _alone(weight: Tensor, bias: Tensor) -> tuple[Tensor | str, dict[str, Any]]:
    """One picture: least squares over all neurons, so that their rounding averages out."""
    picture = bias @ weight / bias.square().sum()
    left = float((weight - torch.outer(bias, picture)).norm() / weight.norm())
    details = {"explained": (max(0.0, 1 - left**2)) ** 0.5}
    if details["explained"] < EXPLAINED:
        return f"no picture explains the gradient (at most {details['explained']:.2g} of it): noise", details
    return picture, details


def _shared(
    weight: Tensor, bias: Tensor, victim: Victim, observation: Observation
) -> tuple[Tensor | str, dict[str, Any]]:
    """Pictures that two neurons or more agree on and that have valid pixels."""
    live = bias.abs() > 1e-6 * bias.abs().max()
    quotients = weight[live] / bias[live, None]
    form = victim.processor
    shape = (-1, form.channels, form.height, form.width)
    low, high = (
        form.normalised(torch.full((1, *shape[1:]), value, dtype=torch.float64, device=weight.device)).flatten()
        for value in (-OUTSIDE, 1 + OUTSIDE)
    )
    quotients = quotients[((quotients >= low) & (quotients <= high)).all(1)]
    kept: list[Tensor] = []
    votes: list[int] = []
    # Each pair once: quotients of one picture differ by rounding only.
    apart = torch.cdist(quotients, quotients) / quotients.norm(dim=1).clamp_min(1e-12)
    free = torch.ones(len(quotients), dtype=torch.bool, device=weight.device)
    for row in (apart < AGREE).sum(1).argsort(descending=True).tolist():
        same = (apart[row] < AGREE) & free
        if free[row] and same.sum() > 1:
            kept.append(quotients[same].mean(0))
            votes.append(int(same.sum()))
        free &= ~same
    details = {"neurons": votes[: observation.batch_size], "explained": 1.0}
    if not kept:
        return "no two neurons say the same picture: none of them is passed by one picture alone", details
    return torch.stack(kept[: observation.batch_size]), details
