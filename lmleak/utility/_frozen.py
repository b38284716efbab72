"""What stands before the first trained block is the same in every step: run once a record, then looked up.

With the pooler and the head of MiniLM trained, an epoch of 4,000 sentences is a pass of two small layers instead of six
blocks; with the last block trained too, a sixth of the blocks is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmleak.gradients.losses import forward
from lmleak.records import Batch, Victim
from lmleak.utility._score import parts

States = dict[tuple[int, ...], Tensor]  #: token ids without padding -> hidden states before the first trained block
_PASS = 128  #: records of one pass


def remember(victim: Victim, records: Sequence[Batch], known: States | None = None) -> bool:
    """Cuts a model before its first trained block; from there on it looks up what the frozen ones make of a record.

    Args:
        victim: a copy that is to be trained, dropout off; its module is cut.
        records: everything it will be trained and tested on, batches of one record each.
        known: states of the same frozen weights from an earlier call; filled.

    Returns:
        whether it was cut: not where the model is anything but embeddings and then a list of blocks, nor where nothing
        is frozen before the first trained block.
    """
    base: Any = getattr(victim.module, getattr(victim.module, "base_model_prefix", "") or "-", None)
    words, encoder = getattr(base, "embeddings", None), getattr(base, "encoder", None)
    if not isinstance(words, nn.Module) or not isinstance(encoder, nn.Module) or _trains(words):
        return False
    blocks = getattr(encoder, "layer", None)
    if not isinstance(blocks, nn.ModuleList):
        return False
    count = next((i for i, block in enumerate(blocks) if _trains(block)), len(blocks))
    if count == 0:
        return False
    known = {} if known is None else known
    missing = [record for record in records if _keys(record.inputs["input_ids"], victim)[0] not in known]
    pad = victim.processor.pad_token_id
    encoder.layer = blocks[:count]
    found: list[Tensor] = []
    handle = encoder.register_forward_hook(lambda module, args, made: found.append(made[0]))
    try:
        with torch.no_grad():
            for batch in parts(missing, _PASS, victim):
                forward(victim.module, batch.inputs)
                states = found.pop()
                for key, row in zip(_keys(batch.inputs["input_ids"], victim), states, strict=True):
                    known[key] = row[: len(key)].clone()
    finally:
        handle.remove()
        encoder.layer = blocks[count:]
    base.embeddings = _Lookup(known, pad)
    return True


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _keys(ids: Tensor, victim: Victim) -> list[tuple[int, ...]]:
    return _unpadded(ids, victim.processor.pad_token_id)


def _unpadded(ids: Tensor, pad: int) -> list[tuple[int, ...]]:
    """Rows without the padding at their end."""
    ends = ((ids != pad) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1).tolist()
    return [tuple(row[:end]) for row, end in zip(ids.tolist(), ends, strict=True)]


class _Lookup(nn.Module):
    """Stands in for the embeddings. Holds no parameters, so that nothing looks for gradients here."""

    def __init__(self, known: Mapping[tuple[int, ...], Tensor], pad: int):
        super().__init__()
        self.known, self.pad = known, pad

    def forward(self, input_ids: Tensor, **_: object) -> Tensor:
        rows = [self.known[key] for key in _unpadded(input_ids, self.pad)]
        width = input_ids.shape[1]
        return torch.stack([F.pad(row, (0, 0, 0, width - len(row))) for row in rows])
