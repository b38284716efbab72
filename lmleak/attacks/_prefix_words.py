"""The word table, centred and of length 1, as `prefix` regresses on it: a chunk of rows at a time, no copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 4096  #: words held at once: 12 MiB at GPT-2 small's width, and no slower than the whole table


class Words:
    """Unit word embeddings [v, f] in float32 (of a half-precision table too)."""

    def __init__(self, table: Tensor):
        """Args: table: [v, f] the model's own."""
        self.table = table.detach()
        parts = self.table.split(CHUNK)
        self.mean = torch.stack([part.double().sum(0) for part in parts]).sum(0).div(len(table)).float()
        lengths = [(part.float() - self.mean).norm(dim=1) for part in parts]
        self.scale = torch.cat(lengths).clamp_min(1e-12).reciprocal()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int:
        return self.table.shape[1]

    @property
    def device(self) -> torch.device:
        return self.table.device

    def __getitem__(self, tokens: Tensor) -> Tensor:
        """[..., f] the tokens' rows."""
        return (self.table[tokens].float() - self.mean) * self.scale[tokens][..., None]

    def each(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """[v] score of every word, from rows [k, f] at a time."""
        return torch.cat([score(self[tokens]) for tokens in torch.arange(len(self), device=self.device).split(CHUNK)])
