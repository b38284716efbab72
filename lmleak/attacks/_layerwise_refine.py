"""Chen and Campbell's refinement: a layer's input that also makes the gradients of all layers behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmleak.attacks._layerwise import Layer
from lmleak.attacks._pixels_terms import total_variation


@dataclass
class Solved:
    """One layer's system and its answer."""

    place: int
    layer: Layer
    matrix: Tensor  #: [rows, unknowns], rows of length 1
    target: Tensor  #: [rows]
    x: Tensor  #: [unknowns]
    missing: int  #: equations that the system lacks
    left: float  #: share of the target that x leaves unexplained


class Refine:
    """Moves a layer's input towards the observed gradients from there on, and keeps to the linear systems."""

    def __init__(self, layers: list[Layer], gradients: dict[str, Tensor], label: int, config: Any):
        self.layers, self.gradients, self.label, self.config = layers, gradients, label, config

    def __call__(self, solved: list[Solved]) -> Tensor:
        """The input of the last solved layer, refined. The systems of deficient layers behind it bind it, too."""
        config, one = self.config, solved[-1]
        behind = solved[-2] if len(solved) > 1 and solved[-2].missing else None
        names = [name for layer in self.layers[one.place :] for name in _parameters(layer) if name in self.gradients]
        weights = {
            name: parameter.detach().double().requires_grad_(name in names)
            for layer in self.layers[one.place :]
            for name, parameter in _parameters(layer).items()
        }
        x = one.x.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=config.lr * float(one.x.square().mean().sqrt().clamp_min(1e-3)))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        with torch.enable_grad():
            for _ in range(config.steps):
                value, after = self._misses(x, one.place, names, weights)
                value = value + config.systems * (one.matrix @ x - one.target).square().sum()
                if behind is not None:
                    value = value + config.systems * (behind.matrix @ after - behind.target).square().sum()
                if one.place == 0 and len(one.layer.entering) == 3:
                    value = value + config.tv * total_variation(x.reshape(1, 1, *one.layer.entering)).sum()
                (x.grad,) = torch.autograd.grad(value, [x])
                optimizer.step()
                schedule.step()
        return x.detach()

    def _misses(self, x: Tensor, place: int, names: list[str], weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over parameters of 1 - cosine, and the input of the layer behind."""
        y, after = x, x
        for layer in self.layers[place:]:
            y = _run(layer, y.reshape(1, *layer.entering), weights).flatten()
            if layer is self.layers[place]:
                after = y
        loss = torch.nn.functional.cross_entropy(y[None], torch.tensor([self.label], device=y.device))
        grads = torch.autograd.grad(loss, [weights[name] for name in names], create_graph=True)
        cosines = [
            torch.nn.functional.cosine_similarity(grad.flatten(), self.gradients[name].flatten(), dim=0)
            for name, grad in zip(names, grads, strict=True)
        ]
        return len(cosines) - torch.stack(cosines).sum(), after


def _parameters(layer: Layer) -> dict[str, Tensor]:
    return {f"{layer.name}.{name}": parameter for name, parameter in layer.module.named_parameters()}


def _run(layer: Layer, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    weight, bias = weights[f"{layer.name}.weight"], weights.get(f"{layer.name}.bias")
    part = layer.module
    if isinstance(part, nn.Linear):
        out = torch.nn.functional.linear(x, weight, bias)
    else:
        out = torch.nn.functional.conv2d(x, weight, bias, part.stride, part.padding, part.dilation)
    return out if layer.activation is None else layer.activation(out)
