"""The inputs of one feed-forward block, position by position, off its second matrix: least squares, no search.

The second matrix reads x = act(W h + b), wider than h: MiniLM 1536 against 384. Every x_i lies in the n-dimensional row
space of the gradient, 1536 - n equations for the 384 unknowns of one h_i, so each position is solved for alone, and no
token enters. What lies in the space and is an activation at all is an activation of the sentence: MiniLM, layers 3 and
4, 11 and 15 tokens: 100 starts by 200 steps of Adam end in shares of 1e-7 to 1e-2 outside the space, and Gauss-Newton
takes those below 1e-2 to 1e-8, each of them a true h_i to 0.01 of its length 11.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from lmleak.attacks._energy import CHUNK, Energy
from lmleak.attacks._feed_forward import before
from lmleak.records import Victim

STARTS = 96  #: of one call of `Rows.extend`, as one batch
STEPS = 200  #: of Adam; after 60 half as many starts end near a row
NEWTON = 8  #: damped Gauss-Newton steps of every start that is polished
NEAR = 2e-2  #: share outside the space from which Gauss-Newton is worth its cost
SOLVED = 1e-6  #: share outside the space of a solved row: true ones end below 1e-7, other minima above 1e-5
APART = 5.0  #: of normed rows, whose length is sqrt(d): nearer ones are the same row on its way


@dataclass(frozen=True)
class Hidden:
    """Activations of a feed-forward block as a function of its normed input z, before the norm's scale and shift."""

    first: nn.Linear  #: the block's first matrix, which reads scale * z + shift
    weight: Tensor  #: [m, d] with the scale
    bias: Tensor  #: [m] with the shift
    scale: Tensor  #: [d]
    shift: Tensor  #: [d]
    act: Callable[[Tensor], Tensor]
    basis: Tensor  #: [r, m] float32, of the row space that the second matrix's gradient shows

    def unit(self, z: Tensor) -> Tensor:
        """The nearest rows that a norm may give."""
        return layer_norm(z, z.shape[-1:])

    def activations(self, z: Tensor) -> Tensor:
        """x [k, m] of rows [k, d]."""
        return self.act(z @ self.weight.T + self.bias)

    def outside(self, z: Tensor) -> Tensor:
        """Share of |x|^2 outside the space, [k]."""
        x = self.activations(z)
        return 1 - (x @ self.basis.T).pow(2).sum(-1) / x.pow(2).sum(-1)

    def residual(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What of x is outside the space [k, m], its share of |x|^2 [k], and the activation's slopes [k, m]."""
        before = (z @ self.weight.T + self.bias).requires_grad_(True)
        with torch.enable_grad():
            x = self.act(before)
            (slope,) = torch.autograd.grad(x.sum(), before)
        x = x.detach()
        left = x - (x @ self.basis.T) @ self.basis
        return left, left.pow(2).sum(-1) / x.pow(2).sum(-1), slope

    def sample(self, energy: Energy, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """Normed rows z [k, n, d] and activations x [k, n, m] of token sequences [k, n]; `energy` is attached."""
        rows: list[Tensor] = []
        hook = self.first.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
        try:
            with torch.no_grad():
                x = torch.cat([energy.inputs(energy.table[part])[0] for part in sentences.split(CHUNK)])
        finally:
            hook.remove()
        return (torch.cat(rows).float() - self.shift) / self.scale, x


def hidden(victim: Victim, energy: Energy) -> Hidden | None:
    """The block whose second matrix is the first site of `energy`, attached; None where it cannot be solved for."""
    one = energy.sites[0]
    own, other = (victim.family.COMPONENTS[name][0] for name in ("ffn_out", "ffn_in"))
    with suppress(AttributeError):
        first = victim.module.get_submodule(re.sub(re.escape(own) + "$", other, one.entry.module))
        found = before(victim, first, lambda: energy.inputs(energy.table[:2][None])[0])
        if found is None or not isinstance(first, nn.Linear):
            return None
        norm, act = found
        if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
            return None
        if one.basis.shape[1] <= len(one.basis) + len(norm.weight):
            return None  # no more equations than unknowns
        scale, shift = norm.weight.detach().float(), norm.bias.detach().float()
        weight = first.weight.detach().float()
        bias = weight @ shift + first.bias.detach().float()
        return Hidden(first, weight * scale, bias, scale, shift, act, one.basis)
    return None


class Rows:
    """Rows solved for so far, normed, [k, d]."""

    def __init__(self, hidden: Hidden):
        self.hidden = hidden
        self.count = len(hidden.basis)  #: rows there are
        self.solved = hidden.weight.new_zeros(0, hidden.weight.shape[1])

    @property
    def missing(self) -> int:
        """Rows not yet solved for."""
        return self.count - len(self.solved)

    def unexplained(self, x: Tensor) -> Tensor:
        """Share of activations [k, m] that lies in the space and outside what the solved rows span, [k]."""
        inside = x @ self.hidden.basis.T
        if len(self.solved):
            known = torch.linalg.qr((self.hidden.activations(self.solved) @ self.hidden.basis.T).T).Q
            inside = inside - (inside @ known) @ known.T
        return inside.pow(2).sum(-1) / x.pow(2).sum(-1)

    def extend(self, z: Tensor) -> None:
        """Solves for rows from the most promising of the starts z [k, d]."""
        z = self._descend(z[self._promising(self.hidden.activations(z))])
        outside = self.hidden.outside(z)
        new = self.unexplained(self.hidden.activations(z)) > 0.003
        picked: list[int] = []
        for j in outside.argsort().tolist():
            if outside[j] > NEAR or len(picked) > 2 * self.missing + 1:
                break
            if new[j] and (not picked or float((z[picked] - z[j]).norm(dim=-1).min()) > APART):
                picked.append(j)
        if picked:
            z, outside = self._polish(z[picked])
            for j in outside.argsort().tolist():
                if outside[j] < SOLVED and self.missing and self._distinct(z[j]):
                    self.solved = torch.cat([self.solved, z[j][None]])

    def _distinct(self, z: Tensor) -> bool:
        return not len(self.solved) or float((self.solved - z).norm(dim=-1).min()) > 0.3

    def _promising(self, x: Tensor) -> list[int]:
        """Activations [k, m] with much in the unexplained part of the space, no two of them alike there."""
        direction = normalize(x @ self.hidden.basis.T, dim=-1)
        chosen: list[int] = []
        for j in self.unexplained(x).topk(min(1000, len(x))).indices.tolist():
            if not chosen or float((direction[chosen] @ direction[j]).max()) < 0.95:
                chosen.append(j)
            if len(chosen) == STARTS:
                break
        return chosen

    def _descend(self, z: Tensor) -> Tensor:
        z = z.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([z], lr=0.05)
        with torch.enable_grad():
            for _ in range(STEPS):
                optimizer.zero_grad()
                self.hidden.outside(self.hidden.unit(z)).sum().backward()
                optimizer.step()
        return self.hidden.unit(z.detach())

    def _polish(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Damped Gauss-Newton, start by start: rows and their shares outside the space."""
        one, z = self.hidden, z.clone()
        left, outside, slope = one.residual(z)
        damping = [1e-2] * len(z)
        for _ in range(NEWTON):
            for j in (outside > 0.1 * SOLVED).nonzero().flatten().tolist():
                jacobian = slope[j][:, None] * one.weight
                inside = one.basis @ jacobian
                normal = torch.addmm(-(inside.T @ inside), jacobian.T, jacobian)
                normal.diagonal().add_(damping[j] * normal.diagonal().mean())
                factor, failed = torch.linalg.cholesky_ex(normal)
                step = torch.cholesky_solve((jacobian.T @ left[j])[:, None], factor)[:, 0]
                tried = one.unit(z[j] - step)[None]
                now = one.residual(tried)
                if not failed and now[1][0] < outside[j]:
                    z[j], left[j], outside[j], slope[j] = tried[0], now[0][0], now[1][0], now[2][0]
                    damping[j] = max(0.3 * damping[j], 1e-6)
                else:
                    damping[j] *= 6
        return z, outside
