"""The subspace attack on a batch: layer 0 says which words stand where, a deeper module which of them stand together.

Layer 0's inputs are norm(word + position), so its row space holds at most as many directions as there are words and
positions: once the same words stand at several positions it admits them at all of these (Rotten Tomatoes, 8 sentences:
rank 181 for 215 pairs). It is therefore a filter, and every sentence is decided at the deeper modules, one at a time:
there a sentence's inputs lie in the observed space whatever its neighbours are. What is found is deflated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks import span
from lmleak.attacks._discrete import Search
from lmleak.attacks._energy import Energy, Site
from lmleak.attacks._rowspace import RowSpace, known_input, matrix
from lmleak.attacks._subspace_relax import Schedule, framed, relax
from lmleak.attacks._text import Frame
from lmleak.records import Entry, Observation, Victim

# In a batch the weakest sentence's inputs come near float32's rounding: MiniLM, 8 sentences, the last step falls by 42
# to 75 only. What lies behind it is rounding: 3e-8 to 7e-8 of the first value.
STEP = 10.0
ROUNDING = 1e-6


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
        """Largest share of an input outside its space against the middle of the spectrum's edge; below 1 it is true."""
        worst = 0.0
        for one, x in zip(self.sites, self.inputs(self.table[tokens][None]), strict=True):
            outside = one.space.residual(one.rows(x[0].double()))
            worst = max(worst, float(outside.max()) * one.space.gap**0.5)
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


class Filtered(Search):
    """Search among the words that layer 0 admits at each position."""

    def __init__(self, energy: Energy, words: Tensor, allowed: Tensor, length: int, frame: Frame, ridge: float, n: int):
        super().__init__(energy, words, len(frame.first), length - len(frame.last), ridge, n)
        column = {t: i for i, t in enumerate(words.tolist())}
        table = allowed.tolist()
        self._may = [{t for t, i in column.items() if row[i]} for row in table]

    def _best(self, current: tuple[int, ...], changed: list[tuple[int, ...]]) -> tuple[int, ...]:
        first = self.places.start
        fits = lambda s: all(s[p] in self._may[p - first] for p in self.places if s[p] != current[p])  # noqa: E731
        return super()._best(current, [s for s in changed if fits(s)])


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


class BatchSearch:
    """Finds the sentences of a batch one after the other."""

    def __init__(
        self,
        energy: Deflated,
        frame: Frame,
        places: Places,
        batch_size: int,
        schedule: Schedule,
        ridge: float,
        shortlist: int,
        budget: int,
        generator: torch.Generator,
        progress: Callable[[tuple[int, ...]], None],
    ):
        self.energy, self.frame, self.places, self.size = energy, frame, places, batch_size
        self.schedule, self.ridge, self.shortlist, self.budget = schedule, ridge, shortlist, budget
        self.generator, self.progress = generator, progress
        self.total = energy.left + (batch_size if all(s.centred for s in energy.sites) else 0)
        self.found: dict[tuple[int, ...], float] = {}  #: sentence -> verdict
        self.guesses: dict[int, tuple[float, tuple[int, ...]]] = {}  #: best of each length that is not the truth
        self.rounds = 0
        self.prior = torch.where(places.allowed, 0.0, -math.inf)

    def run(self) -> None:
        """Until every sentence is found, nothing is left to explain, or the budget is spent."""
        self.prepare()
        while self.missing and self.energy.evaluations < self.budget:
            spent = self.energy.evaluations
            for length in self.lengths():
                while self.missing and length in self.lengths() and self.energy.evaluations < self.budget:
                    if not self.attempt(length):
                        break
            self.rounds += 1
            if self.energy.evaluations == spent:
                break  # no length fits what is left

    @property
    def missing(self) -> int:
        """Sentences still to be found; none once nothing is left to explain."""
        return self.size - len(self.found) if self.energy.left else 0

    def doubtful(self) -> list[tuple[int, ...]]:
        """The best of what was not found, one of each length, as many as are missing."""
        return [tokens for _, tokens in sorted(self.guesses.values()) if tokens not in self.found][: self.missing]

    def lengths(self) -> list[int]:
        """Lengths that the next sentence may have, long ones first: what is left is the sum of the missing ones."""
        rest = self.total - sum(map(len, self.found))
        if self.missing == 1:
            return [rest]
        least = (self.missing - 1) * (self.frame.size + 1)
        return [n for n in sorted(self.places.lengths, reverse=True) if n <= rest - least]

    @torch.no_grad()
    def prepare(self, rounds: int = 8, width: int = 48) -> None:
        """Ranks the pairs that layer 0 admits by the least a deeper module shows of them outside its space.

        Sentences are drawn, each pair remembers its best, and the next are drawn from the better pairs: a true pair
        needs few true neighbours to lie near the space. Rotten Tomatoes, 4 sentences, drawn at their lengths, 43
        admitted words a position: half of the true pairs are among the best two, 7 of 10 among the best four.
        """
        energy, words, start = self.energy, self.places.words, len(self.frame.first)
        least = torch.full_like(self.prior, math.inf)
        longest = sorted(self.lengths(), reverse=True)
        for trust in range(rounds):
            for length in longest[:: max(1, len(longest) // 4)]:
                free = length - self.frame.size
                draw = torch.rand(width, free, len(words), generator=self.generator).clamp_min(1e-9).to(least)
                pick = (self.prior[:free] - (-draw.log()).log()).argmax(-1)
                residual = energy(energy.table[framed(words[pick], self.frame)], self.ridge)[1]
                for place in range(free):
                    least[place].scatter_reduce_(0, pick[:, place], residual[:, start + place], "amin")
            met = least.isfinite() & self.places.allowed
            best = least.min(1, keepdim=True).values.clamp_min(1e-9)
            known = -(1 + 0.2 * trust) * (least.clamp_min(1e-9) / best).log()
            self.prior = torch.where(met, known, self.prior)

    def attempt(self, length: int) -> bool:
        """One relaxation and a descent from its best end; whether they found a sentence."""
        free = length - self.frame.size
        if not 0 < free <= len(self.prior):
            return False
        words, prior, before = self.places.words, self.prior[:free], len(self.found)
        allowed = self.places.allowed[:free]
        search = Filtered(self.energy, words, allowed, length, self.frame, self.ridge, self.shortlist)
        done = lambda rows: self._check(search, rows)  # noqa: E731
        pool = relax(self.energy, self.frame, free, words, self.schedule, self.generator, done, prior=prior)
        if len(self.found) > before:
            return True
        rows = list(dict.fromkeys(map(tuple, pool.sentences(self.frame).tolist())))
        start = min(zip(search.score(rows), rows, strict=True))[1]
        end = search.descend(start, pool.best(2 * self.schedule.restarts), self.budget)
        if self._accept(end):
            return True
        self.guesses[length] = min(self.guesses.get(length, (math.inf, ())), (search.scores[end] / length, end))
        return False

    def _check(self, search: Search, rows: Tensor) -> bool:
        sentences = [tuple(row) for row in rows.tolist()]
        values = search.score(sentences)
        place = min(range(len(values)), key=values.__getitem__)
        return self._accept(sentences[place])

    def _accept(self, tokens: tuple[int, ...]) -> bool:
        if tokens in self.found:
            return False
        ids = torch.tensor(tokens, device=self.energy.table.device)
        verdict = self.energy.verdict(ids)
        if verdict >= 1:
            return False
        self.found[tokens] = verdict
        self.energy.deflate(ids)
        self.progress(tokens)
        return True
