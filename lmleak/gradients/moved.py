"""A model as if its parameters had been moved, by another amount for every candidate; the parameters are not touched.

The derivative of `grad_x loss(theta + h v)` along v, by two forward and backward passes, is the gradient of any
function of parameter gradients whose derivative is v: no double backward. Here v differs from candidate to candidate
and the candidates share a pass, so theta stays and h v x is added to the modules' outputs, which are linear in each
parameter. v itself is never formed: it is a sum of what was observed and of the candidate's own factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmleak.errors import SelectionError
from lmleak.gradients._kinds import is_rms_norm, normalised
from lmleak.gradients.factors import Factor, LowRank, users_of
from lmleak.records import Entry


@dataclass(frozen=True)
class Move:
    """Part of a move of one entry: candidate k's is `weight[k]` times the direction.

    The direction is one gradient for all, dense or in low rank, or each candidate's own: a factor, or `own` dense ones.
    """

    weight: Tensor  #: [k]
    direction: Tensor | LowRank | Factor
    own: bool = False  #: a dense direction has the candidates as its first dimension

    def scaled(self, size: Tensor) -> Move:
        """`size` [k] times the move."""
        return Move(self.weight * size, self.direction, self.own)

    def twice(self) -> Move:
        """The move for a candidate, then its reverse: 2k candidates."""
        move = self.direction
        if isinstance(move, Factor):
            move = replace(move, left=torch.cat([move.left] * 2), right=torch.cat([move.right] * 2))
        elif self.own and isinstance(move, Tensor):
            move = torch.cat([move] * 2)
        return Move(torch.cat([self.weight, -self.weight]), move, self.own)

    def times(self, x: Tensor, *, transposed: bool) -> Tensor:
        """x [k, t, cols] times the transposed move [rows, cols], [k, t, rows]; the other way round if transposed."""
        move = self.direction
        if isinstance(move, Factor):
            left, right = (move.right, move.left) if transposed else (move.left, move.right)
            out = (x @ right.transpose(1, 2)) @ left
        elif isinstance(move, LowRank):
            out = (x @ move.columns) @ move.rows if transposed else (x @ move.rows.T) @ move.columns.T
        else:
            out = x @ (move if transposed else move.transpose(-2, -1))
        return out * self.weight[:, None, None]

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` [k, t] of a moved table, [k, t, cols]."""
        move = self.direction
        if isinstance(move, Factor):
            out = (index[:, :, None] == move.left[:, None, :]).to(move.right.dtype) @ move.right
        elif isinstance(move, LowRank):
            out = move.columns[index] @ move.rows
        elif self.own:
            out = move.gather(1, index[..., None].expand(-1, -1, move.shape[-1]))
        else:
            out = move[index]
        return out * self.weight[:, None, None]

    def vector(self) -> Tensor:
        """The move of a one-dimensional entry, [k, 1, d]."""
        assert not isinstance(self.direction, LowRank)
        move = self.direction.each() if isinstance(self.direction, Factor) else self.direction
        return (move if move.dim() == 2 else move[None])[:, None] * self.weight[:, None, None]


@contextmanager
def moved(module: nn.Module, entries: Sequence[Entry], moves: Mapping[str, Sequence[Move]], count: int) -> Iterator:
    """Inside, forward passes of `count` candidates see their own moved parameters; samples of a candidate are adjacent.

    Args:
        module: left as it was found.
        entries: what is moved.
        moves: entry name -> parts of its move, which add up.
        count: candidates; a pass has a multiple of it as its batch.

    Raises:
        SelectionError: an entry belongs to a convolution or a BatchNorm.
    """
    todo: dict[nn.Module, list[tuple[str, Entry]]] = {}
    users = users_of(module, entries)
    for entry in entries:
        for owner, name in users[entry.parameter]:
            if not (isinstance(owner, (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)) or is_rms_norm(owner)):
                raise SelectionError(f"{entry.name}: a {type(owner).__name__} cannot be moved candidate by candidate")
            todo.setdefault(owner, []).append((name, entry))

    def hook(owner: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = output.reshape(count, -1, output.shape[-1])
        for name, entry in todo[owner]:
            for move in moves[entry.name]:
                rows = rows + _shift(owner, name, entry, x, move, rows)
        return rows.reshape(output.shape)

    handles = [owner.register_forward_hook(hook, with_kwargs=True) for owner in todo]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shift(owner: nn.Module, name: str, entry: Entry, x: Tensor, move: Move, rows: Tensor) -> Tensor:
    """What a move adds to a module's output [k, t, d_out]."""
    if name == "bias":
        return _within(move.vector(), entry, 0, rows)
    if isinstance(owner, nn.Embedding):
        index = x.reshape(len(rows), -1)
        shift = move.rows(index)
        # The padding row has no gradient, whatever noise a defense put there.
        return shift if owner.padding_idx is None else shift * (index != owner.padding_idx)[..., None]
    if isinstance(owner, nn.Linear):
        return _within(move.times(_cut(x, entry, 1, rows), transposed=False), entry, 0, rows)
    if isinstance(owner, Conv1D):
        return _within(move.times(_cut(x, entry, 0, rows), transposed=True), entry, 1, rows)
    return normalised(owner, x).reshape(rows.shape) * move.vector()


def _cut(x: Tensor, entry: Entry, dim: int, rows: Tensor) -> Tensor:
    """The inputs [k, t, d_in] that an entry's slice of dimension `dim` reads."""
    x = x.reshape(*rows.shape[:2], -1)
    return x if entry.part is None or entry.part[0] != dim else x[..., entry.part[1] : entry.part[2]]


def _within(shift: Tensor, entry: Entry, dim: int, rows: Tensor) -> Tensor:
    """A slice's shift in its place in the whole output."""
    if entry.part is None or entry.part[0] != dim:
        return shift
    return torch.nn.functional.pad(shift, (entry.part[1], rows.shape[-1] - entry.part[2]))
