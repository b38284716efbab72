"""BatchNorm: which layers mix a batch's samples, and the statistics that a batch leaves in front of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = dict[str, tuple[Tensor, Tensor]]  #: dotted module name -> mean and variance of its input, a channel each


def norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm layer by its dotted name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}


def running(module: nn.Module) -> Statistics:
    """Running statistics, as the public weights carry them; layers without any are left out."""
    return {
        name: (part.running_mean.detach(), part.running_var.detach())
        for name, part in norms(module).items()
        if part.running_mean is not None and part.running_var is not None
    }


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Layers in training mode leave their running statistics alone inside."""
    # Without running statistics to fall back on, an evaluation-mode layer normalises by the batch: leave that as it is.
    parts = [part for part in norms(module).values() if part.training and part.track_running_stats]
    for part in parts:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in parts:
            part.track_running_stats = True


@contextmanager
def recorded(module: nn.Module) -> Iterator[Statistics]:
    """Mean and variance (divided by the count) of every BatchNorm layer's input of the forward pass inside.

    They keep their graph, so that an attack can pull them towards known ones.
    """
    found: Statistics = {}

    def hook(name: str, x: Tensor) -> None:
        over = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, over, correction=0)
        found[name] = mean, variance

    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
        for name, part in norms(module).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
