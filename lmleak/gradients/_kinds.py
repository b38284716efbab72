"""The kinds of modules with a factored gradient: from a module's input and output gradient to `left` and `right`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SUPPORTED = ("Linear", "Conv1D", "Conv2d", "Embedding", "LayerNorm", "RMSNorm", "BatchNorm2d in eval mode")
_KINDS = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.BatchNorm2d)


def supported(owner: nn.Module, name: str) -> bool:
    """Whether the gradient of the module's parameter `name` has factors here."""
    if name not in ("weight", "bias"):
        return False
    if is_rms_norm(owner):
        return owner.get_parameter("weight").ndim == 1
    # A subclass with a forward of its own is another layer: OPT adds 2 to its position ids, BART scales its words.
    kind = next((kind for kind in _KINDS if isinstance(owner, kind)), None)
    if kind is None or type(owner).forward is not kind.forward:
        return False
    if isinstance(owner, nn.Conv2d):
        return owner.groups == 1 and owner.padding_mode == "zeros"
    if isinstance(owner, nn.Embedding):
        return owner.max_norm is None and not owner.scale_grad_by_freq
    if isinstance(owner, nn.BatchNorm2d):
        return not owner.training and owner.running_mean is not None
    return not isinstance(owner, nn.LayerNorm) or len(owner.normalized_shape) == 1


def left_right(owner: nn.Module, name: str, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """`left` and `right` of a Factor of one parameter.

    Args:
        owner: a supported module.
        name: weight or bias.
        x: the module's input, [n, ...].
        delta: gradient of the losses with respect to its output, [n, ...].
    """
    if isinstance(owner, (nn.Conv2d, nn.BatchNorm2d)):
        rows = delta.flatten(2).transpose(1, 2)  # [n, places, channels]
    else:
        rows = delta.reshape(delta.shape[0], -1, delta.shape[-1])
    if name == "bias":
        return _elementwise(rows)
    if isinstance(owner, nn.Embedding):
        if owner.padding_idx is not None:
            rows = rows * (x != owner.padding_idx).reshape(rows.shape[:2])[..., None]
        return x.reshape(x.shape[0], -1), rows
    if isinstance(owner, nn.LayerNorm) or is_rms_norm(owner):
        return _elementwise((normalised(owner, x) * delta).reshape(rows.shape))
    if isinstance(owner, nn.BatchNorm2d):
        unit = F.batch_norm(x, owner.running_mean, owner.running_var, eps=owner.eps)
        return _elementwise(unit.flatten(2).transpose(1, 2) * rows)
    if isinstance(owner, nn.Conv2d):
        padding: int | tuple[int, ...] = 0
        if isinstance(owner.padding, str):
            x = F.pad(x, owner._reversed_padding_repeated_twice)
        else:
            padding = owner.padding
        patches = F.unfold(x, owner.kernel_size, owner.dilation, padding, owner.stride)
        return rows, patches.transpose(1, 2)
    inputs = x.reshape(x.shape[0], -1, x.shape[-1])
    return (inputs, rows) if isinstance(owner, Conv1D) else (rows, inputs)


def normalised(owner: nn.Module, x: Tensor) -> Tensor:
    """What a LayerNorm or RMSNorm multiplies by its weight."""
    if isinstance(owner, nn.LayerNorm):
        return F.layer_norm(x, owner.normalized_shape, eps=owner.eps)
    eps = getattr(owner, "variance_epsilon", getattr(owner, "eps", 1e-6))
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # torch.nn.RMSNorm's default
    # transformers' norms go through float32 and back in every dtype, torch's own stays in the input's.
    wide = x if isinstance(owner, nn.RMSNorm) else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _elementwise(terms: Tensor) -> tuple[Tensor, Tensor]:
    left = terms.sum(1, keepdim=True)
    return left, left.new_ones(left.shape[0], 1, 1)


def is_rms_norm(owner: nn.Module) -> bool:
    """Whether the module is any library's RMSNorm."""
    return type(owner).__name__.endswith("RMSNorm")
