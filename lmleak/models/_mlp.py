"""The module of kind `mlp`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

from torch import Tensor, nn


class Mlp(nn.Module):
    """Pictures [b, c, y, x] -> an object with `logits` [b, classes], as transformers' models give."""

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x = pixel_values.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        return SimpleNamespace(logits=self.linear(x))
