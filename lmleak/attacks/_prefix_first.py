"""The first token from layer 0's query gradient, whose row space does not hold it: from the other side of the product.

Position 0 attends to itself alone, so its query gradient is zero, and at layer 0 no other row depends on it. But the
output gradient of position 1 is, in every head, a multiple of `k_0 - k_1`: the softmax of two positions has one degree
of freedom. Every first token is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmleak.models._input import InputLayer

CHUNK = 8192


def first_token(
    layer: InputLayer, packed: nn.Module, heads: int, second: int, delta: Tensor
) -> tuple[int, float, float]:
    """The first token of a sentence.

    Args:
        layer: what the family's layer 0 reads.
        packed: the linear map to query, key and value, side by side.
        heads: attention heads.
        second: the second token.
        delta: [d] query gradient at the second position.

    Returns:
        token, its mismatch (share of k_0 - k_1 off the direction of delta, over heads, 0..1), the runner-up's.
    """
    wanted = delta.double().view(heads, -1)
    wanted = wanted / wanted.norm(dim=1, keepdim=True).clamp_min(1e-300)
    device = layer.word.device

    def key(tokens: Tensor, place: int) -> Tensor:
        rows = layer.rows(tokens, torch.tensor(place, device=device), dtype=torch.float64).to(layer.word.dtype)
        return packed(rows).chunk(3, -1)[1].double().view(len(tokens), heads, -1)

    anchor = key(torch.tensor([second], device=device), 1)
    scores = []
    for tokens in torch.arange(len(layer.word), device=device).split(CHUNK):
        difference = key(tokens, 0) - anchor
        along = (difference * wanted).sum(-1)
        whole = difference.pow(2).sum((1, 2))
        scores.append((1 - along.pow(2).sum(1) / whole.clamp_min(1e-300)).clamp_min(0).sqrt())
    best = torch.cat(scores).topk(2, largest=False)
    return int(best.indices[0]), float(best.values[0]), float(best.values[1])
