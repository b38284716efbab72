"""Prefixes under noise: a beam of the most likely ones, every observed module's evidence added up.

Where the gradient is exact a prefix is right or wrong; under noise it has a likelihood. Modules of one release carry
independent noise, so their costs add. Candidates are screened by the cheapest module (layer 0's attention input is
known for the whole vocabulary in closed form; elsewhere a fitted guess orders them), the best are run through all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmleak.attacks._evidence import Evidence, Rows
from lmleak.attacks._prefix_forward import Prefix, Reader
from lmleak.attacks._prefix_guess import SKETCH, Guess
from lmleak.attacks._prefix_words import Words
from lmleak.models._input import InputLayer

SHORT = 128  #: screened tokens that are run through every module
PATIENCE = 3  #: tokens in a row that make no end more likely
CHUNK = 8192  #: tokens screened at once


@dataclass(frozen=True)
class Witness:
    """A module, its evidence, and which inputs its gradient holds (see `_prefix_sites.Site.kind`)."""

    evidence: Evidence
    kind: str


@dataclass
class Path:
    """A prefix and what it explains."""

    prefix: Prefix
    rows: list[Rows]
    origins: list[Tensor | None]
    cost: float = 0.0
    margins: list[float] = field(default_factory=list)  #: per position, posterior of the token among all tested
    fits: list[bool] = field(default_factory=list)  #: per position, whether some module takes it for a true row
    left: int = 1  #: directions above the noise that no token explains yet, in the module with most of them


class Beam:
    """Grows the paths until the best one leaves nothing above the noise."""

    def __init__(
        self,
        reader: Reader,
        witnesses: list[Witness],
        words: Words,
        surprise: Tensor,
        layer: InputLayer | None,
        width: int,
        budget: int,
        generator: torch.Generator,
        progress: Callable[[tuple[int, ...]], None],
    ):
        """Args: words: unit embeddings; surprise: [v] -2 log of a prior; layer: where the first witness reads
        it, layer 0's input in closed form."""
        self.reader, self.witnesses, self.words, self.surprise = reader, witnesses, words, surprise.double()
        self.layer, self.width, self.budget, self.generator, self.progress = layer, width, budget, generator, progress
        self.latest: Guess | None = None

    def run(self) -> Path:
        """The most likely path of all lengths."""
        start = Path(Prefix(), [w.evidence.start() for w in self.witnesses], [None] * len(self.witnesses))
        beam, best, lowest, worse = [start], start, self.ended(start), 0
        most = getattr(self.reader.body.config, "max_position_embeddings", 1 << 20)
        while worse < PATIENCE and self.reader.evaluated <= self.budget and len(beam[0].prefix.tokens) < most:
            beam = self.step(beam)
            self.progress(beam[0].prefix.tokens)
            ends = [self.ended(path) for path in beam]
            worse += 1
            if min(ends) < lowest:
                lowest, worse = min(ends), 0
                best = beam[ends.index(lowest)]
            if not best.left:
                break
        return best

    def ended(self, path: Path) -> float:
        """Cost of a path that ends here: what it leaves unexplained would all be noise."""
        return path.cost + sum(
            float(rows.strength.sum()) / w.evidence.noise if path.left else 0.0
            for w, rows in zip(self.witnesses, path.rows, strict=True)
        )

    def step(self, beam: list[Path]) -> list[Path]:
        """The best continuations of all paths."""
        tokens = torch.stack(self.screen(beam))
        features = self.reader.read_all([path.prefix for path in beam], tokens)
        found = []
        for i, path in enumerate(beam):
            costs = self.costs(path, [x[i] for x in features])
            total = torch.stack(costs).sum(0) + self.surprise[tokens[i]]
            chance = torch.softmax(-total / 2, 0)
            for at in total.topk(min(self.width, len(total)), largest=False).indices.tolist():
                fit = any(
                    float(cost[at]) < w.evidence.tolerance
                    for cost, w, rows in zip(costs, self.witnesses, path.rows, strict=True)
                    if len(rows.basis)
                )
                found.append((path.cost + float(total[at]), i, at, float(chance[at]), fit))
        found.sort(key=lambda one: one[0])
        out = []
        # A path so much less likely than the best one is kept for nothing.
        worst = found[0][0] + self.witnesses[0].evidence.tolerance
        for cost, i, at, chance_, fit in [one for one in found[: self.width] if one[0] <= worst]:
            path = beam[i]
            xs = [x[i, at] for x in features]
            rows, origins = self.settle(path, xs)
            prefix = self.reader.extend(path.prefix, int(tokens[i, at]))
            left = max(w.evidence.left(r) for w, r in zip(self.witnesses, rows, strict=True))
            out.append(Path(prefix, rows, origins, cost, [*path.margins, chance_], [*path.fits, fit], left))
        return out

    def costs(self, path: Path, features: list[Tensor]) -> list[Tensor]:
        """Each witness's cost of candidates: features[m] [k, d_m] -> [k]."""
        out = []
        for w, rows, origin, x in zip(self.witnesses, path.rows, path.origins, features, strict=True):
            if not path.prefix.tokens and w.kind != "all":
                out.append(torch.zeros(len(x), dtype=torch.float64, device=x.device))
            else:
                out.append(w.evidence.cost(rows, x if origin is None else x - origin))
        return out

    def settle(self, path: Path, xs: list[Tensor]) -> tuple[list[Rows], list[Tensor | None]]:
        """The witnesses' rows and origins once inputs xs are taken for true."""
        all_rows, origins = [], []
        for w, rows, origin, x in zip(self.witnesses, path.rows, path.origins, xs, strict=True):
            if not path.prefix.tokens and w.kind != "all":
                all_rows.append(rows)
                origins.append(x if w.kind == "differences" else None)
            else:
                all_rows.append(w.evidence.settle(rows, x if origin is None else x - origin))
                origins.append(origin)
        return all_rows, origins

    def screen(self, beam: list[Path]) -> list[Tensor]:
        """For each path, [SHORT] tokens that the first witness finds most likely."""
        if self.layer is None:
            return [self.guessed(path, self.witnesses[0]) for path in beam]
        v, device = len(self.words), self.words.device
        at = torch.tensor(len(beam[0].prefix.tokens), device=device)
        costs: list[list[Tensor]] = [[] for _ in beam]
        for tokens in torch.arange(v, device=device).split(CHUNK):
            x = self.layer.rows(tokens, at)  # of single tokens: the same whatever the prefix
            for path, cost in zip(beam, costs, strict=True):
                cost.append(self.witnesses[0].evidence.screen(path.rows[0], x))
        return [(torch.cat(cost) + self.surprise).topk(min(SHORT, v), largest=False).indices for cost in costs]

    def guessed(self, path: Path, witness: Witness) -> Tensor:
        """The same by running tokens through the first witness's module: what a ridge regression on those run so far
        takes for likely, in growing batches, until nothing better comes."""
        rows, origin = path.rows[0], path.origins[0]
        v = len(self.words)
        cost = torch.full((v,), torch.inf, dtype=torch.float64, device=self.words.device)
        guess, step = None, 256
        likely = self.surprise.argsort()
        batch = torch.cat(
            [likely[:step], torch.randperm(v, generator=self.generator)[:step].to(likely.device)]
        ).unique()
        for _ in range(5):
            x = self.reader.read_all([path.prefix], batch[None])[0][0]
            x = x if origin is None else x - origin
            guess = guess or Guess(self.words, 1, x.shape[1], self.latest)
            guess.add(batch[:, None], x * witness.evidence.columns.to(x.dtype))
            cost[batch] = witness.evidence.cost(rows, x) if len(rows.basis) else -witness.evidence.gain(rows, x)
            left = cost.isinf()
            if not bool(left.any()) or not len(rows.basis):
                break
            if float(cost.min()) < witness.evidence.tolerance and step > 256:
                break

            def turned(coordinates: Tensor) -> Tensor:
                seen = coordinates.square()
                inside, length = seen[:, :-SKETCH], seen[:, -SKETCH:].sum(1)
                return witness.evidence.turn(rows, inside, (length - inside.sum(1)).clamp_min(1e-12), roughly=True)

            order = guess.project(rows.basis, rows.settled).scores(0, turned)
            step *= 2
            batch = order.masked_fill(~left, torch.inf).topk(min(step, int(left.sum())), largest=False).indices
        self.latest = guess
        return (cost + self.surprise).topk(min(SHORT, v), largest=False).indices
