"""How far a candidate sentence is from explaining observed weight gradients: one forward pass, no backward, no label.

A module's gradient sum_i delta_i^T x_i shows the space its inputs lie in. A sentence is the right one when its own
inputs lie in that space and fill it. Inputs of an encoder's module at any depth follow from the public weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lmleak.attacks._objective import frozen
from lmleak.attacks._rowspace import RowSpace, matrix, row_space
from lmleak.records import Entry, Observation, Victim

EXACT = 1e-5  #: of the first singular value: float32 leaves 2e-8 behind the edge, float16 6e-5, bfloat16 5e-4
CHUNK = 128  #: sentences evaluated at once
SLOPE = 3  #: evaluations that a slope counts as: a backward pass costs about two forward ones


class Reached(Exception):
    """All that is wanted was seen: nothing behind it is computed."""


@contextmanager
def reaching(module: nn.Module, owners: Sequence[nn.Module], seen: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, the model is frozen and a forward pass ends with `Reached` once `seen` has the owners' inputs."""
    wanted = set(owners)

    def reach(owner: nn.Module, args: tuple) -> None:
        seen[owner] = args[0]
        if len(seen) == len(wanted):
            raise Reached

    with frozen(module):
        handles = [owner.register_forward_pre_hook(reach) for owner in wanted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            seen.clear()


@dataclass(frozen=True)
class Site:
    """One observed module: its place in the model, and the space its inputs lie in."""

    entry: Entry
    space: RowSpace
    basis: Tensor  #: [r, d] float32
    centred: bool  #: a key's output gradients sum to zero over a sentence: its space holds differences of inputs only

    @property
    def tokens(self) -> int:
        """Inputs that carry gradient."""
        return self.space.rank + self.centred

    @property
    def exact(self) -> bool:
        """Whether what lies behind the spectrum's edge is float32's rounding, and not noise or a narrower format's."""
        values, rank = self.space.spectrum, self.space.rank
        return rank > 0 and (rank == len(values) or float(values[rank]) < EXACT * float(values[0]))

    def rows(self, x: Tensor) -> Tensor:
        """What should lie in the space: the inputs, or their differences from the mean; x [..., n, d]."""
        return x - x.mean(-2, keepdim=True) if self.centred else x


def site(victim: Victim, observation: Observation, entry: Entry) -> Site:
    """Reads one observed weight matrix."""
    space = row_space([matrix(victim.module, entry, observation.gradients[entry.name])])
    return Site(entry, space, space.basis.float(), entry.component == "attn_key")


@dataclass
class Tally:
    """Of the sentences sent through the model: one for all scorers of an attack."""

    sentences: int = 0
    limit: float = math.inf  #: beyond it `of_tokens` evaluates nothing


class Scorer(Protocol):
    """What is low for the true sentence."""

    table: Tensor  #: [v, width] word embeddings
    tally: Tally

    def __call__(self, embeds: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        """Energy [k] of embeddings [k, n, width] and a part of it by position [k, n]; ridge is one number or [k]."""
        ...


class Judge(Scorer, Protocol):
    """A scorer that knows when the sentence is found."""

    def verdict(self, tokens: Tensor) -> float:
        """Below 1 where the sentence [n] is the answer."""
        ...


@torch.no_grad()
def of_tokens(energy: Scorer, sentences: Tensor, ridge: float) -> Tensor:
    """Energy [k] of token sequences [k, n]; inf for those, but the first, that the tally's limit leaves no room for."""
    room = int(min(len(sentences), max(1.0, energy.tally.limit - energy.tally.sentences)))
    values = torch.cat([energy(energy.table[part], ridge)[0] for part in sentences[:room].split(CHUNK)])
    return torch.nn.functional.pad(values, (0, len(sentences) - room), value=math.inf)


def slope(energy: Scorer, embeds: Tensor, ridge: float | Tensor) -> Tensor:
    """Gradient of the energies by the embeddings [k, n, width]."""
    embeds = embeds.detach().requires_grad_(True)
    with torch.enable_grad():
        (out,) = torch.autograd.grad(energy(embeds, ridge)[0].sum(), embeds)
    energy.tally.sentences += (SLOPE - 1) * len(embeds)
    return out


class Energy:
    """The energy of sentences given as embeddings.

    Sums over modules residual = sum_i |x_i outside the space|^2 / |x_i|^2 and uncovered = r - tr(P^T (X X^T + ridge)^-1
    P), X unit rows, P their coordinates in the space. Both are zero for the true sentence; the second keeps two
    positions from explaining the same direction. A large ridge asks for the strong directions only: MiniLM layer 4's
    attn_output, 9 tokens, is entered with 8 tokens in place instead of 3.
    """

    def __init__(self, victim: Victim, sites: Sequence[Site]):
        self.victim, self.sites = victim, tuple(sites)
        self.table = victim.module.get_input_embeddings().weight.detach()
        first = getattr(victim.family, "first_position", None)
        self.offset = first(victim.module) if first else 0
        self.tally = Tally()
        self._seen: dict[nn.Module, Tensor] = {}

    @property
    def evaluations(self) -> int:
        """Sentences sent through the model so far."""
        return self.tally.sentences

    @contextmanager
    def attached(self) -> Iterator[Energy]:
        """Hooks and evaluation mode for the duration of an attack; the model is left as it was found."""
        module = self.victim.module
        with reaching(module, [module.get_submodule(s.entry.module) for s in self.sites], self._seen):
            yield self

    def inputs(self, embeds: Tensor) -> list[Tensor]:
        """Input of every site's module, [k, n, d] each; embeds [k, n, width] are word embeddings without position."""
        self._seen.clear()
        with suppress(Reached):
            self.forward(embeds)
        return [self._seen[self.victim.module.get_submodule(s.entry.module)].float() for s in self.sites]

    def forward(self, embeds: Tensor) -> None:
        """Runs the model on word embeddings [k, n, width], for hooks to see; `Reached` passes through."""
        self.tally.sentences += len(embeds)
        places = torch.arange(embeds.shape[1], device=embeds.device) + self.offset
        # DistilBERT adds its positions by itself and takes no argument for them.
        given = {} if self.victim.kind == "distilbert" else {"position_ids": places.expand(len(embeds), -1)}
        self.victim.module(inputs_embeds=embeds, **given)

    def __call__(self, embeds: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        """Energy [k] and its residual part by position [k, n]; ridge is one number, or one for every sentence [k]."""
        total, residuals = embeds.new_zeros(len(embeds)), embeds.new_zeros(embeds.shape[:2])
        if isinstance(ridge, Tensor):
            ridge = ridge[:, None, None]
        for one, x in zip(self.sites, self.inputs(embeds), strict=True):
            x = torch.nn.functional.normalize(one.rows(x), dim=-1)
            p = x @ one.basis.T
            outside = (1 - p.pow(2).sum(-1)).clamp_min(0)
            gram = x @ x.transpose(1, 2) + ridge * torch.eye(x.shape[1], device=x.device)
            covered = (torch.linalg.solve(gram, p) * p).sum((1, 2))
            residuals = residuals + outside
            total = total + outside.sum(1) + one.space.rank - covered
        return total, residuals

    @torch.no_grad()
    def verdict(self, tokens: Tensor) -> float:
        """How far inside its noise a sentence [n] explains the gradients: below 1 it is the answer.

        The largest share of any input outside its space, and of any direction of the space outside the inputs' span, in
        float64, against the middle of the spectrum's edge, sqrt(1 / gap): the space itself is known to about 1 / gap.
        MiniLM, 6 components at layers 0, 2 and 4: the truth at 2e-4 to 1e-3 of that, one word exchanged or two swapped
        at 2 or more.
        """
        worst = 0.0
        for one, x in zip(self.sites, self.inputs(self.table[tokens][None]), strict=True):
            rows = one.rows(x[0].double())
            middle = one.space.gap**-0.5
            outside = one.space.residual(rows)
            _, values, right = torch.linalg.svd(rows, full_matrices=False)
            span = right[values > float(values[0]) * torch.finfo(torch.float32).eps]
            missed = (one.space.basis - one.space.basis @ span.T @ span).norm(dim=-1)
            worst = max(worst, float(outside.max()) / middle, float(missed.max()) / middle)
        return worst
