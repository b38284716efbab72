"""Ranks of the systems of a stack's layers at a client's own batch, in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lmleak.attacks._layerwise import Layer, rank, stack, system
from lmleak.gradients.losses import model_losses
from lmleak.measures._release import ALL, modules
from lmleak.records import Batch, Selection, Victim


@dataclass(frozen=True)
class Solvable:
    """One layer before the last."""

    name: str
    rank: int
    unknowns: int
    index: int  #: its term of c(M)


def layers(victim: Victim, batch: Batch, selection: Selection) -> list[Solvable] | str:
    """One for each layer before the last; or why the model has no such systems."""
    double = replace(victim, module=copy.deepcopy(victim.module).double().eval())
    parts = stack(double)
    if isinstance(parts, str):
        return parts
    observed = {entry.parameter for entry in selection.entries if entry.part is None}
    slopes = _slopes(double, batch, parts)
    depth = len(parts) - 1
    found = []
    for place, (layer, dz) in enumerate(zip(parts[:-1], slopes, strict=True)):
        seen = f"{layer.name}.weight" in observed
        own = _rank(layer, dz, observed=seen)
        index = round((depth - place) / depth * (own - layer.unknowns))
        found.append(Solvable(layer.name, own, layer.unknowns, index))
    return found


def _rank(layer: Layer, dz: Tensor, *, observed: bool) -> int:
    if isinstance(layer.module, nn.Linear):
        # The gradient is one outer product with the input: it is there as soon as any output has a slope.
        return layer.unknowns if observed and bool(dz.any()) else rank(layer.module.weight.detach())
    return rank(system(layer, dz, observed=observed))


def _slopes(victim: Victim, batch: Batch, parts: list[Layer]) -> list[Tensor]:
    """Slope of the loss at every layer's output but the last one's."""
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_hook(lambda _, args, out, name=layer.name: outputs.update({name: out}))
        for layer in parts[:-1]
    ]
    inputs = {name: tensor.double() for name, tensor in batch.inputs.items()}
    with torch.enable_grad():
        loss = model_losses(victim.module, inputs, batch.labels, victim.task, "mean").sum()
        slopes = torch.autograd.grad(loss, [outputs[layer.name] for layer in parts[:-1]])
    for handle in handles:
        handle.remove()
    return [slope[0] for slope in slopes]


def rows(found: list[Solvable], selection: Selection) -> dict[str, dict[str, float | None]]:
    """One row an observed module; those that are no layer before the last are empty."""
    known = {layer.name: layer for layer in found}
    out: dict[str, dict[str, float | None]] = {}
    for name in modules(selection.entries):
        layer = known.get(name)
        if name == ALL:
            sums = [float(sum(getattr(one, key) for one in found)) for key in ("rank", "unknowns", "index")]
            out[name] = dict(zip(("rank", "unknowns", "index"), sums, strict=True))
        elif layer is None:
            out[name] = {"rank": None, "unknowns": None, "index": None}
        else:
            out[name] = {"rank": float(layer.rank), "unknowns": float(layer.unknowns), "index": float(layer.index)}
    return out
