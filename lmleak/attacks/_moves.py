"""Reorderings of a sentence: LAMP's four discrete moves (Balunovic et al. 2022, 2202.08827), on index vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def reorder(first: int, last: int, width: int, generator: torch.Generator) -> Tensor:
    """One random move of the positions first..last-1, the others left in place; an index vector [width].

    Swap two tokens, move one token, move a span of tokens, or move a prefix to the end; each with probability 1/4.
    """
    order = list(range(width))
    if last - first < 2:
        return torch.tensor(order)
    body = order[first:last]
    n = len(body)
    kind = _draw(0, 4, generator)
    i, j = _draw(0, n, generator), _draw(0, n, generator)
    if kind == 0:
        body[i], body[j] = body[j], body[i]
    elif kind == 1:
        body.insert(j, body.pop(i))
    elif kind == 2:
        i, j = min(i, j), max(i, j) + 1
        span, rest = body[i:j], body[:i] + body[j:]
        place = _draw(0, len(rest) + 1, generator)
        body = rest[:place] + span + rest[place:]
    else:
        cut = _draw(1, n, generator)
        body = body[cut:] + body[:cut]
    return torch.tensor(order[:first] + body + order[last:])


def shuffle(first: int, last: int, width: int, generator: torch.Generator) -> Tensor:
    """A random permutation of the positions first..last-1; an index vector [width]."""
    order = torch.arange(width)
    order[first:last] = first + torch.randperm(max(0, last - first), generator=generator)
    return order
