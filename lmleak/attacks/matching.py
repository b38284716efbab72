"""Gradient matching on embeddings with LAMP's discrete moves (DLG 1906.08935, TAG 2103.06819, LAMP 2202.08827).

All restarts are one batch: a step is one forward and one double backward through (input, output-gradient) factors.
Defaults are LAMP's cosine schedule on a 2,000-step budget.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement, islice
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lmleak.attacks._lengths import lengths_from_rank
from lmleak.attacks._moves import reorder, shuffle
from lmleak.attacks._objective import Derivative, Layout, Objective, frozen
from lmleak.attacks._prior import Prior, Task, load_prior
from lmleak.attacks._text import Frame, refuse, sentence, special_frame
from lmleak.errors import LmleakError
from lmleak.records import Knowledge, Observation, Reconstruction, Victim

LABEL_PROBES = 32  #: random embeddings under which every assignment of labels is tried
PRUNED = 32  #: reorderings scored at once, the least surprising first
MAX_LABELS = 256  #: label assignments tried at most (a batch of 8 with 2 classes has 9)

#: Everyday English, for the size of the embeddings of everyday words.
TEXT = (
    "The people who live in the old house by the river went to see a film last night, and they did not like it at all."
)

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
#: An easy case, for the contract tests.
EXAMPLE = {
    "fields": {"steps": 60, "inits": 50, "permutations": 20, "moves": 20, "moves_every": 20, "lr": 0.02},
    "select": {"components": ["all"]},
    "knowledge": {"labels": True, "lengths": True},
    "batch_size": 1,
}


class Config(BaseModel):
    """Defaults: LAMP with the cosine loss (its appendix and code); TAG is `objective: tag, steps: 2500, lr: 0.1`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["cosine", "euclidean", "tag"] = "cosine"
    steps: Positive = 2000
    restarts: Positive = 1
    #: of a step: finite_difference takes three plain gradients, for attention kernels that have no double backward
    derivative: Derivative = "exact"
    lr: Annotated[float, Field(gt=0)] = 0.01
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.89  #: factor every `lr_decay_every` steps
    lr_decay_every: Positive = 50
    inits: Positive = 500  #: random embeddings tried for every restart
    permutations: Count = 500  #: orders tried of the best of them
    norm_weight: Annotated[float, Field(ge=0)] = 1.0  #: pull of the mean embedding norm to that of words in a text
    alpha: Annotated[float, Field(ge=0)] = 0.01  #: weight of tag's L1 term
    moves: Count = 200  #: reorderings scored at every discrete step; 0 turns them off
    moves_every: Positive = 75
    moves_from: Annotated[float, Field(ge=0, le=1)] = 0.1  #: share of the steps before the first
    prior: str | None = None  #: language model (hub id, folder, package:NAME/PATH) that scores reorderings
    prior_task: Task = "causal-lm"  #: or masked-lm: its mean loss with a quarter of the tokens masked, four times
    prior_weight: Annotated[float, Field(ge=0)] = 0.2


def attack(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> Reconstruction:
    """Moves random embeddings until their gradient matches the observed one, then reads off the nearest tokens.

    Lengths come from the rank of an observed weight gradient where they are not granted; class labels that are not
    granted are those under which random sentences match best on average. For language models the labels are the
    candidate's own nearest tokens.

    Raises:
        ModelError: the prior cannot be loaded.
    """
    attention = getattr(victim.module.config, "_attn_implementation", "eager")
    if attention != "eager" and config.derivative == "exact":
        why = (
            f"attn_implementation '{attention}' has no double backward; set model.attn_implementation: eager or "
            "attack.derivative: finite_difference"
        )
        return refuse("not_applicable", why)
    frame = special_frame(victim, knowledge)
    lengths = knowledge.lengths or lengths_from_rank(victim, observation)
    if lengths is None:
        return refuse("not_applicable", "length unknown: no rank to read it from; grant knowledge.lengths")
    if min(lengths) < frame.size + 1:
        return refuse("no_signal", f"the gradient shows {min(lengths)} token(s), fewer than a sentence has")
    objective = Objective(victim, observation, Layout(lengths), config.objective, config.alpha)
    if not objective.entries:
        return refuse("not_applicable", "only the token embedding is observed; embedding_rows reads it outright")
    if not any(float(norm) > 0 for norm in objective.norms.values()):
        return refuse("no_signal", "the observed gradient is zero")
    prior = load_prior(config.prior, victim, config.prior_task) if config.prior else None
    with frozen(victim.module):
        search = _Search(config, objective, victim, frame, generator, prior)
        return search.run(search.labels(knowledge), progress)


class _Search:
    """State of one attack: k restarts of b sentences as embeddings [k, b, s, d]."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        victim: Victim,
        frame: Frame,
        generator: torch.Generator,
        prior: Prior | None,
    ):
        self.config, self.objective, self.victim = config, objective, victim
        self.frame, self.generator, self.prior = frame, generator, prior
        self.table = victim.module.get_input_embeddings().weight.detach()
        self.unit = torch.nn.functional.normalize(self.table, dim=1)
        self.level = self._level()
        special = sorted(set(victim.processor.all_special_ids))
        self.banned = torch.tensor([i for i in special if i < len(self.table)], device=self.table.device)
        layout = objective.layout
        # Which positions are given by the frame or are padding, and what stands there.
        self.fixed = torch.zeros(layout.batch, layout.width, dtype=torch.bool, device=self.table.device)
        self.given = torch.zeros_like(self.fixed, dtype=torch.long)
        self.spans = []
        for i, length in enumerate(layout.lengths):
            known = dict(enumerate(frame.first)) | dict(enumerate(frame.last, start=length - len(frame.last)))
            known |= dict.fromkeys(range(length, layout.width), victim.processor.pad_token_id or 0)
            for place, token in known.items():
                self.fixed[i, place], self.given[i, place] = True, token
            self.spans.append((len(frame.first), length - len(frame.last)))

    def _level(self) -> float:
        """Mean embedding norm of words in a text: in the table of a trained GPT-2 the rare and long ones outweigh them.

        A 4-layer one's table has a mean of 3.8, text 0.9: 150 steps from and to the table's read 22 % of 9 tokens, from
        and to the text's 39 %, at half the distance. MiniLM's means are 1.07 and 1.05.
        """
        tokens = self.victim.processor(TEXT, add_special_tokens=False)["input_ids"]
        return float((self.table[tokens] if tokens else self.table).norm(dim=1).mean())

    def labels(self, knowledge: Knowledge) -> Tensor | None:
        """[restarts, b] classes; None where labels are the tokens themselves.

        The sign of the head's error decides the sign of every gradient below it, so even random embeddings tell the
        labels: on MiniLM the right one's mean distance was the lower in 6 of 6 sentences (0.96 against 1.04).
        """
        restarts, b = self.config.restarts, self.objective.layout.batch
        if self.victim.task != "sequence-classification":
            return None
        if knowledge.labels is not None:
            return torch.tensor(knowledge.labels, device=self.table.device).expand(restarts, -1)
        classes = range(self.victim.module.config.num_labels)
        choices = torch.tensor(list(islice(combinations_with_replacement(classes, b), MAX_LABELS)))
        drawn = self._drawn(LABEL_PROBES)
        means = torch.stack(
            [self.objective.scored(drawn, row.to(drawn.device).expand(LABEL_PROBES, -1)) for row in choices]
        )
        return choices[int(means.mean(1).argmin())].to(self.table.device).expand(restarts, -1)

    def run(self, labels: Tensor | None, progress: Callable[[str], None]) -> Reconstruction:
        config = self.config
        embeds = self._pin(torch.stack([self._start(labels, row) for row in range(config.restarts)]))
        embeds.requires_grad_(True)
        optimizer = torch.optim.Adam([embeds], lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_decay_every, config.lr_decay)
        for step in range(config.steps):
            loss, slope = self.objective.slope(embeds, self._targets(embeds, labels), config.derivative)
            norms = embeds[:, ~self.fixed].norm(dim=-1).mean(-1)
            (pull,) = torch.autograd.grad((norms - self.level).pow(2).sum(), [embeds])
            embeds.grad = (slope + config.norm_weight * pull).masked_fill_(self.fixed[..., None], 0)
            optimizer.step()
            schedule.step()
            begun = step >= config.moves_from * config.steps
            if config.moves and begun and (step + 1) % config.moves_every == 0:
                with torch.no_grad():
                    embeds.copy_(self._reordered(embeds, labels))
                best = int(loss.argmin())
                progress(f"step {step + 1}: {self._texts(self.tokens(embeds[best : best + 1])[0])[0]}")
        return self._best(embeds.detach(), labels)

    def tokens(self, embeds: Tensor) -> Tensor:
        """Nearest tokens by cosine, [k, b, s]; special tokens only where they are known to stand."""
        similar = torch.nn.functional.normalize(embeds.detach(), dim=-1) @ self.unit.T
        similar[..., self.banned] = -2
        return torch.where(self.fixed, self.given, similar.argmax(-1))

    def _drawn(self, count: int) -> Tensor:
        layout = self.objective.layout
        shape = (count, layout.batch, layout.width, self.table.shape[1])
        return self._pin(torch.randn(shape, generator=self.generator).to(self.table))

    def _pin(self, embeds: Tensor) -> Tensor:
        return torch.where(self.fixed[..., None], self.table[self.given], embeds)

    def _start(self, labels: Tensor | None, row: int) -> Tensor:
        """Best of `inits` random embeddings, then of `permutations` of it, at the mean norm of a text; [b, s, d]."""
        config = self.config
        start = self._first(self._drawn(config.inits), labels, row)
        if config.permutations:
            orders = torch.stack([self._permuted(shuffle) for _ in range(config.permutations)])
            start = self._first(self._gathered(start, orders), labels, row)
        free = start[~self.fixed]
        return start * (self.level / free.norm(dim=-1).mean())

    def _first(self, candidates: Tensor, labels: Tensor | None, row: int) -> Tensor:
        scores = self.objective.scored(candidates, self._targets(candidates, labels, row))
        return candidates[int(scores.argmin())]

    def _targets(self, embeds: Tensor, labels: Tensor | None, row: int | None = None) -> Tensor:
        if labels is None:
            return self.tokens(embeds).masked_fill(self.objective.mask == 0, -100)
        return labels if row is None else labels[row].expand(len(embeds), -1)

    def _permuted(self, move: Callable[..., Tensor]) -> Tensor:
        width = self.objective.layout.width
        return torch.stack([move(*span, width, self.generator) for span in self.spans])

    def _gathered(self, embeds: Tensor, orders: Tensor) -> Tensor:
        """One candidate [b, s, d] under each of the orders [n, b, s]."""
        index = orders.to(embeds.device)[..., None].expand(*orders.shape, embeds.shape[-1])
        return embeds.expand(len(orders), *embeds.shape).gather(2, index)

    def _reordered(self, embeds: Tensor, labels: Tensor | None) -> Tensor:
        """Every restart replaced by the best of itself and `moves` reorderings of it."""
        out = []
        for row, own in enumerate(embeds.detach()):
            orders = torch.stack([torch.arange(own.shape[1]).expand(own.shape[0], -1)] * (self.config.moves + 1))
            for i in range(self.config.moves):
                orders[i + 1] = self._permuted(reorder)
            # Short sentences have few reorderings; the sentence itself comes first, so that it wins a tie.
            orders = torch.tensor(list(dict.fromkeys(tuple(map(tuple, order)) for order in orders.tolist())))
            # A reordering of embeddings reorders their nearest tokens: they are sought once.
            tokens = self.tokens(own[None])[0].expand(len(orders), -1, -1).gather(2, orders.to(own.device))
            surprise = self.config.prior_weight * self._surprise(tokens).to(own) if self.prior else own.new_zeros(1)
            best = self._least(own, orders, tokens, labels, row, surprise.expand(len(orders)))
            out.append(self._gathered(own, orders[best : best + 1])[0])
        return torch.stack(out)

    def _least(
        self, own: Tensor, orders: Tensor, tokens: Tensor, labels: Tensor | None, row: int, surprise: Tensor
    ) -> int:
        """The order with the least distance and surprise.

        No distance is negative, so an order whose surprise alone exceeds the best sum needs no gradient: with a prior,
        MiniLM, of 200 orders 32 to 111 got one.
        """
        ranked, best, least = surprise.argsort(stable=True), 0, float("inf")
        for part in ranked.split(PRUNED if self.prior else len(ranked)):
            if float(surprise[part[0]]) >= least:
                break
            candidates = self._gathered(own, orders[part.cpu()])
            if labels is None:
                targets = tokens[part].masked_fill(self.objective.mask == 0, -100)
            else:
                targets = labels[row].expand(len(part), -1)
            scores = torch.nan_to_num(self.objective.scored(candidates, targets), nan=float("inf")) + surprise[part]
            if float(scores.min()) < least:
                best, least = int(part[scores.argmin()]), float(scores.min())
        return best

    def _surprise(self, tokens: Tensor) -> Tensor:
        assert self.prior is not None
        flat = [text for row in tokens for text in self._texts(row)]
        return self.prior(flat).view(len(tokens), -1).mean(1)

    def _texts(self, tokens: Tensor) -> list[str]:
        lengths = self.objective.layout.lengths
        rows = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        return [self.victim.processor.decode(row, skip_special_tokens=True) for row in rows]

    def _best(self, embeds: Tensor, labels: Tensor | None) -> Reconstruction:
        """The restart whose *tokens* match best: an embedding may match where no sentence does."""
        tokens = self.tokens(embeds)
        scores = self.objective.scored(self.table[tokens], self._targets(embeds, labels))
        if not bool(scores.isfinite().any()):
            raise LmleakError("matching diverged: every restart's objective is not finite; lower attack.lr")
        best = int(torch.nan_to_num(scores, nan=float("inf")).argmin())
        rows = [row[:n] for row, n in zip(tokens[best].tolist(), self.objective.layout.lengths, strict=True)]
        score = float(scores[best])
        # Only the cosine objective has a scale: 0 is a perfect match, 1 an orthogonal one.
        confidence = max(0.0, 1.0 - score) if self.config.objective == "cosine" else 0.0
        steps = self.config.steps
        details: dict[str, Any] = {"objective": score, "restart": best, "restarts": len(scores), "steps": steps}
        if labels is not None:
            details["labels"] = labels[best].tolist()
        return sentence(self.victim, rows, [confidence] * len(rows), details)
