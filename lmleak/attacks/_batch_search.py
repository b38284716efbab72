"""Finds the sentences of a batch one after the other where layer 0 does not say which word stands with which.

A sentence's inputs lie in the observed space whatever its neighbours are. Sentences are drawn from what is known of the
words (`_batch_words`), and the best descend by changes that may also make them longer or shorter: one word more or less
than the truth shifts all that follows, but a sentence whose only fault is one word shows shares of 0.03 beside that
word's 0.2, where a wrong sentence shows 0.9. What is found is deflated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmleak.attacks._batch_found import Found, Sentence
from lmleak.attacks._batch_places import Places
from lmleak.attacks._batch_words import Words, scan
from lmleak.attacks._energy import slope
from lmleak.attacks._text import Frame, put

KEPT = 3  #: words a token of the batch that stay in play
DRAWN = 48  #: sentences of each length at a time
STARTS = 6  #: descents at a time; draws before the first, too
NARROW = 24  #: sentences instead, where layer 0 leaves positions no more words than there are sentences
CHOICES = 12  #: words tried at each position; all where none of these helps
REPLANTED = 4  #: words, whose absence costs least, that are put elsewhere or give way to another
SHORTER, LONGER = 0.45, 1.6  #: of the mean length, in which the next sentence is sought at first


class BatchSearch:
    """Search over words that layer 0 admits, or over the vocabulary."""

    def __init__(
        self,
        found: Found,
        frame: Frame,
        vocabulary: Tensor,
        places: Places | None,
        shortlist: int,
        budget: int,
        generator: torch.Generator,
    ):
        self.found, self.energy, self.frame, self.vocabulary = found, found.energy, frame, vocabulary
        self.places, self.shortlist, self.budget, self.generator = places, shortlist, budget, generator
        self.narrow = places is not None and int(places.allowed.sum()) <= found.size * len(places.allowed)
        self.guesses: dict[int, tuple[float, Sentence]] = {}  #: best of each length that is not the truth
        # Ends of descents since the last sentence found. Draws keep away from them: five rounds in a row ended in
        # "the dodgers beat the red sox and were beaten by giants." else, one word short of the truth.
        self.ends: set[Sentence] = set()
        self.rounds = 0

    def run(self) -> None:
        """Until every sentence is found or the budget is spent."""
        found = self.found
        if self.places is not None:
            self.words = Words.admitted(self.energy, self.frame, self.places, found.ridge, self.generator)
        else:
            every = max(1, len(self.lengths()) // 4)
            kept = scan(
                self.energy,
                self.frame,
                self.vocabulary,
                self.lengths()[::every],
                KEPT * found.total,
                found.ridge,
                self.budget,
                self.generator,
            )
            longest = found.rest - (found.size - 1) * (self.frame.size + 1)
            self.words = Words(self.energy, self.frame, kept, longest, found.ridge, self.generator)
        drawn: list[tuple[float, Sentence]] = []
        width, draws = (NARROW, 2) if self.narrow else (DRAWN, STARTS)
        while found.missing and self.lengths() and self.energy.evaluations < self.budget:
            for _ in range(draws):
                drawn += self.words.sample(self.lengths(), width, [*found.sentences, *self.ends])
            if self._round(sorted(set(drawn))[:STARTS]):
                self.guesses.clear()
                self.ends.clear()
            drawn, draws = [], 2
            self.rounds += 1

    def doubtful(self) -> list[Sentence]:
        """The best of what was not found, as many as are missing."""
        return self.found.doubtful(self.guesses.values())

    def lengths(self) -> list[int]:
        """Lengths that the next sentence may have: the rank is the sum of all, and most are near their mean."""
        found, least = self.found, self.frame.size + 1
        if found.missing <= 1:
            return [found.rest] * found.missing
        mean = found.rest / found.missing
        wide = 1 + 0.25 * self.rounds
        low, high = SHORTER * mean / wide, LONGER * mean * wide + 1
        possible = range(least, found.rest - (found.missing - 1) * least + 1)
        if self.places is not None:
            return [n for n in possible if n in self.places.lengths]
        return [n for n in possible if low <= n <= high]

    def _round(self, starts: list[tuple[float, Sentence]]) -> bool:
        """Descends from the starts in turn; whether one ends at a sentence."""
        for _, start in starts:
            end = self.descend(start)
            if end in self.ends:
                continue
            self.ends.add(end)
            if self.found.accept(end):
                return True
            value = self.found.score([end])[0] / len(end)
            self.guesses[len(end)] = min(self.guesses.get(len(end), (value, end)), (value, end))
            if self.energy.evaluations >= self.budget:
                break
        return False

    def descend(self, tokens: Sentence) -> Sentence:
        """Best sentence reached by changes, the cheap kinds first, until none helps or the budget is spent.

        Where words have one place each, a wrong end is left for the next start at first. Two sentences, layers 0 and 1:
        800 to 1,130 sentences tried, 160 to 180 so and with fewer drawn; four, 3,800 and 5,600, then 760 and 1,900.
        """
        kinds = (self._reordered, self._resized, self._any, self._replanted, self._grown, self._fresh)
        while self.energy.evaluations < self.budget:
            better = self._replaced(tokens)
            if better != tokens:
                tokens = better
                continue
            if self.found.verdict(tokens) < 1 or (self.narrow and not self.rounds):
                break
            for changes in kinds:
                better = changes(tokens)
                if better != tokens:
                    break
            else:
                break
            tokens = better
        return tokens

    @property
    def _first(self) -> int:
        return len(self.frame.first)

    def _free(self, tokens: Sentence) -> range:
        return range(self._first, len(tokens) - len(self.frame.last))

    def _replaced(self, tokens: Sentence, count: int | None = CHOICES) -> Sentence:
        others = [
            put(tokens, i, word)
            for i in self._free(tokens)
            for word in self.words.choices(i - self._first, count)
            if word != tokens[i]
        ]
        return self.found.together(tokens, others)

    def _any(self, tokens: Sentence) -> Sentence:
        return self._replaced(tokens, None)

    def _reordered(self, tokens: Sentence) -> Sentence:
        others = []
        for i in self._free(tokens):
            for j in self._free(tokens):
                if i < j:
                    swapped = list(tokens)
                    swapped[i], swapped[j] = swapped[j], swapped[i]
                    others.append(tuple(swapped))
                if i != j:
                    moved = list(tokens)
                    moved.insert(j, moved.pop(i))
                    others.append(tuple(moved))
        return self.found.together(tokens, list(dict.fromkeys(others)))

    def _resized(self, tokens: Sentence, count: int | None = CHOICES) -> Sentence:
        """One word more or less, by energy a token."""
        lengths, others = self.lengths(), [tokens]
        if len(tokens) + 1 in lengths and len(tokens) < self.words.longest:
            for i in (*self._free(tokens), self._free(tokens).stop):
                more = self.words.choices(i - self._first, count)
                others += [(*tokens[:i], word, *tokens[i:]) for word in more]
        if len(tokens) - 1 in lengths:
            others += [(*tokens[:i], *tokens[i + 1 :]) for i in self._free(tokens)]
        values = [value / len(other) for value, other in zip(self.found.score(others), others, strict=True)]
        return others[min(range(len(others)), key=values.__getitem__)]

    def _grown(self, tokens: Sentence) -> Sentence:
        """`_resized` by any word in play: one that stands where it was never drawn is no likely choice there."""
        return self._resized(tokens, None)

    def _replanted(self, tokens: Sentence) -> Sentence:
        """One word taken out and one put in elsewhere: the most promising of the first, each with all of the second.

        All words between shift by one place, so that neither helps alone: "it he was expected by reporters" for "it was
        expected by the reporters" held a batch of four up for 80,000 sentences.
        """
        others = [tokens]
        shorter = [(*tokens[:i], *tokens[i + 1 :]) for i in self._free(tokens)] if len(self._free(tokens)) > 1 else []
        rated = sorted(zip(self.found.score(shorter), shorter, strict=True))
        for _, part in rated[:REPLANTED]:
            for i in (*self._free(part), self._free(part).stop):
                more = self.words.choices(i - self._first, CHOICES)
                others += [(*part[:i], word, *part[i:]) for word in more]
        return self.found.best(list(dict.fromkeys(others)))

    def _fresh(self, tokens: Sentence) -> Sentence:
        """Words out of play, by the energy's slope at each position over the whole vocabulary."""
        if self.places is not None:
            return tokens
        table, found = self.energy.table, self.found
        embeds = table[torch.tensor(tokens, device=table.device)][None]
        price = slope(self.energy, embeds, found.ridge)[0] @ table[self.vocabulary].T
        near = self.vocabulary[price.topk(min(self.shortlist, len(self.vocabulary)), largest=False).indices].tolist()
        others = [put(tokens, i, word) for i in self._free(tokens) for word in near[i]]
        better = found.together(tokens, others)
        for word in set(better) - set(tokens):
            self.words.add(word)
        return better
