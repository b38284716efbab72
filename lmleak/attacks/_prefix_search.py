"""Prefix extension with the span test: a tree of token prefixes whose features all lie in one observed row space.

Every distinct feature adds one to the rank, so the rank says when the tree is complete: no end of sentence has to be
proven by testing all continuations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor

from lmleak.attacks._prefix_forward import Prefix, Reader
from lmleak.attacks._prefix_guess import Guess, best_pairs, outside
from lmleak.attacks._prefix_meet import Meeting, draw, matched
from lmleak.attacks._prefix_words import Words
from lmleak.attacks._rowspace import RowSpace

FIRST = 512  #: candidates run before the first fit, half in the prior's order and half drawn from the vocabulary
WIDTH = 2048  #: tokens a slot that a pair is made of, at first


@dataclass
class Node:
    """A prefix, and how far its continuations have been looked through."""

    prefix: Prefix
    origin: Tensor | None = None  #: [d] input at the first token, where the space holds differences
    misfit: float | None = None  #: residual of its feature; None where the space cannot show it
    #: where it was found, whose nearest wrong token it stands out from; weak, or gigabytes wait for the cycle collector
    rival: ref[Node] | None = None
    row: Tensor | None = None  #: [d] float64, its feature
    children: list[Node] = field(default_factory=list)
    tried: Tensor | None = None  #: [v] bool
    spent: int = 0
    nearest: float = float("inf")  #: smallest residual of a rejected continuation
    guess: Guess | None = None

    @property
    def leaf(self) -> bool:
        return not self.children


class Exhausted(Exception):
    """`max_candidates` tokens were run."""


class Search:
    """Finds the tree. `kind` says what the space holds: `all` inputs, all `but_first`, `differences` to the first."""

    def __init__(
        self,
        reader: Reader,
        space: RowSpace,
        kind: str,
        words: Words,
        order: Tensor,
        batch_size: int,
        budget: int,
        generator: torch.Generator,
        pools: Callable[[int], Tensor | None],
        first: int | None,
        progress: Callable[[tuple[int, ...]], None],
        separate: bool = False,
    ):
        """Args: words: unit embeddings; order: [v] tokens, likely ones first; pools: position -> allowed
        tokens; first: what every sentence begins with, where that is known; separate: the module reads single tokens
        (layer 0), whatever stands before them."""
        self.reader, self.space, self.kind, self.words, self.order = reader, space, kind, words, order
        self.batch_size, self.budget, self.generator, self.pools = batch_size, budget, generator, pools
        self.progress, self.separate = progress, separate
        self.meeting: Meeting | None = None
        self.root = Node(Prefix())
        self.first = first
        self.found = 0
        self.rows: list[Tensor] = []
        self.latest: Guess | None = None  #: of the prefix looked at last
        eps = torch.finfo(next(reader.body.parameters()).dtype).eps
        # The gradient's own rounding turns a true row out of the space by up to the spectrum's fall (measured: 0.04 to
        # 0.2 of it); the attacker's forward adds its own.
        self.floor, self.rounding = 2 / max(space.gap, 1.0), eps * space.basis.shape[1] ** 0.5

    def run(self) -> None:
        """Widens the search round by round until the rank is explained or the vocabulary is through."""
        v = len(self.words)
        allowance = 4 * FIRST
        while self.found < self.space.rank:
            queue = [self.root]
            while queue and self.found < self.space.rank:
                node = queue.pop(0)
                room = self.batch_size - len(self.leaves()) + node.leaf
                if room > 0:
                    # Beginnings, then one continuation each. Pairs are dear: one, and see first where it leads.
                    several = allowance > 4 * FIRST or (node is self.root and (self.kind == "all" or self.separate))
                    self.expand(node, allowance, room if several else 1)
                queue.extend(node.children)
            if allowance >= 4 * max(v, 4 * FIRST):
                return
            allowance *= 4

    def leaves(self) -> list[Node]:
        """Ends of the tree, in the order of their discovery."""
        out, queue = [], [self.root]
        while queue:
            node = queue.pop(0)
            queue.extend(node.children)
            if node.leaf:
                out.append(node)
        return out

    def expand(self, node: Node, allowance: int, want: int) -> None:
        """Looks for up to `want` further continuations of `node` among its `allowance` most likely ones."""
        if node is self.root and self.first is not None and self.kind != "all":
            x = self.reader.read([node.prefix], torch.tensor([[self.first]], device=self.words.device))[0, 0]
            if not node.children:
                self.grow(node, self.first, None, None, x if self.kind == "differences" else None)
            return
        if node is self.root and self.kind != "all":
            self.expand_pairs(want)
            return
        pool = self.pools(len(node.prefix.tokens))
        if node.tried is None:
            node.tried = torch.zeros(len(self.words), dtype=torch.bool, device=self.words.device)
            if pool is not None:
                node.tried[:] = True
                node.tried[pool] = False
        step = FIRST // 2
        goal = len(node.children) + want
        while len(node.children) < goal and self.found < self.space.rank and node.spent < allowance:
            left = (~node.tried).nonzero().flatten()
            if not len(left):
                node.guess = None
                return
            if pool is not None or len(left) <= FIRST:
                batch = left
            elif node.guess is None or node.guess.weight < FIRST:
                batch = self.sample(left, step)
            else:
                scores = node.guess.project(*self.rest()).scores(0, outside).masked_fill(node.tried, torch.inf)
                best = scores.topk(min(step - step // 4, len(left)), largest=False).indices
                # Frequent tokens are the ones a trained model treats least linearly.
                likely = self.order[~node.tried[self.order]][: step // 4]
                batch = torch.cat([best, likely]).unique()
                step = min(2 * step, 8192)
            for part in batch.split(FIRST):
                self.test(node, part)

    def rest(self) -> tuple[Tensor, Tensor | None]:
        """What rows found before leave of the space [r - n, d], and their frame [n, d]. What a prefix's continuations
        share is mostly in there: an attention output at position p is p parts of it to one of the token's own."""
        if not self.rows:
            return self.space.basis, None
        frame = torch.linalg.qr(torch.stack(self.rows).T).Q.T
        left = self.space.basis - (self.space.basis @ frame.T) @ frame
        return torch.linalg.svd(left, full_matrices=False).Vh[: max(1, self.space.rank - len(frame))], frame

    def sample(self, left: Tensor, count: int) -> Tensor:
        """Tokens to learn from: the prior's most likely ones and as many drawn from the whole vocabulary."""
        likely = self.order[torch.isin(self.order, left)][: count // 2]
        rest = left[~torch.isin(left, likely)]
        drawn = rest[torch.randperm(len(rest), generator=self.generator)[: count // 2].to(left.device)]
        return torch.cat([likely, drawn])

    def test(self, node: Node, tokens: Tensor) -> None:
        """Runs continuations of one node and keeps those whose feature lies in the space."""
        x = self.reader.read([node.prefix], tokens[None])[0]
        assert node.tried is not None  # `expand`, which alone calls this, made it
        node.tried[tokens] = True
        node.spent += len(tokens)
        if node.guess is None and len(tokens) >= FIRST // 2:
            node.guess = self.latest = Guess(self.words, 1, x.shape[1], self.latest)
        feature = x if node.origin is None else x - node.origin
        if node.guess is not None:
            node.guess.add(tokens[:, None], feature)
        residual = self.residual(feature)
        for at in self.hits(residual):
            if not self.known(feature[at], self.accept(residual)):
                self.grow(node, int(tokens[at]), float(residual[at]), feature[at])
        rejected = residual[residual > self.accept(residual)]
        if len(rejected):
            node.nearest = min(node.nearest, float(rejected.min()))
        if self.reader.evaluated > self.budget:
            raise Exhausted

    def residual(self, feature: Tensor) -> Tensor:
        """Share outside the space; a zero feature (LLaMA's padding token has a zero embedding) lies in every space."""
        length = feature.norm(dim=-1)
        return self.space.residual(feature).masked_fill(length <= 1e-6 * length.max(), 1.0)

    def accept(self, residual: Tensor) -> float:
        """Largest residual of a true row: the spectrum's floor, or half way (in logarithms) from the forward's rounding
        to the typical wrong token."""
        wrong = float(residual.median()) if len(residual) > 8 else 0.5
        return max(self.floor, (self.rounding * max(wrong, self.rounding)) ** 0.5)

    def hits(self, residual: Tensor) -> list[int]:
        """Accepted candidates, best first."""
        good = (residual <= self.accept(residual)).nonzero().flatten().tolist()
        return sorted(good, key=lambda at: float(residual[at]))

    def known(self, row: Tensor, limit: float) -> bool:
        """Whether rows found before explain this one: it then adds nothing to the rank. A rotary model reads `a` and
        `a a` alike (equal values, whatever the attention), and one sentence's rows may serve another's wrong prefix."""
        if not self.rows:
            return False
        q = torch.linalg.qr(torch.stack(self.rows).T).Q
        row = row.double()
        return bool((row - q @ (q.T @ row)).norm() <= limit * row.norm())

    def grow(
        self,
        node: Node,
        token: int,
        misfit: float | None,
        row: Tensor | None,
        origin: Tensor | None = None,
        rival: Node | None = None,
    ) -> Node:
        """Adds a continuation to the tree."""
        origin = node.origin if origin is None else origin
        row = None if row is None else row.double()
        child = Node(self.reader.extend(node.prefix, token), origin, misfit, ref(rival or node), row)
        node.children.append(child)
        if row is not None:
            self.rows.append(row)
            self.found += 1
        self.progress(child.prefix.tokens)
        return child

    def margin(self, node: Node) -> float:
        """1 - residual / the nearest wrong token's: how clearly it stands out, 0..1."""
        rival = node.rival() if node.rival else None
        nearest = min(rival.nearest, 1.0) if rival else 1.0
        return max(0.0, 1 - (node.misfit or 0.0) / nearest)

    def expand_pairs(self, want: int) -> None:
        """The first two tokens at once, where the space does not hold the first one's input by itself."""
        root = self.root
        v, device = len(self.words), self.words.device
        goal = len(self.leaves()) - root.leaf + want
        if self.separate:
            self.test_pairs(matched(self.reader, self.space, v, max(64, 4 * self.batch_size), self.generator))
            return
        seen: set[tuple[int, int]] = set()
        step = 4 * FIRST
        missing = lambda: len(self.leaves()) - root.leaf < goal and self.found < self.space.rank  # noqa: E731
        # A model near its random start is linear enough for this; a trained one is met in the middle below.
        while missing() and root.spent < 8 * FIRST:
            if root.guess is None:
                pairs = torch.stack([draw(self.order, step, self.generator) for _ in range(2)], 1)
            else:
                width = min(v, WIDTH * max(1, root.spent // (8 * FIRST)))
                pairs = best_pairs(root.guess.project(self.space.basis), width, 2 * step + len(seen))
                fresh = [pair for pair in pairs.tolist() if tuple(pair) not in seen][: step // 4]
                if not fresh:
                    break
                pairs = torch.tensor(fresh, device=device)
            seen.update(map(tuple, pairs.tolist()))
            for part in pairs.split(FIRST):
                self.test_pairs(part)
        if missing() and self.meeting is None:
            self.meeting = Meeting(self.reader, self.space, self.kind, self.order, self.generator)
        while missing() and self.meeting is not None and self.meeting.next(self.pair_residuals):
            if self.reader.evaluated > self.budget:
                raise Exhausted

    def pair_residuals(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Tests pairs [k, 2]; features [k, d] and residuals [k]."""
        out = [self.test_pairs(part) for part in pairs.split(FIRST)]
        return torch.cat([x for x, _ in out]), torch.cat([r for _, r in out])

    def test_pairs(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Runs pairs [k, 2] and keeps those whose feature lies in the space; features and residuals."""
        root = self.root
        x = self.reader.pairs(pairs)
        feature = x[:, 1] - x[:, 0] if self.kind == "differences" else x[:, 1]
        if root.guess is None:
            root.guess = Guess(self.words, 2, x.shape[2])
        root.guess.add(pairs, feature)
        root.spent += len(pairs)
        residual = self.residual(feature)
        for at in self.hits(residual):
            if self.known(feature[at], self.accept(residual)):
                continue
            first, second = pairs[at].tolist()
            parent = next((c for c in root.children if c.prefix.tokens == (first,)), None)
            if parent is None:
                parent = self.grow(root, first, None, None, x[at, 0] if self.kind == "differences" else None)
            if not any(c.prefix.tokens[1] == second for c in parent.children):
                self.grow(parent, second, float(residual[at]), feature[at], rival=root)
        rejected = residual[residual > self.accept(residual)]
        if len(rejected):
            root.nearest = min(root.nearest, float(rejected.min()))
        if self.reader.evaluated > self.budget:
            raise Exhausted
        return feature, residual
