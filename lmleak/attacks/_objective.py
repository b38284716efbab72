"""How far candidates' gradients are from the observed ones, for many candidates in one forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lmleak.gradients.factors import Factor, LowRank, capture, inner, low_rank, squared_norms
from lmleak.gradients.losses import additions, forward, sample_losses
from lmleak.gradients.moved import Move, moved
from lmleak.records import Entry, Observation, Victim

# Tokens scored in one pass, on CPU and GPU. BERT-base holds 0.45 GB of activations for 512: a cell stays under 3 GB.
TOKENS = {False: 512, True: 16384}
# A finite difference moves the observed parameters by this share of the median norm of the model's matrices. MiniLM,
# float32, all layers, one, or one query matrix: the slope is off by 2e-4 to 1e-3 of its norm with each objective, three
# times more at a third or at three times the size.
REACH = 2e-4
Derivative = Literal["exact", "finite_difference"]
DENSE = 1 << 28  #: gradient values formed at once by tag's L1 term, 1 GB in float32


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters need no gradient and dropout is off inside; both are put back."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    modes = {m: m.training for m in module.modules()}
    for p in wanted:
        p.requires_grad_(False)
    module.eval()
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for m, training in modes.items():
            m.training = training


@dataclass(frozen=True)
class Layout:
    """Shape of what is searched: b sentences of known lengths in a rectangle of s positions."""

    lengths: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Sentences a candidate."""
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Positions of the longest sentence."""
        return max(self.lengths)

    def mask(self, device: torch.device) -> Tensor:
        """[b, s] 1 at tokens."""
        places = torch.arange(self.width, device=device)
        return (places < torch.tensor(self.lengths, device=device)[:, None]).long()


class Objective:
    """Distance between the observed gradients and those of k candidates, from factors: no candidate gradient is formed
    except by `tag`, whose L1 term has no factored form.

    Euclidean: DLG (Zhu et al. 2019, 1906.08935); cosine, mean over tensors: Geiping et al. 2020 (2003.14053) as LAMP
    (Balunovic et al. 2022, 2202.08827) uses it; tag: euclidean + alpha L1 (Deng et al. 2021, 2103.06819).
    """

    def __init__(self, victim: Victim, observation: Observation, layout: Layout, kind: str, alpha: float = 0.01):
        self.victim, self.layout, self.kind, self.alpha = victim, layout, kind, alpha
        self.reduction = observation.reduction
        table = victim.module.get_input_embeddings()
        self.entries = tuple(e for e in observation.entries if self._reachable(e, table))
        self.targets = {e.name: observation.gradients[e.name].to(table.weight.dtype) for e in self.entries}
        # Not `norm()`: in float32 on a CPU it is off by 1e-4 on a 3072 x 768 tensor, this by 1e-7.
        self.norms = {name: target.square().sum().sqrt() for name, target in self.targets.items()}
        # As many outer products as there are tokens: what a clean gradient is made of.
        tokens = layout.batch * layout.width
        self.projections: dict[str, Tensor | LowRank] = {
            name: target if (thin := low_rank(target, tokens)) is None else thin
            for name, target in self.targets.items()
        }
        self.mask = layout.mask(table.weight.device)
        matrices = [p.detach().float().norm() for p in victim.module.parameters() if p.dim() > 1]
        self.reach = REACH * float(torch.stack(matrices).median())

    def _reachable(self, entry: Entry, table: nn.Module) -> bool:
        # Candidates are embeddings, not ids: the token table takes no part in their forward pass.
        return self.victim.module.get_submodule(entry.module) is not table

    def __call__(self, embeds: Tensor, labels: Tensor, *, create_graph: bool = False) -> Tensor:
        """Distance of every candidate, [k].

        Args:
            embeds: [k, b, s, d] token embeddings before positions are added.
            labels: [k, b] classes, or [k, b, s] token labels.
            create_graph: for a step of optimisation; then `embeds` must require gradients.
        """
        factors = self._factors(embeds, labels, create_graph)
        out = self._distance(*self._measures(factors))
        return out + self.alpha * self._absolute(factors) if self.kind == "tag" else out

    def slope(self, embeds: Tensor, labels: Tensor, derivative: Derivative = "exact") -> tuple[Tensor, Tensor]:
        """Distance of every candidate, [k], and its gradient with respect to the candidate's own embeddings.

        Args:
            embeds: [k, b, s, d], requiring no gradient.
            labels: as in a call.
            derivative: `exact` by double backward; `finite_difference` by three plain ones, which fused attention has.
        """
        x = embeds.detach().requires_grad_()
        if derivative == "exact":
            values = self(x, labels, create_graph=True)
            return values.detach(), torch.autograd.grad(values.sum(), x)[0]
        factors = self._factors(x, labels, False)
        with torch.no_grad():
            values, moves, sizes = self._moves(factors)
        # theta + h v and theta - h v, each candidate's own, in one pass.
        both = {name: [move.twice() for move in parts] for name, parts in moves.items()}
        x = embeds.detach().repeat(2, 1, 1, 1).requires_grad_()
        with moved(self.victim.module, self.entries, both, 2 * len(embeds)):
            losses = self._batch_losses(x, labels.repeat(2, *[1] * (labels.dim() - 1)))
        high, low = torch.autograd.grad(losses.sum(), x)[0].chunk(2)
        return values, (high - low) / (2 * sizes[:, None, None, None])

    def _factors(self, embeds: Tensor, labels: Tensor, create_graph: bool) -> dict[str, list[Factor]]:
        b = embeds.shape[1]
        with capture(self.victim.module, self.entries) as tape:
            losses = self._batch_losses(embeds, labels)
        factors = tape.factors(losses, create_graph=create_graph)
        return {name: [use.grouped(b) for use in uses] for name, uses in factors.items()}

    def _batch_losses(self, embeds: Tensor, labels: Tensor) -> Tensor:
        k, b, s, _ = embeds.shape
        inputs = {
            "inputs_embeds": embeds.flatten(0, 1),
            "attention_mask": self.mask.repeat(k, 1),
            "position_ids": self._positions(s).expand(k * b, -1),
        }
        module = self.victim.module
        with additions(module) as added:
            losses = self._losses(self._logits(module, inputs), labels.flatten(0, 1))
        for own in added:
            losses = losses + (own / b if self.reduction == "mean" else own)
        return losses

    def _logits(self, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self.victim.task != "sequence-classification" or not self.victim.family.CAUSAL:
            return forward(module, inputs)
        # transformers finds a causal classifier's last token by its pad id, which embeddings do not have.
        places = self.mask.sum(1).repeat(len(inputs["attention_mask"]) // self.layout.batch) - 1
        hidden = self.victim.module.base_model(**inputs, use_cache=False).last_hidden_state
        return self.victim.module.score(hidden[torch.arange(len(hidden), device=hidden.device), places])

    def _positions(self, s: int) -> Tensor:
        first = getattr(self.victim.family, "first_position", None)
        return torch.arange(s, device=self.mask.device) + (first(self.victim.module) if first else 0)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = sample_losses(logits, labels, self.victim.task, "sum")
        if self.reduction == "sum":
            return own
        predicted = labels[:, 1:] if self.victim.task == "causal-lm" else labels.view(len(own), -1)
        counts = (predicted != -100).sum(1).to(own.dtype)
        share = counts.view(-1, self.layout.batch)
        return own * (share / share.sum(1, keepdim=True)).flatten()

    def _measures(self, factors: dict[str, list[Factor]]) -> tuple[Tensor, Tensor]:
        """Inner products with the observed gradients and squared norms, [entries, k] each."""
        products = torch.stack([inner(uses, self.projections[name]) for name, uses in factors.items()])
        return products, torch.stack([squared_norms(uses) for uses in factors.values()])

    def _distance(self, products: Tensor, squares: Tensor) -> Tensor:
        norms = torch.stack([self.norms[e.name] for e in self.entries])[:, None]
        if self.kind == "cosine":
            own = squares.clamp_min(1e-24).sqrt()
            # A key's bias has no gradient (softmax is shift-invariant): the direction of its rounding is no evidence.
            floor = 10 * torch.finfo(own.dtype).eps
            directed = (squares > floor**2 * squares.amax(0)) & (norms > floor * norms.amax())
            return 1 - torch.where(directed, products / (own * norms).clamp_min(1e-24), 0).mean(0)
        return (squares - 2 * products + norms**2).clamp_min(0).sum(0)

    def _absolute(self, factors: dict[str, list[Factor]]) -> Tensor:
        """Sum of absolute differences, [k]: the one measure that has no factored form."""
        return sum(self._misses(name, uses).abs().flatten(1).sum(1) for name, uses in factors.items())  # type: ignore[return-value]

    def _misses(self, name: str, uses: list[Factor]) -> Tensor:
        return sum(use.each() for use in uses) - self.targets[name]  # type: ignore[return-value]

    def _moves(self, factors: dict[str, list[Factor]]) -> tuple[Tensor, dict[str, list[Move]], Tensor]:
        """Values [k], for every entry the derivative of the value by the gradient times h, and the h of each candidate.

        The value is a function of products and squares, so its derivative is a sum of the observed gradient and the
        candidate's own factors.
        """
        products, squares = (part.requires_grad_() for part in self._measures(factors))
        with torch.enable_grad():
            values = self._distance(products, squares)
            towards, along = torch.autograd.grad(values.sum(), [products, squares])
        moves: dict[str, list[Move]] = {}
        for (name, uses), t, a in zip(factors.items(), towards, along, strict=True):
            moves[name] = [Move(t, self.projections[name])] + [Move(2 * a, use) for use in uses]
        values = values.detach()
        norms = torch.stack([self.norms[name] for name in factors])[:, None]
        length = (towards * norms).square() + 4 * towards * along * products + (2 * along).square() * squares
        if self.kind == "tag":
            for i, (name, uses) in enumerate(factors.items()):
                miss = self._misses(name, uses)
                values = values + self.alpha * miss.abs().flatten(1).sum(1)
                dense = (2 * miss + self.alpha * miss.sign()).reshape(miss.shape)
                moves[name] = [Move(torch.ones_like(values), dense, own=True)]
                length[i] = dense.square().flatten(1).sum(1)
        sizes = self.reach / length.sum(0).clamp_min(0).sqrt().clamp_min(1e-30)
        return values, {name: [move.scaled(sizes) for move in parts] for name, parts in moves.items()}, sizes

    def scored(self, embeds: Tensor, labels: Tensor) -> Tensor:
        """The same without a graph, in chunks: memory does not grow with the number of candidates."""
        size = max(1, TOKENS[embeds.is_cuda] // (embeds.shape[1] * embeds.shape[2]))
        if self.kind == "tag":
            size = max(1, min(size, DENSE // sum(target.numel() for target in self.targets.values())))
        parts = zip(embeds.detach().split(size), labels.split(size), strict=True)
        return torch.cat([self(part, label).detach() for part, label in parts])
