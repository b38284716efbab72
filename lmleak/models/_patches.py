"""Closed form of what the query, key and value of a vision transformer's first block read, patch by patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchLayer:
    """`LayerNorm(projection patch + offset[place])`. Tensors are detached from the model.

    Shapes: `n` patches in rows of the picture, `d` hidden, `p` pixels of a patch (channel, y, x), `m` special rows.
    """

    projection: Tensor  #: [d, p]
    offset: Tensor  #: [n, d] position plus the projection's bias
    first: Tensor  #: [m, d] special rows ([CLS], a distillation token) with their positions, before the norm
    weight: Tensor | None  #: [d] scale of the norm; None: there is no norm
    bias: Tensor | None  #: [d] shift of the norm
    eps: float
    patch: tuple[int, int, int]  #: channels, rows and columns of a patch

    def rows(self, patches: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Inputs of the first block's query, key and value for patches [..., n, p]: [..., n, d]."""
        return self._norm(patches.to(dtype) @ self.projection.T.to(dtype) + self.offset.to(dtype), dtype)

    def known(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Inputs of the special rows: the same for every picture, [m, d]."""
        return self._norm(self.first.to(dtype), dtype)

    def _norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.weight is None or self.bias is None:
            return x
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight.to(dtype), self.bias.to(dtype), self.eps)

    def cut(self, pixels: Tensor) -> Tensor:
        """[b, c, y, x] -> patches [b, n, p]."""
        size = self.patch[1:]
        return torch.nn.functional.unfold(pixels, size, stride=size).transpose(1, 2)

    def join(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Patches [b, n, p] -> [b, c, y, x]."""
        size = self.patch[1:]
        return torch.nn.functional.fold(patches.transpose(1, 2), (height, width), size, stride=size)
