"""LAMP as its paper describes it, in plain loops: one restart and one candidate at a time (2202.08827).

A slow twin to compare with, not part of the package. Every score and every step is a forward pass of one candidate and
`torch.autograd.grad` on the observed parameters, the objective on their dense gradients; the language model scores one
text at a time. What could make the loop needlessly slow is left out: scores build no graph, frozen parameters get no
gradient, targets' norms are taken once, nearest tokens are sought once a round (a reordering moves them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmleak.attacks._moves import reorder, shuffle
from lmleak.attacks._text import special_frame
from lmleak.attacks.matching import Config
from lmleak.records import Knowledge, Observation, Victim


class Lamp:
    """One sentence, its label and length granted."""

    def __init__(self, config: Config, observation: Observation, knowledge: Knowledge, victim: Victim, prior=None):
        assert config.objective in ("cosine", "tag", "euclidean")
        assert observation.batch_size == 1
        assert knowledge.labels is not None
        assert knowledge.lengths is not None
        self.config, self.victim, self.prior = config, victim, prior
        self.label = torch.tensor(knowledge.labels)
        self.length = knowledge.lengths[0]
        self.parameters = [victim.module.get_parameter(entry.parameter) for entry in observation.entries]
        self.targets = [observation.gradients[entry.name] for entry in observation.entries]
        self.norms = [target.norm() for target in self.targets]
        self.table = victim.module.get_input_embeddings().weight.detach()
        self.level = self.table.norm(dim=1).mean()
        self.unit = torch.nn.functional.normalize(self.table, dim=1)
        self.special = sorted(set(victim.processor.all_special_ids))
        frame = special_frame(victim, knowledge)
        self.known = dict(enumerate(frame.first)) | dict(enumerate(frame.last, self.length - len(frame.last)))
        self.span = (len(frame.first), self.length - len(frame.last))

    def distance(self, x: Tensor, *, graph: bool) -> Tensor:
        """The objective for one candidate [1, s, d]."""
        loss = self.victim.module(inputs_embeds=x, labels=self.label).loss
        total: Tensor | float = 0.0
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=graph)
        for gradient, target, norm in zip(gradients, self.targets, self.norms, strict=True):
            if self.config.objective == "cosine":
                total = total + (1 - (gradient * target).sum() / (gradient.norm() * norm)) / len(self.targets)
            else:
                total = total + (gradient - target).square().sum()
                if self.config.objective == "tag":
                    total = total + self.config.alpha * (gradient - target).abs().sum()
        assert isinstance(total, Tensor)
        return total

    def tokens(self, x: Tensor) -> list[int]:
        """The nearest tokens of one candidate."""
        similar = torch.nn.functional.normalize(x[0], dim=-1) @ self.unit.T
        similar[:, self.special] = -2
        found = similar.argmax(-1).tolist()
        return [self.known.get(place, token) for place, token in enumerate(found)]

    def pin(self, x: Tensor) -> Tensor:
        """Puts the known special tokens in their places."""
        for place, token in self.known.items():
            x[:, place] = self.table[token]
        return x

    def run(self, generator: torch.Generator) -> tuple[list[int], float]:
        """One restart: tokens, and their distance."""
        config = self.config
        x = self.start(generator).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_decay_every, config.lr_decay)
        free = [place for place in range(self.length) if place not in self.known]
        for step in range(config.steps):
            optimizer.zero_grad()
            distance = self.distance(x, graph=True)
            pull = (x[:, free].norm(dim=-1).mean() - self.level).square()
            (x.grad,) = torch.autograd.grad(distance + config.norm_weight * pull, [x])
            x.grad[:, list(self.known)] = 0
            optimizer.step()
            schedule.step()
            if config.moves and step >= config.moves_from * config.steps and (step + 1) % config.moves_every == 0:
                moved = self.moved(x.detach(), generator)
                with torch.no_grad():
                    x.copy_(moved)
        tokens = self.tokens(x.detach())
        return tokens, float(self.distance(self.table[tokens][None], graph=False))

    def start(self, generator: torch.Generator) -> Tensor:
        """The best of the random embeddings, then of its permutations, at the table's mean norm."""
        best, lowest = None, float("inf")
        for _ in range(self.config.inits):
            x = self.pin(torch.randn(1, self.length, self.table.shape[1], generator=generator))
            distance = float(self.distance(x, graph=False))
            if best is None or distance < lowest:
                best, lowest = x, distance
        assert best is not None
        x, lowest = best, float("inf")
        for _ in range(self.config.permutations):
            permuted = x[:, shuffle(*self.span, self.length, generator)]
            distance = float(self.distance(permuted, graph=False))
            if distance < lowest:
                best, lowest = permuted, distance
        free = [place for place in range(self.length) if place not in self.known]
        return best * (self.level / best[:, free].norm(dim=-1).mean())

    def moved(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The best of the embeddings and their reorderings."""
        tokens = torch.tensor(self.tokens(x))
        best, lowest = x, self.score(x, tokens)
        for _ in range(self.config.moves):
            order = reorder(*self.span, self.length, generator)
            score = self.score(x[:, order], tokens[order])
            if score < lowest:
                best, lowest = x[:, order], score
        return best

    def score(self, x: Tensor, tokens: Tensor) -> float:
        """Distance and surprise of one candidate."""
        score = float(self.distance(x, graph=False))
        if self.prior is not None:
            text = self.victim.processor.decode(tokens.tolist(), skip_special_tokens=True)
            score += self.config.prior_weight * self.prior(text)
        return score


def plain_prior(model: Victim) -> Callable[[str], float]:
    """A causal language model's mean negative log-likelihood of one text."""
    tokenizer = model.processor
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    @torch.no_grad()
    def surprise(text: str) -> float:
        ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        return float(model.module(input_ids=ids, labels=ids, use_cache=False).loss)

    return surprise


def lamp(
    config: Config,
    observation: Observation,
    knowledge: Knowledge,
    victim: Victim,
    prior: Callable[[str], float] | None = None,
    seed: int = 0,
) -> tuple[list[int], float]:
    """The whole schedule, restart after restart: tokens of the best of them, special tokens included, and distance."""
    attack = Lamp(config, observation, knowledge, victim, prior)
    wanted = [p for p in victim.module.parameters() if p.requires_grad]
    observed = {id(p) for p in attack.parameters}
    for p in wanted:
        p.requires_grad_(id(p) in observed)
    try:
        runs = [attack.run(torch.Generator().manual_seed(seed + k)) for k in range(config.restarts)]
    finally:
        for p in wanted:
            p.requires_grad_(True)
    return min(runs, key=lambda run: run[1])
