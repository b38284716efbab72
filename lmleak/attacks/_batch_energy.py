"""Spaces and energies of one sentence among several: what is found is taken out of what is to be explained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmleak.attacks._energy import Energy, Site
from lmleak.attacks._rowspace import RowSpace, matrix
from lmleak.records import Entry, Observation, Victim

# In a batch the weakest sentence's inputs come near float32's rounding: MiniLM, 8 sentences, the last step falls by 42
# to 75 only. What lies behind it is rounding: 3e-8 to 7e-8 of the first value.
STEP = 10.0
ROUNDING = 1e-6
# Share of a sentence's input outside the space below which it is proven. MiniLM, layers 0 to 3, query, key and ffn_out,
# 4, 8 and 16 sentences, and nothing else: the truth at 3e-7 to 3e-5, one word exchanged at 0.07 or more, also where the
# spectrum falls by 13 only: the middle of that edge, 0.28, would accept it.
PROOF = 1e-3


def batch_space(gradients: Sequence[Tensor]) -> RowSpace:
    """Row space of weight gradients [*, d] that sum over sentences of very different gradients.

    The edge is the largest step down to rounding, not one of a fixed size.
    """
    stacked = torch.cat([g.double() / g.double().norm().clamp_min(1e-300) for g in gradients])
    _, values, right = torch.linalg.svd(stacked, full_matrices=False)
    if not len(values) or values[0] == 0:
        return RowSpace(right[:0], values, 1.0)
    steps = values[:-1] / values[1:].clamp_min(values[0] * 1e-13)
    steps = steps[: max(1, int(0.97 * min(stacked.shape)))]
    low = values[1 : len(steps) + 1] < ROUNDING * values[0]
    edge = int((steps * low).argmax())
    if steps[edge] < STEP or not low[edge]:
        return RowSpace(right[:0], values, float(steps.max()))
    return RowSpace(right[: edge + 1], values, float(steps[edge]))


def batch_site(victim: Victim, observation: Observation, entry: Entry) -> Site:
    """Reads one observed weight matrix of a batch."""
    space = batch_space([matrix(victim.module, entry, observation.gradients[entry.name])])
    return Site(entry, space, space.basis.float(), entry.component == "attn_key")


class Deflated(Energy):
    """Energy of one sentence of several: what the sentences found so far explain is no longer to be explained.

    Sums over modules residual as `Energy` does, and missing = n - tr(P^T (X X^T + ridge)^-1 P) after projection off the
    found sentences: rows that repeat each other or a found sentence explain nothing new.
    """

    def __init__(self, victim: Victim, sites: Sequence[Site]):
        super().__init__(victim, sites)
        self.found: list[list[Tensor]] = [[] for _ in self.sites]
        self._rest = [one.basis for one in self.sites]

    def __call__(self, embeds: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        total, residuals = embeds.new_zeros(len(embeds)), embeds.new_zeros(embeds.shape[:2])
        if isinstance(ridge, Tensor):
            ridge = ridge[:, None, None]
        for one, rest, x in zip(self.sites, self._rest, self.inputs(embeds), strict=True):
            x = torch.nn.functional.normalize(one.rows(x), dim=-1)
            p = x @ one.basis.T
            outside = (1 - p.pow(2).sum(-1)).clamp_min(0)
            new = p @ rest.T if rest is not one.basis else p
            gram = new @ new.transpose(1, 2) + torch.diag_embed(outside)
            gram = gram + ridge * torch.eye(x.shape[1], device=x.device)
            covered = (torch.linalg.solve(gram, new) * new).sum((1, 2))
            residuals = residuals + outside
            total = total + outside.sum(1) + (x.shape[1] - int(one.centred)) - covered
        return total, residuals

    @torch.no_grad()
    def verdict(self, tokens: Tensor) -> float:
        """Largest share of an input outside its space, over `PROOF`; below 1 the sentence is true."""
        worst = 0.0
        for one, x in zip(self.sites, self.inputs(self.table[tokens][None]), strict=True):
            outside = one.space.residual(one.rows(x[0].double()))
            worst = max(worst, float(outside.max()) / PROOF)
        return worst

    @torch.no_grad()
    def deflate(self, tokens: Tensor) -> None:
        """Takes a found sentence [n] out of what is to be explained."""
        for i, (one, x) in enumerate(zip(self.sites, self.inputs(self.table[tokens][None]), strict=True)):
            self.found[i].append(torch.nn.functional.normalize(one.rows(x[0].double()), dim=-1) @ one.space.basis.T)
            _, values, right = torch.linalg.svd(torch.cat(self.found[i]), full_matrices=True)
            kept = int((values > 1e-6 * values[0]).sum())
            self._rest[i] = right[kept:].float()

    @property
    def left(self) -> int:
        """Directions that no found sentence explains, at the module that shows most."""
        return max(len(rest) for rest in self._rest)
