"""Which words layer 0's row space admits at which positions of a batch.

Layer 0's inputs are norm(word + position), so its row space holds at most as many directions as there are words and
positions: once the same words stand at several positions it admits them at all of these (Rotten Tomatoes, 8 sentences:
rank 181 for 215 pairs). It shows the batch's words; where they stand, the gradient's own coefficients show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks import span
from lmleak.attacks._rowspace import RowSpace, known_input
from lmleak.attacks._text import Frame
from lmleak.records import Entry, Victim


@dataclass(frozen=True)
class Places:
    """What layer 0 admits: words [m], and for every position after the frame's first tokens which of them, [p, m]."""

    words: Tensor
    allowed: Tensor
    lengths: tuple[int, ...]  #: of sentences that may have ended


def admitted(victim: Victim, readers: Sequence[Entry], space: RowSpace, frame: Frame, draw: torch.Generator) -> Places:
    """Words that layer 0's row space admits at each position, and the lengths at which it admits an end."""
    layer = known_input(victim)
    assert layer is not None
    assert layer.position is not None
    keys_only = all(e.component == "attn_key" for e in readers)
    origin = layer.rows(torch.tensor(frame.first[0]), torch.tensor(0), dtype=torch.float64) if keys_only else None
    count = min(space.rank + 2, len(layer.position))
    read = span._read(layer, space, count, space.rank + span.SHORTLIST, origin, draw)
    # True pairs stay below 1e-5 at gaps of 67 to 1e4; the space itself is known to 1 / gap.
    limit = 0.5 / space.gap
    fits = [{token for token, residual in place if residual < limit} for place in read]
    special = set(victim.processor.all_special_ids)
    start = len(frame.first)
    stop = start
    while stop < count and fits[stop]:
        stop += 1
    words = sorted({t for place in fits[start:stop] for t in place} - special)
    allowed = torch.tensor([[t in place for t in words] for place in fits[start:stop]])
    ends = [n for n in range(start + 1, stop + 1) if not frame.last or frame.last[0] in fits[n - 1]]
    device = layer.word.device
    shift = len(frame.last) - 1 if frame.last else 0
    lengths = tuple(n + shift for n in ends if n + shift > frame.size)
    return Places(torch.tensor(words, device=device), allowed.to(device), lengths)
