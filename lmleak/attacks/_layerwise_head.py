"""The head's input, the loss's slope there and the label, from the gradient of one picture's last layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks._layerwise import Layer

EXPLAINED = 0.9  #: least share of the gradient's norm in one outer product; noise: about 3 / root of the smaller side
SCALES = 4000  #: sizes of the input that are tried where no bias tells it


@dataclass(frozen=True)
class Head:
    """What stands before the last layer."""

    x: Tensor  #: [d] its input
    slope: Tensor  #: [d] of the loss there
    label: int


def read(layer: Layer, gradients: dict[str, Tensor], label: int) -> Head | str:
    """Divides by the bias's gradient; without it, seeks the input's size by what the model then gives.

    Args:
        layer: the last one.
        gradients: parameter name -> gradient, float64.
        label: of the picture.

    Returns:
        The head's input, or why it has none.
    """
    weight = gradients[f"{layer.name}.weight"]
    if not weight.any():
        return "the observed gradient of the last layer is zero"
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    share = float(values[0] / values.norm())
    if share < EXPLAINED:
        return f"the last layer's gradient is not one picture's ({share:.2g} of it is one outer product): noise"
    delta = gradients.get(f"{layer.name}.bias")
    if delta is None:
        x = _size(layer, left[:, 0] * values[0], right[0], label)
        delta = _delta(layer, x, label)
    elif not delta.any():
        return "the observed gradient of the last layer's bias is zero"
    else:
        x = delta @ weight / delta.square().sum()
    return Head(x, delta @ layer.module.weight.detach().double(), label)


def _delta(layer: Layer, x: Tensor, label: int) -> Tensor:
    """Slopes of the loss at the logits, [..., classes], for inputs [..., d]."""
    out = torch.nn.functional.linear(x, layer.module.weight.detach().double(), _bias(layer)).softmax(-1)
    out[..., label] -= 1
    return out


def _bias(layer: Layer) -> Tensor | None:
    return None if layer.module.bias is None else layer.module.bias.detach().double()


def _size(layer: Layer, column: Tensor, direction: Tensor, label: int) -> Tensor:
    """The input t * direction with slopes(t) * t nearest to the observed column; t may have either sign."""
    low, high = -6.0, 6.0
    for _ in range(6):
        sizes = torch.logspace(low, high, SCALES, dtype=torch.float64, device=column.device)
        sizes = torch.cat([sizes, -sizes])
        misses = (_delta(layer, sizes[:, None] * direction, label) * sizes[:, None] - column).norm(dim=1)
        best = float(sizes[int(misses.argmin())])
        if abs(best) <= 1e-6 * 1.01 or abs(best) >= 1e6 / 1.01:
            break
        width = (high - low) / SCALES
        middle = torch.tensor(abs(best)).double().log10().item()
        low, high = middle - 2 * width, middle + 2 * width
    return best * direction
