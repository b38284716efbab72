"""What one linear module of a decoder reads at the next position, for many next tokens of shared prefixes at once.

Candidates lie side by side on the sequence axis, each allowed by the mask to look at the prefix and at itself only: the
model's own blocks run unchanged (learned or rotary positions), and the prefix's keys and values are never copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Candidates a row of the sequence axis: attention among them is wasted work, 2 % of a block's at 128 and width 768.
SIDE = 128


class _Stop(Exception):
    pass


Cache = dict[int, tuple[Tensor, Tensor]]  #: block -> keys and values, each [1, h, length, d_h]


@dataclass(frozen=True)
class Prefix:
    """Tokens read so far, and what their positions left behind in the blocks before the module."""

    tokens: tuple[int, ...] = ()
    cache: Cache = field(default_factory=dict)


class _Shared(DynamicCache):
    """Puts the prefix before the new keys and values, and remembers only the new ones."""

    def __init__(self, prefixes: Sequence[Prefix], rows: int):
        super().__init__()
        self.prefixes, self.rows = prefixes, rows
        self.length = len(prefixes[0].tokens) if prefixes else 0
        self.new: Cache = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.new[layer_idx] = (key_states, value_states)
        if not self.length:
            return key_states, value_states
        return self._join(key_states, layer_idx, 0), self._join(value_states, layer_idx, 1)

    def _join(self, new: Tensor, layer: int, which: int) -> Tensor:
        old = torch.cat([p.cache[layer][which].expand(self.rows, -1, -1, -1) for p in self.prefixes])
        return torch.cat([old, new], 2)

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return self.length


class Reader:
    """Runs the victim's body up to the last of the modules. Use inside `frozen` and `no_grad`; counts tokens run."""

    def __init__(self, module: PreTrainedModel, *names: str):
        self.body = module.base_model
        self.targets = [module.get_submodule(name) for name in names]
        self.evaluated = 0

    def read(self, prefixes: Sequence[Prefix], tokens: Tensor) -> Tensor:
        """The first module's input. `prefixes` have one length; tokens [prefixes, k] -> [prefixes, k, d]."""
        return self.read_all(prefixes, tokens)[0]

    def read_all(self, prefixes: Sequence[Prefix], tokens: Tensor) -> list[Tensor]:
        """Every module's input at candidates, as `read`."""
        many, count = tokens.shape
        side = min(SIDE, count)
        rows = -(-count // side)
        padded = torch.nn.functional.pad(tokens, (0, rows * side - count), value=int(tokens[0, 0]))
        out, _ = self._run(prefixes, rows, padded.reshape(many * rows, side))
        self.evaluated += many * count
        return [x.reshape(many, rows * side, -1)[:, :count] for x in out]

    def pairs(self, pairs: Tensor) -> Tensor:
        """Inputs of the module at the first two positions: pairs [k, 2] -> [k, 2, d]."""
        self.evaluated += pairs.numel()
        return torch.cat([self._run((), 1, part, causal=True)[0][0] for part in pairs.split(2 * SIDE)])

    def extend(self, prefix: Prefix, token: int) -> Prefix:
        """The prefix with one more token."""
        _, new = self._run([prefix], 1, torch.tensor([[token]], device=self.device))
        if prefix.tokens:
            new = {
                layer: (torch.cat([prefix.cache[layer][0], keys], 2), torch.cat([prefix.cache[layer][1], values], 2))
                for layer, (keys, values) in new.items()
            }
        return Prefix((*prefix.tokens, token), new)

    @property
    def device(self) -> torch.device:
        return next(self.body.parameters()).device

    def _run(
        self, prefixes: Sequence[Prefix], rows: int, ids: Tensor, causal: bool = False
    ) -> tuple[list[Tensor], Cache]:
        n, side = ids.shape
        length = len(prefixes[0].tokens) if prefixes else 0
        caught: dict[nn.Module, Tensor] = {}

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[module] = args[0]
            if len(caught) == len(self.targets):
                raise _Stop

        dtype = next(self.body.parameters()).dtype
        hidden = torch.full((side, side), torch.finfo(dtype).min, dtype=dtype, device=ids.device)
        hidden = hidden.triu(1) if causal else hidden.fill_diagonal_(0)
        mask = torch.cat([hidden.new_zeros(side, length), hidden], 1)
        places = torch.arange(side, device=ids.device).expand(n, -1) if causal else torch.full_like(ids, length)
        shared = _Shared(prefixes, rows)
        handles = [target.register_forward_pre_hook(stop) for target in self.targets]
        try:
            self.body(
                input_ids=ids,
                attention_mask=mask.expand(n, 1, -1, -1),
                position_ids=places,
                past_key_values=shared,
                use_cache=True,
            )
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [caught[target] for target in self.targets], shared.new
