"""The discrete search of subspace, on a landscape whose minimum is known."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.attacks._discrete import ASKED, BLANKS, MORE, SURPLUS, Search
from lmleak.attacks._energy import Tally, of_tokens, slope

WORDS = 700


class Landscape:
    """Distances of words from the true ones, no more than 1 each: a shifted word says nothing of where to."""

    def __init__(self, truth: tuple[int, ...]):
        draw = torch.Generator().manual_seed(0)
        self.table = torch.nn.functional.normalize(torch.randn(WORDS, 32, generator=draw), dim=-1)
        self.goal, self.tally = self.table[list(truth)], Tally()

    def __call__(self, embeds, ridge):
        self.tally.sentences += len(embeds)
        far = (embeds - self.goal).square().sum(-1)
        part = 1 - torch.exp(-far)
        return part.sum(-1), part


TRUTH = (0, 11, 600, 13, 14, 15, 16, 17, 1)


@pytest.fixture
def search():
    return Search(Landscape(TRUTH), torch.arange(2, WORDS), 1, len(TRUTH) - 1, 0.0, 8)


def test_a_slope_is_the_derivative_and_counts_as_two(search):
    energy = search.energy
    embeds = energy.table[torch.tensor([TRUTH[::-1]])].repeat(3, 1, 1)
    steep = slope(energy, embeds, 0.0)
    assert energy.tally.sentences == 9
    step = 1e-3 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rise = energy(embeds + step, 0.0)[0] - energy(embeds - step, 0.0)[0]
    torch.testing.assert_close(rise / 2, (steep * step).sum((1, 2)), rtol=1e-2, atol=1e-5)


def test_a_word_beyond_the_shortlist_is_found_where_the_residual_is_largest(search):
    wrong = (*TRUTH[:2], 300, *TRUTH[3:])
    assert search.score([wrong])[0] > 0.5
    at, better = wrong, search.widen(wrong)
    while better != at:  # common words that are a little less wrong come first
        assert search.score([better]) < search.score([at])
        at, better = better, search.widen(better)
    assert at == TRUTH
    assert wrong in search.wide


@given(place=st.sampled_from([1, 4, 7]), word=st.integers(2, WORDS - 1), own=st.integers(2, WORDS - 1))
@settings(max_examples=20, deadline=None)
def test_a_word_is_found_whatever_the_slope_at_the_wrong_one_says(place, word, own):
    truth = (*TRUTH[:place], own, *TRUTH[place + 1 :])
    search = Search(Landscape(truth), torch.arange(2, WORDS), 1, len(TRUTH) - 1, 0.0, 8)
    wrong = (*truth[:place], word, *truth[place + 1 :])
    search.score([wrong])
    search._slope = lambda sentence: torch.zeros(len(truth), 32)
    assert search.widen(wrong) == truth


@given(order=st.permutations(range(1, len(TRUTH) - 1)))
@settings(max_examples=30, deadline=None)
def test_right_words_in_any_order_are_dealt_out_at_once(order):
    search = Search(Landscape(TRUTH), torch.arange(2, WORDS), 1, len(TRUTH) - 1, 0.0, 8)
    mixed = (TRUTH[0], *(TRUTH[i] for i in order), TRUTH[-1])
    before = search.energy.tally.sentences
    assert search._dealt(mixed, torch.zeros(0), torch.zeros(0)) == [TRUTH]
    assert search.energy.tally.sentences == before + 1 + len(order) ** 2


def test_a_doubled_word_gives_way_to_the_missing_last_one(search):
    doubled = (*TRUTH[:4], *TRUTH[3:-2], TRUTH[-1])
    assert len(doubled) == len(TRUTH)
    at = doubled
    for _ in range(3):
        search.score([at])
        at = search.descend(search.widen(at), torch.tensor([[5]] * (len(TRUTH) - 2)), 10**6)
    assert at == TRUTH


@given(order=st.permutations(range(1, len(TRUTH) - 1)), size=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_neighbouring_runs_exchanged_are_all_turns_of_all_windows(order, size):
    search = Search(Landscape(TRUTH), torch.arange(2, WORDS), 1, len(TRUTH) - 1, 0.0, 8)
    mixed = (TRUTH[0], *(TRUTH[i] for i in order), TRUTH[-1])
    turns = [mixed]
    for start in range(1, len(TRUTH) - 1):
        for stop in range(start + 2, len(TRUTH)):
            window = deque(mixed[start:stop])
            for turn in range(1, len(window)):
                window.rotate(1)
                if min(turn, len(window) - turn) == size:
                    turns.append((*mixed[:start], *window, *mixed[stop:]))
    least = min(Search(Landscape(TRUTH), search.words, 1, len(TRUTH) - 1, 0.0, 8).score(turns))
    search.score([mixed])
    found = search._exchanged(mixed, range(size, size + 1))
    assert search.scores[found] <= least
    assert set(turns) <= set(search.scores)
    assert found == mixed or search.scores[found] < search.scores[mixed]


def test_a_run_in_a_wrong_place_goes_back_when_widened(search):
    wrong = (*TRUTH[:1], *TRUTH[3:7], *TRUTH[1:3], *TRUTH[7:])
    assert sorted(wrong) == sorted(TRUTH)
    search.score([wrong])
    at = search.widen(wrong)
    while at not in search.wide:
        at = search.widen(at)
    assert at == TRUTH


def test_widening_the_minimum_changes_nothing_and_few_are_scored(search):
    search.score([TRUTH])
    assert search.widen(TRUTH) == TRUTH
    free = len(TRUTH) - 2
    turns = free**3
    blanks = (SURPLUS + 1) * free + free + free**2
    assert search.energy.tally.sentences < turns + blanks + (12 + ASKED) * (BLANKS + MORE)


def test_scores_are_the_energies(search):
    rows = [TRUTH, TRUTH[::-1], TRUTH]
    assert search.score(rows) == of_tokens(search.energy, torch.tensor(rows), 0.0).tolist()
    assert search.scores[TRUTH] == pytest.approx(0.0, abs=1e-6)
