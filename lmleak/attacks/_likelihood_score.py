"""Log-likelihood of candidate sentences under a Gaussian mechanism, many in one forward and backward, from factors.

A release G~ = sum_i w_i g_i + N(0, noise^2) prefers sentence x to no sentence by (<G~, w g(x)> - |w g(x)|^2 / 2) /
noise^2 nats, w the clipping factor of x itself (or its share of the mean). Neither g(x) nor w is ever formed densely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lmleak.attacks._blanks import OPEN, filled_in
from lmleak.defenses import Gaussian
from lmleak.gradients.factors import Factor, Factors, capture, inner, squared_norms
from lmleak.gradients.losses import model_losses
from lmleak.gradients.observe import clip_weights, whole_model
from lmleak.records import Entry, Observation, Victim

#: Tokens scored in one pass, on CPU and GPU: MiniLM's factors of 640 tokens are 190 MB.
TOKENS = {False: 640, True: 16384}
TABLE = "\0table"  #: entry of the token table where nothing else asks for it: its output is where slopes are taken


@dataclass(frozen=True)
class Candidate:
    """One sentence with its class; for language models the label is the sentence itself."""

    tokens: tuple[int, ...]  #: special tokens included
    label: int = 0


@dataclass(frozen=True)
class Slope:
    """First order around one candidate: what exchanging the token at a position for any other would add, in nats."""

    value: float
    gain: Tensor  #: [t, v]


class Scorer:
    """Scores candidates against one release. Use inside `frozen`, made outside of it: clipping counts what trains.

    Evaluations are sentences sent through the model; a slope counts as three.
    """

    def __init__(self, victim: Victim, observation: Observation, mechanism: Gaussian | None):
        self.victim, self.mechanism, self.batch = victim, mechanism, observation.batch_size
        self.table = victim.module.get_input_embeddings().weight.detach()
        released = {e.name: observation.gradients[e.name].detach().to(self.table.dtype) for e in observation.entries}
        # Exact zeros without noise were withheld: they say nothing of the sentence.
        told = {name for name, tensor in released.items() if mechanism is not None or bool(tensor.any())}
        self.entries = tuple(e for e in observation.entries if e.name in told)
        self.targets: Mapping[str, Tensor] = {e.name: released[e.name] for e in self.entries}
        scoped = mechanism is not None and mechanism.scope == "model"
        self.whole = whole_model(victim.module) if scoped else ()
        self.scope = tuple({e.name: e for e in (*self.whole, *self.entries)}.values())
        self.captured = (*self.scope, self._table_entry())
        first = getattr(victim.family, "first_position", None)
        self.offset = first(victim.module) if first else 0
        self.numel = sum(e.numel for e in self.entries)
        self.noise = mechanism.std if mechanism is not None else 0.0
        self.evaluations = 0.0
        self.price = 1.0  #: of one sentence, in sentences that go forward and back through the whole model
        self.profiled = False  #: whether the factor of the clipping is taken for whatever suits a sentence best
        #: tokens that carry loss in the whole batch: what a sentence's share of a mean is taken of
        self.loss_tokens: int | None = None

    def _table_entry(self) -> Entry:
        table = self.victim.module.get_input_embeddings()
        module = next(name for name, m in self.victim.module.named_modules() if m is table)
        return Entry(TABLE, f"{module}.weight", module, tuple(table.weight.shape))

    def rows(self) -> Entry | None:
        """The token table among what is observed, or None."""
        table = self.captured[-1].parameter
        return next((e for e in self.entries if e.parameter == table and e.part is None), None)

    def aimed(self, targets: Mapping[str, Tensor], noise: float) -> Scorer:
        """The same scorer against another release of the same selection."""
        other = object.__new__(Scorer)
        other.__dict__ |= self.__dict__
        other.targets, other.noise, other.evaluations = targets, noise, 0.0
        return other

    def part(self, entries: Sequence[Entry]) -> Scorer:
        """The same release with only some of its entries seen."""
        other = self.aimed({e.name: self.targets[e.name] for e in entries}, self.noise)
        other.entries = tuple(entries)
        other.numel = sum(e.numel for e in entries)
        return other

    def profile(self) -> Scorer:
        """The same release, where the factor of the clipping is whatever suits a sentence best."""
        other = self.aimed(self.targets, self.noise)
        other.scope = other.entries
        other.captured = (*other.entries, self.captured[-1])
        other.profiled = True
        return other

    def deltas(self, candidates: Sequence[Candidate], entries: Sequence[Entry]) -> dict[str, Tensor]:
        """w times the gradient of the loss by each entry's output, entry name -> [k, t, o]; one length."""
        factors, _ = self._factors(candidates)
        with torch.no_grad():
            _, _, weights = self._measured(factors, len(candidates[0].tokens))
            out = {}
            for entry in entries:
                deltas, _ = self.sides(entry, factors)
                out[entry.name] = weights[entry.name][:, None, None] * deltas.detach()
        return out

    def sides(self, entry: Entry, factors: Factors) -> tuple[Tensor, Tensor]:
        """Output gradients and inputs [k, t, *] of an entry's first use, whatever the parameter's layout."""
        use = factors[entry.name][0]
        turned = use.one_hot or isinstance(self.victim.module.get_submodule(entry.module), Conv1D)
        return (use.right, use.left) if turned else (use.left, use.right)

    def scores(self, candidates: Sequence[Candidate]) -> list[float]:
        """Nats of every candidate over no sentence at all (without noise: in units of the squared gradient)."""
        products, squares = self.measures(candidates)
        return self.nats(products - 0.5 * squares).tolist()

    def nats(self, raw: Tensor) -> Tensor:
        """Raw scores over the noise's variance, where there is one."""
        return raw / self.noise**2 if self.noise else raw

    def measures(self, candidates: Sequence[Candidate]) -> tuple[Tensor, Tensor]:
        """<G~, w g> and |w g|^2 of every candidate, [k] each, float64; lengths may differ."""
        out = torch.zeros(2, len(candidates), dtype=torch.float64)
        by_length: dict[int, list[int]] = {}
        for i, one in enumerate(candidates):
            by_length.setdefault(len(one.tokens), []).append(i)
        for length, places in by_length.items():
            size = max(1, TOKENS[self.table.is_cuda] // length)
            for at in range(0, len(places), size):
                part = places[at : at + size]
                factors, _ = self._factors([candidates[i] for i in part], table=not self.profiled)
                with torch.no_grad():
                    products, squares, _ = self._measured(factors, length)
                out[0, part], out[1, part] = products.double().cpu(), squares.double().cpu()
        return out[0], out[1]

    def energy(self) -> float:
        """Squared norm of the release."""
        return sum(float(t.double().square().sum()) for t in self.targets.values())

    def excess(self, left: float) -> float:
        """Standard deviations by which a squared norm left of the release is more than its noise's."""
        return (left / self.noise**2 - self.numel) / math.sqrt(2 * self.numel)

    def slope(self, candidate: Candidate) -> Slope:
        """Score of one candidate and its first-order change for every token at every position.

        Through the embedding by double backward; where the token table itself is observed, also through the row of it
        that the token's gradient falls into.
        """
        self.evaluations += 2 * self.price
        factors, leaf = self._factors([candidate], create_graph=True)
        products, squares, weights = self._measured(factors, len(candidate.tokens))
        value = (products - 0.5 * squares).sum()
        (along,) = torch.autograd.grad(value, leaf)
        gain = along[0].detach() @ self.table.T
        own = torch.tensor(candidate.tokens, device=gain.device)
        rows = self.rows()
        if rows is not None:
            delta = weights[rows.name].detach() * factors[TABLE][0].right[0].detach()
            gain = gain + delta @ self.targets[rows.name].T
            # |g|^2 grows where two positions share a row.
            gain.index_add_(1, own, -(delta @ delta.T))
        gain = gain - gain.gather(1, own[:, None])
        return Slope(float(self.nats(value.detach().double())), self.nats(gain))

    def blank(self, candidates: Sequence[Candidate], filling: Tensor, slopes: bool = False) -> Tensor:
        """Nats [k] of candidates of one length with embeddings [p, d] in their open places; or slopes [p, d].

        Open places are as many in each, taken row by row.
        """
        out, filling = [], filling.view(len(candidates), -1, filling.shape[-1])
        size = max(1, TOKENS[self.table.is_cuda] // len(candidates[0].tokens) // (2 if slopes else 1))
        for at in range(0, len(candidates), size):
            part, some = candidates[at : at + size], filling[at : at + size]
            factors, leaf = self._factors(part, create_graph=slopes, filling=some.flatten(0, 1))
            products, squares, _ = self._measured(factors, len(part[0].tokens))
            value = self.nats(products - 0.5 * squares)
            if slopes:
                self.evaluations += 2 * self.price * len(part)
                (along,) = torch.autograd.grad(value.sum(), leaf)
                value = along[torch.tensor([one.tokens for one in part], device=along.device) == OPEN]
            out.append(value.detach())
        return torch.cat(out)

    def total(self, candidate: Candidate) -> dict[str, Tensor]:
        """w g of one candidate, dense: entry name -> tensor of the entry's shape."""
        factors, _ = self._factors([candidate])
        with torch.no_grad():
            _, _, weights = self._measured(factors, len(candidate.tokens))
            return {
                e.name: torch.stack([use.scaled(weights[e.name]).total() for use in factors[e.name]]).sum(0)
                for e in self.entries
            }

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """The model's, for sentences of one length [k, t]."""
        places = torch.arange(ids.shape[1], device=ids.device) + self.offset
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places.expand(len(ids), -1)}

    def _factors(
        self,
        candidates: Sequence[Candidate],
        create_graph: bool = False,
        table: bool = True,
        filling: Tensor | None = None,
    ) -> tuple[dict, Tensor]:
        """Factors, and the token table's output; without it, the backward pass ends where the entries do.

        Args:
            filling: [k, d] embeddings in the candidates' open places.
        """
        device = self.table.device
        ids = torch.tensor([one.tokens for one in candidates], device=device)
        blank = ids == OPEN
        ids = ids.clamp_min(0)
        self.evaluations += self.price * len(ids)
        labels = ids.masked_fill(blank, -100)
        if self.victim.task == "sequence-classification":
            labels = torch.tensor([one.label for one in candidates], device=device)
        owner = self.victim.module.get_input_embeddings()
        with (
            filled_in(owner, blank, filling),
            capture(self.victim.module, self.captured if table else self.entries) as tape,
        ):
            losses = model_losses(self.victim.module, self.inputs(ids), labels, self.victim.task, "sum")
        if not table:
            return tape.factors(losses), ids
        calls = tape.calls[self.captured[-1].parameter]
        leaf = next(call.output for call in calls if call.owner is owner)
        factors = tape.factors(losses, create_graph=create_graph)
        uses = tuple(use for use in factors[TABLE] if use.one_hot)
        return {**factors, TABLE: uses}, leaf

    def _measured(self, factors: Mapping[str, Sequence[Factor]], length: int) -> tuple[Tensor, Tensor, dict]:
        """<G~, w g>, |w g|^2 [k], and w of every entry [k]."""
        names = [e.name for e in self.entries]
        squares = {e.name: squared_norms(factors[e.name]) for e in self.scope}
        if self.profiled:
            product = sum(inner(factors[name], self.targets[name]) for name in names)
            square = sum(squares[name] for name in names)
            best = product.clamp_min(0) / square.clamp_min(1e-24)  # type: ignore[union-attr]
            return best * product, best.square() * square, dict.fromkeys(names, best)
        weights = self._weights(squares, length)
        products = sum(weights[name] * inner(factors[name], self.targets[name]) for name in names)
        return products, sum(weights[name].square() * squares[name] for name in names), weights  # type: ignore[return-value]

    def _weights(self, squares: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        names = [e.name for e in self.entries]
        mechanism = self.mechanism
        if mechanism is None or mechanism.max_grad_norm is None:
            share = 1.0 / self.batch
            if self.victim.task == "causal-lm" and self.loss_tokens:
                share = (length - 1) / self.loss_tokens
            return dict.fromkeys(names, torch.full_like(squares[names[0]], share))
        bound = mechanism.max_grad_norm
        if mechanism.scope == "per_layer":
            limit = bound / len(names) ** 0.5
            return {name: clip_weights(root(squares[name]), limit) for name in names}
        over = [e.name for e in self.whole] if mechanism.scope == "model" else names
        return dict.fromkeys(names, clip_weights(root(torch.stack([squares[name] for name in over]).sum(0)), bound))


def root(squares: Tensor) -> Tensor:
    """Square root whose slope at 0 is 0, not infinite."""
    return squares.clamp_min(1e-24).sqrt()
