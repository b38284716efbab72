"""Closed form of what the query, key and value of layer 0 read: the fact that makes layer 0 the easiest to invert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class InputLayer:
    """`norm(word[token] + position[place])`. Tensors are detached from the model.

    Shapes: `v` vocabulary, `p` positions, `d` hidden.
    """

    word: torch.Tensor  #: [v, d]
    position: torch.Tensor | None  #: [p, d] from the first token on, plus the constant type embedding
    norm: Literal["layer", "rms"]
    weight: torch.Tensor  #: [d] scale of the norm
    bias: torch.Tensor | None  #: [d] shift of the norm
    eps: float

    def rows(
        self, tokens: torch.Tensor, positions: torch.Tensor, *, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Inputs of the first layer's query, key and value, without dropout.

        Args:
            tokens: [n] token ids (any shape; `positions` must broadcast against it).
            positions: [n] places counted from 0 at the first token of the sentence, special tokens included.
            dtype: everything is computed in it; float64 keeps the attacker's own rounding out of the residual.

        Returns:
            [n, d]
        """
        x = self.word[tokens].to(dtype)
        if self.position is not None:
            x = x + self.position[positions].to(dtype)
        weight = self.weight.to(dtype)
        if self.norm == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
