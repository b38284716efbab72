"""The sentences of a batch that their inputs prove, and what is left to be found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from lmleak.attacks._batch_energy import Deflated
from lmleak.attacks._energy import of_tokens

Sentence = tuple[int, ...]


class Found:
    """What is proven of a batch; what is accepted is deflated, and energies are remembered until then."""

    def __init__(self, energy: Deflated, size: int, ridge: float, progress: Callable[[Sentence], None]):
        self.energy, self.size, self.ridge, self.progress = energy, size, ridge, progress
        # A key's rank is short by one a sentence: its space holds differences.
        self.total = energy.left + (size if all(s.centred for s in energy.sites) else 0)
        self.sentences: dict[Sentence, float] = {}  #: and their verdicts
        self.scores: dict[Sentence, float] = {}

    @property
    def missing(self) -> int:
        """Sentences still to be found; none once nothing is left to explain."""
        return self.size - len(self.sentences) if self.energy.left else 0

    @property
    def rest(self) -> int:
        """Tokens of the missing sentences."""
        return self.total - sum(map(len, self.sentences))

    def score(self, sentences: Sequence[Sentence]) -> list[float]:
        """Energies of sentences of any lengths; only those not met before are evaluated."""
        new: dict[int, list[Sentence]] = {}
        for tokens in dict.fromkeys(sentences):
            if tokens not in self.scores:
                new.setdefault(len(tokens), []).append(tokens)
        for part in new.values():
            ids = torch.tensor(part, device=self.energy.table.device)
            self.scores.update(zip(part, of_tokens(self.energy, ids, self.ridge).tolist(), strict=True))
        return [self.scores[tokens] for tokens in sentences]

    def best(self, sentences: Sequence[Sentence]) -> Sentence:
        """That of the lowest energy."""
        return min(zip(self.score(sentences), sentences, strict=True))[1]

    def together(self, current: Sentence, changed: Sequence[Sentence]) -> Sentence:
        """The best of the changes, or of those that help made together; `current` where none helps."""
        here = self.score([current])[0]
        helpful = sorted(pair for pair in zip(self.score(changed), changed, strict=True) if pair[0] < here)
        joint, together, touched = list(current), [current], set[int]()
        for _, other in helpful:
            places = {i for i, (a, b) in enumerate(zip(current, other, strict=True)) if a != b}
            if not places & touched:
                touched |= places
                for i in places:
                    joint[i] = other[i]
                together.append(tuple(joint))
        return self.best(together)

    def verdict(self, tokens: Sentence) -> float:
        """Below 1 where its inputs prove a sentence; `Deflated.verdict`."""
        return self.energy.verdict(torch.tensor(tokens, device=self.energy.table.device))

    def accept(self, tokens: Sentence) -> bool:
        """Takes a sentence that its inputs prove."""
        verdict = math.inf if tokens in self.sentences else self.verdict(tokens)
        if verdict >= 1:
            return False
        self.sentences[tokens] = verdict
        self.energy.deflate(torch.tensor(tokens, device=self.energy.table.device))
        self.scores.clear()
        self.progress(tokens)
        return True

    def doubtful(self, guesses: Iterable[tuple[float, Sentence]]) -> list[Sentence]:
        """The best of rated guesses that are not found, as many as are missing."""
        ranked: dict[Sentence, float] = {}
        for value, tokens in guesses:
            ranked[tokens] = min(value, ranked.get(tokens, math.inf))
        return [t for t in sorted(ranked, key=ranked.__getitem__) if t not in self.sentences][: self.missing]
