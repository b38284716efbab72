"""A copy to be trained, and per-sample clipping of its gradients by Opacus' hooks, with nothing skipped in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmleak.errors import LmleakError, ModelError
from lmleak.gradients import select
from lmleak.records import Victim


def trainable(victim: Victim, parameters: Mapping[str, Any]) -> Victim:
    """A copy of the victim to be trained, with everything frozen that is not selected.

    GPT-2's Conv1D becomes the Linear layer it is (its weight transposed), because ghost clipping knows Linear.

    Raises:
        SelectionError: a parameter that is selected is not in the model.
        LmleakError: a component's slice of a fused weight, which cannot be trained on its own.
    """
    wanted = select(victim, **parameters).entries
    sliced = next((entry for entry in wanted if entry.part is not None), None)
    if sliced:
        raise LmleakError(f"utility.select: {sliced.name} is part of a fused weight; train the whole of it")
    module = copy.deepcopy(victim.module)
    names = {entry.parameter for entry in wanted}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    for path, child in list(module.named_modules()):
        if isinstance(child, Conv1D):
            owner, _, last = path.rpartition(".")
            setattr(module.get_submodule(owner), last, _linear(child))
    for child in module.modules():
        # Off in both kinds of run: one budget, and no third source of randomness.
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    return replace(victim, module=module)


def _linear(layer: Conv1D) -> nn.Linear:
    columns, rows = layer.weight.shape
    made = nn.Linear(columns, rows, device=layer.weight.device, dtype=layer.weight.dtype)
    made.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=layer.weight.requires_grad)
    made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return made


class Ghost:
    """Leaves the sum of clipped per-sample gradients in `.grad`, by Opacus' hooks on the module."""

    def __init__(self, module: nn.Module, max_grad_norm: float):
        """Sets hooks that stay: hand in a copy.

        Raises:
            ModelError: a trained weight is tied, or sits in a module whose samples Opacus cannot tell apart.
        """
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Hooks

        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        owners = [id(p) for _, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
        tied = [name for name, p in self.parameters.items() if owners.count(id(p)) > 1]
        if tied:
            raise ModelError(
                f"utility: {tied[0]} is tied; per-sample gradients of its uses would have to be added first"
            )
        module.train()  # Opacus records nothing in eval mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.hooks = Hooks(module, loss_reduction="sum", max_grad_norm=max_grad_norm, strict=False)

    def backward(self, losses: Tensor) -> Tensor:
        """Adds the clipped gradients of the samples' own losses; returns the norms before clipping, [b].

        Raises:
            ModelError: a trained parameter got no per-sample gradient. It would be trained unclipped, or not at all.
        """
        for parameter in self.parameters.values():
            parameter._norm_sample = None  # type: ignore[attr-defined]
        trained = list(self.parameters.values())
        with warnings.catch_warnings():
            # The first layer's inputs are token ids: its hook fires for its output, which is what is needed.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            torch.autograd.grad(losses.sum(), trained, retain_graph=True, allow_unused=True)
            for name, parameter in self.parameters.items():
                found = parameter._norm_sample  # type: ignore[attr-defined]
                if found is None or found.shape != losses.shape:
                    raise ModelError(f"utility: {name} has no per-sample gradient, so it cannot be trained privately")
            weights = self.hooks.get_clipping_coef().detach()
            self.hooks.disable_hooks()
            (weights * losses).sum().backward()
            self.hooks.enable_hooks()
        return self.hooks.per_sample_gradient_norms.detach()
