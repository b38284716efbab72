"""Gaussian noise that is the same on every device and for every dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


def add_normal(tensor: Tensor, std: float, generator: Generator) -> Tensor:
    """`tensor` plus independent N(0, std^2) noise, in the tensor's shape, dtype and device.

    The normals are drawn on the CPU in float32 and scaled, so that all devices, dtypes and noise levels share one draw
    and their scores are paired. They are not cryptographically secure: good for a study, not for a deployment.
    """
    import torch

    if std == 0:
        return tensor.clone()
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device)
    # In at least float32: in bfloat16 the sum of a small gradient and smaller noise would round back to the gradient.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) + noise.to(wide) * std).to(tensor.dtype)
