"""One picture, layer by layer from the loss backwards: linear systems (R-GAP, 2010.07733; Chen 2021, 2111.10178).

The head's gradient is one outer product with its input. From there on each layer's input solves a linear system, see
`_layerwise`; where it has full rank for every layer (measure `rank_deficiency` says 0) the picture is exact. Where a
system lacks equations, its least solution is refined by matching the gradients of all layers behind it (Chen and
Campbell, 2021, arXiv 2111.10178), and what it does say is kept for the layer before, too: their pull-back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from lmleak.attacks import _layerwise
from lmleak.attacks._labels import recover_labels
from lmleak.attacks._layerwise import Layer
from lmleak.attacks._layerwise_head import read
from lmleak.attacks._layerwise_refine import Refine, Solved
from lmleak.attacks._objective import frozen
from lmleak.attacks._text import refuse
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

IMAGES = True  #: reads pictures
#: An easy case, for the contract tests.
EXAMPLE = {
    "fields": {},
    "select": {"components": ["all"]},
    "knowledge": {},
    "batch_size": 1,
    "answer": "images",
    "model": {
        "kind": "convnet",
        "config": {"image_size": 8, "channels_out": [6, 6], "kernels": 3, "strides": 1, "activation": "leaky_relu"},
    },
}


class Config(BaseModel):
    """Refinement; a network whose systems have full rank needs none of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Annotated[int, Field(ge=0)] = Field(1000, description="of a deficient layer's refinement; 0: R-GAP")
    lr: Annotated[float, Field(gt=0)] = Field(0.01, description="of its Adam, falling to 0")
    tv: Annotated[float, Field(ge=0)] = Field(1e-3, description="weight of the picture's total variation")
    systems: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of what the linear systems leave")


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Solves for the input of the head, then of each layer before it, down to the pixels. All in float64."""
    if victim.task != "image-classification":
        return refuse("not_applicable", "reads pictures, and this model reads text")
    if observation.batch_size > 1:
        return refuse("not_applicable", f"reads one picture; {observation.batch_size} share this gradient")
    layers = _layerwise.stack(victim)
    if isinstance(layers, str):
        return refuse("not_applicable", layers)
    gradients = {e.parameter: observation.gradients[e.name].double() for e in observation.entries if e.part is None}
    if f"{layers[-1].name}.weight" not in gradients:
        return refuse("not_applicable", f"needs the gradient of the last layer's weight, '{layers[-1].name}.weight'")
    label = recover_labels(observation, victim, knowledge=knowledge)
    if isinstance(label, Reconstruction):
        return label
    head = read(layers[-1], gradients, label[0])
    if isinstance(head, str):
        return refuse("no_signal", head)
    with frozen(victim.module):
        solved, pixels = _backwards(config, layers, gradients, head.x, head.slope, head.label, progress)
    form = victim.processor
    images = form.plain(pixels.reshape(1, form.channels, form.height, form.width)).float()
    details: dict[str, Any] = {
        "deficient": {one.layer.name: one.missing for one in solved if one.missing},
        "left": {one.layer.name: one.left for one in solved},
    }
    # Of the equations that a picture needs, those that were there, and how far they agreed with each other.
    lacking = max((one.missing / one.layer.unknowns for one in solved), default=0.0)
    sure = (1 - lacking) * max(0.0, 1 - max((one.left for one in solved), default=0.0))
    return Reconstruction(images=images, labels=(head.label,), confidence=(sure,), details=details)


def _backwards(
    config: Config,
    layers: list[Layer],
    gradients: dict[str, Tensor],
    x: Tensor,
    slope: Tensor,
    label: int,
    progress: Callable[[str], None],
) -> tuple[list[Solved], Tensor]:
    """From the head's input x and the loss's slope there to the pixels."""
    refine = Refine(layers, gradients, label, config)
    solved: list[Solved] = []
    for place in range(len(layers) - 2, -1, -1):
        layer = layers[place]
        z, steep = _layerwise.inverse(layer.activation, x.reshape(layer.leaving))
        dz = slope.reshape(layer.leaving) * steep
        one = _solve(layer, z, dz, gradients, place)
        solved.append(one)
        if config.steps and any(other.missing for other in solved):
            one.x = refine(solved)
        x, slope = one.x, _before(layer, dz)
        progress(f"{layer.name}: {one.missing} equations missing")
    return solved, x


def _before(layer: Layer, dz: Tensor) -> Tensor:
    """The loss's slope at the layer's input."""
    weight = layer.module.weight.detach().double()
    if isinstance(layer.module, nn.Linear):
        return dz @ weight
    shape = (1, *layer.entering)
    part = layer.module
    return conv2d_input(shape, weight, dz[None], part.stride, part.padding, part.dilation)[0]


def _solve(layer: Layer, z: Tensor, dz: Tensor, gradients: dict[str, Tensor], place: int) -> Solved:
    bias = layer.module.bias
    weight = gradients.get(f"{layer.name}.weight")
    if isinstance(layer.module, nn.Linear):
        # The bias's gradient is dz itself, and carries no error from behind.
        dz = gradients.get(f"{layer.name}.bias", dz)
        if weight is not None and dz.any():
            x = dz @ weight / dz.square().sum()
            return Solved(place, layer, torch.eye(len(x)).to(x), x, x.clone(), 0, 0.0)
        matrix, target = layer.module.weight.detach().double(), z if bias is None else z - bias.detach().double()
    else:
        matrix = _layerwise.system(layer, dz, observed=weight is not None)
        target = (z if bias is None else z - bias.detach().double()[:, None, None]).flatten()
        if weight is not None:
            target = torch.cat([target, weight.flatten()])
    lengths = matrix.norm(dim=1)
    kept = lengths > 1e-12 * lengths.max()
    matrix, target = matrix[kept] / lengths[kept, None], target[kept] / lengths[kept]
    x, missing = _layerwise.least(matrix, target)
    left = float((matrix @ x - target).norm() / target.norm().clamp_min(1e-300))
    return Solved(place, layer, matrix, target, x, missing, left)
