"""The code that a client's bottleneck drew (defense `precode`), read off its decoder's gradient.

The decoder is a linear layer with a bias, so for one sample its weight's gradient is the outer product of its bias's
with the code. Nothing is left of the draw then: the attacker's pass can be made to use the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmleak.records import Observation, Victim

EXPLAINED = 0.9  #: least share of the decoder's gradient, as a norm, that one outer product explains


def bottlenecks(module: nn.Module) -> dict[str, Any]:
    """Modules that draw a code, by name."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "noise_seed")}


def codes(observation: Observation, victim: Victim) -> dict[str, Tensor] | str:
    """Each bottleneck's code [1, size] in float64, by its name; or why they cannot be read."""
    parts = bottlenecks(victim.module)
    if not parts:
        return "the model has no bottleneck that draws noise"
    if observation.batch_size > 1:
        return f"{observation.batch_size} samples share the decoder's gradient: their codes are mixed in it"
    found = {}
    for name in parts:
        weight, bias = (_observed(observation, f"{name}.decode.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None:
            return f"the noise is read from weight and bias of '{name}.decode', which are not both observed"
        if not bias.any():
            return f"the observed gradient of '{name}.decode' is zero"
        code = bias @ weight / bias.square().sum()
        left = (weight - torch.outer(bias, code)).norm() / weight.norm().clamp_min(1e-300)
        if float(left) > (1 - EXPLAINED**2) ** 0.5:
            return f"the gradient of '{name}.decode' is not one sample's: noise, or a code for each place"
        found[name] = code[None]
    return found


@contextmanager
def given(victim: Victim, found: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the bottlenecks use these codes; they are put back."""
    parts = bottlenecks(victim.module)
    before = {name: part.given for name, part in parts.items()}
    for name, code in found.items():
        parts[name].given = code.to(parts[name].decode.weight)
    try:
        yield
    finally:
        for name, part in parts.items():
            part.given = before[name]


def _observed(observation: Observation, parameter: str) -> Tensor | None:
    for entry in observation.entries:
        if entry.parameter == parameter and entry.part is None:
            return observation.gradients[entry.name].double()
    return None
