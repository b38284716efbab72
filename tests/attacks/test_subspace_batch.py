"""subspace on batches: layer 0 places every word, a module behind it confirms; nothing is found by chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import load_batches, observe, select
from lmleak.attacks._batch_energy import Deflated, batch_site, batch_space
from lmleak.attacks._batch_fill import Fill, Outline
from lmleak.attacks._batch_found import Found
from lmleak.attacks._batch_pairs import Basis, clusters, counts, pairs
from lmleak.attacks._batch_places import admitted
from lmleak.attacks._batch_search import BatchSearch
from lmleak.attacks._batch_words import Words, scan
from lmleak.attacks._rowspace import matrix
from lmleak.attacks._subspace_batch import batch
from lmleak.attacks._subspace_relax import Schedule
from lmleak.attacks._text import special_frame
from lmleak.attacks.subspace import COMPONENTS, Config
from lmleak.records import Knowledge

SCHEDULE = Schedule(30, 4, 0.5, 0.1, 0.01)
READERS = ("attn_query", "attn_key", "attn_value")


@pytest.fixture(scope="module")
def four(minilm):
    batch = load_batches(minilm, "sample", max_tokens=14, batch_size=4, limit=4)[0]
    return observe(minilm, batch, select(minilm, components="layer", layers=[0], parameters="weight")), batch


@pytest.fixture(scope="module")
def read(minilm, four):
    seen, _ = four
    readers = [e for e in seen.entries if e.component in READERS]
    space = batch_space([matrix(minilm.module, e, seen.gradients[e.name]) for e in readers])
    frame = special_frame(minilm, Knowledge())
    places = admitted(minilm, readers, space, frame, torch.Generator().manual_seed(0))
    words = torch.cat([torch.tensor([*frame.first, *frame.last]), places.words])
    return Basis(minilm, readers, words, 1 + len(places.allowed))


def tokens_of(batch):
    """(token, position, sentence) of every token but the frame's."""
    mask = batch.inputs["attention_mask"].sum(1).tolist()
    rows = batch.inputs["input_ids"].tolist()
    return [(rows[k][p], p, k) for k, n in enumerate(mask) for p in range(1, n - 1)]


def run(victim, seen, **fields):
    entries = tuple(e for e in seen.entries if e.component in COMPONENTS)
    draw = torch.Generator().manual_seed(0)
    return batch(Config(**fields), seen, Knowledge(), victim, entries, draw, lambda text: None)


def test_words_positions_and_bias_explain_layer_0_to_rounding(read, four):
    assert read.misfit(four[0].gradients) < 1e-5
    fewer = Basis(read.victim, read.readers, read.tokens[:-1], read.places)
    assert fewer.misfit(four[0].gradients) > 1e-3


def test_words_that_occur_once_are_placed_and_grouped_by_sentence(minilm, read, four):
    seen, batch = four
    found = pairs(read.solve(seen.gradients), len(read.tokens), 0.9, 0.2)
    tokens = read.tokens.tolist()
    all_tokens = tokens_of(batch)
    single = {t: (p, k) for t, p, k in all_tokens if sum(t == other for other, _, _ in all_tokens) == 1}
    once = [i for i in found.once if tokens[i] in single]
    assert len(once) >= 0.8 * len(single)
    assert all(found.once[i] == single[tokens[i]][0] for i in once)
    values = found.sums[:, read.value]
    groups = clusters(values[once], [found.once[i] for i in once], 4, 12)
    assert sorted(i for group in groups for i in group) == list(range(len(once)))
    assert all(len({single[tokens[once[i]]][1] for i in group}) == 1 for group in groups)
    own = [[once[i] for i in group] for group in groups]
    often = counts(values, own, 12)
    assert all(often[i].argmax() == k for k, group in enumerate(own) for i in group)


def test_two_tokens_of_one_position_never_join():
    values = torch.ones(3, 4, dtype=torch.float64)
    groups = clusters(values, [1, 1, 2], 1, 2)
    assert sorted(map(len, groups)) == [1, 2]


def test_reads_four_sentences_off_layer_0_alone(minilm, four):
    seen, batch = four
    result = run(minilm, seen)
    assert result.status == "ok", result.reason
    assert result.details["by"] == "guided"
    assert sorted(result.tokens) == sorted(batch.reference.tokens)
    assert min(result.confidence) > 0.9


def test_a_shuffled_gradient_is_no_answer(minilm, four):
    seen, _ = four
    draw = torch.Generator().manual_seed(0)
    wrong = {k: g[:, torch.randperm(g.shape[1], generator=draw)] for k, g in seen.gradients.items() if g.dim() == 2}
    entries = tuple(e for e in seen.entries if e.name in wrong)
    result = run(minilm, replace(seen, gradients=wrong, entries=entries), budget=200)
    assert result.status != "ok"
    assert max(result.confidence, default=0.0) < 0.5


def test_an_exhausted_budget_keeps_its_guesses_doubtful(minilm, four):
    result = run(minilm, four[0], budget=1)
    assert result.status == "budget_exhausted"
    assert result.texts
    assert all(c < 0.5 or t in four[1].reference.tokens for t, c in zip(result.tokens, result.confidence, strict=True))


def test_layer_0_s_readers_alone_are_refused(minilm, four):
    seen, _ = four
    entries = tuple(e for e in seen.entries if e.component in READERS)
    result = run(minilm, replace(seen, entries=entries))
    assert result.status == "not_applicable"
    assert "module" in result.reason


@pytest.fixture(scope="module")
def deep(minilm):
    batch = load_batches(minilm, "sample", max_tokens=8, batch_size=2, limit=2)[0]
    return observe(minilm, batch, select(minilm, components="attn_query", layers=1, parameters="weight")), batch


def test_one_deep_matrix_of_a_batch_is_enough(minilm, deep):
    result = run(minilm, deep[0])
    assert result.status == "ok", result.reason
    assert result.details["by"] == "open"
    assert sorted(result.tokens) == sorted(deep[1].reference.tokens)
    assert min(result.confidence) > 0.9


def test_a_deep_matrix_of_a_batch_with_no_budget_is_a_guess(minilm, deep):
    result = run(minilm, deep[0], budget=1)
    assert result.status == "budget_exhausted"
    assert max(result.confidence, default=0.0) < 0.5


def test_words_and_a_module_behind_them_are_enough_without_the_value(minilm, four):
    seen, batch = four
    entries = tuple(e for e in seen.entries if e.component in ("attn_query", "ffn_in"))
    result = run(minilm, replace(seen, entries=entries))
    assert result.status == "ok", result.reason
    assert result.details["by"] == "blind"
    assert sorted(result.tokens) == sorted(batch.reference.tokens)


@pytest.fixture
def found(minilm, deep):
    with Deflated(minilm, [batch_site(minilm, deep[0], deep[0].entries[0])]).attached() as energy:
        yield Found(energy, 2, 1e-4, lambda tokens: None)


def sentences_of(batch):
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    return [tuple(row[:n]) for row, n in zip(batch.inputs["input_ids"].tolist(), lengths, strict=True)]


def test_what_is_found_leaves_the_length_of_the_last(minilm, deep, found):
    first, second = sentences_of(deep[1])
    frame = special_frame(minilm, Knowledge())
    search = BatchSearch(found, frame, torch.arange(1000, 2000), None, 8, 100, torch.Generator().manual_seed(0))
    assert {len(first), len(second)} <= set(search.lengths())
    assert found.rest == len(first) + len(second)
    assert found.accept(first)
    assert search.lengths() == [len(second)]
    assert not found.accept(first)
    assert found.doubtful([(0.5, first), (0.2, second), (0.3, second[:-1])]) == [second]


def test_one_word_of_a_sentence_exchanged_is_no_proof(deep, found):
    for tokens in sentences_of(deep[1]):
        assert found.energy.verdict(torch.tensor(tokens)) < 0.1
        other = (*tokens[:2], 2003, *tokens[3:])
        assert found.energy.verdict(torch.tensor(other)) > 10


def test_changes_that_help_are_made_together(deep, found):
    truth = sentences_of(deep[1])[0]
    wrong = (truth[0], 2003, 2023, *truth[3:])
    singly = [(*wrong[:i], truth[i], *wrong[i + 1 :]) for i in (1, 2)]
    assert found.together(wrong, singly) == truth
    assert found.together(truth, [wrong]) == truth
    assert found.score([wrong, truth]) == found.score([wrong]) + found.score([truth])


def test_a_word_that_stands_elsewhere_in_another_word_s_stead_is_put_right(minilm, deep, found):
    truth = sentences_of(deep[1])[0]
    frame, draw = special_frame(minilm, Knowledge()), torch.Generator().manual_seed(0)
    search = BatchSearch(found, frame, torch.arange(1000, 3000), None, 8, 10_000, draw)
    true = sorted({t for tokens in sentences_of(deep[1]) for t in tokens[1:-1]})
    search.words = Words(found.energy, frame, torch.tensor(true), len(truth), 1e-4, draw)
    wrong = (truth[0], 2003, *truth[1:3], *truth[4:])  # a word too many before, one missing behind
    assert len(wrong) == len(truth)
    assert search._replanted(wrong) == truth
    assert search._replanted(truth) == truth


def test_the_scan_keeps_every_true_word_of_a_thousand(minilm, deep, found):
    true = {t for tokens in sentences_of(deep[1]) for t in tokens[1:-1]}
    words = torch.tensor(sorted(true | set(range(2000, 3000))))
    frame, draw = special_frame(minilm, Knowledge()), torch.Generator().manual_seed(0)
    kept = scan(found.energy, frame, words, [6, 8], 32, 1e-4, 10_000, draw)
    assert len(kept) == len(set(kept.tolist())) == 32
    assert true <= set(kept.tolist())


def test_pairs_drawn_put_the_true_words_first(minilm, deep, found):
    sentences = sentences_of(deep[1])
    true = sorted({t for tokens in sentences for t in tokens[1:-1]})
    frame, draw = special_frame(minilm, Knowledge()), torch.Generator().manual_seed(0)
    words = Words(found.energy, frame, torch.tensor([*true, *range(2500, 2530)]), max(map(len, sentences)), 1e-4, draw)
    for _ in range(4):
        drawn = words.sample([len(tokens) for tokens in sentences], 64, [])
    assert len(drawn) == 128
    assert {tokens[1] for tokens in sentences} <= set(words.choices(0, 8))
    words.add(2999)
    words.add(2999)
    assert words.choices(0)[-1] == 2999
    assert len(words.choices(0)) == len(true) + 31


def test_fill_replaces_the_wrong_choices(minilm, deep, found):
    truth = sentences_of(deep[1])[0]
    fill = Fill(found, special_frame(minilm, Knowledge()), SCHEDULE, torch.Generator().manual_seed(0))
    choices = [(t,) for t in truth[1:-1]]
    choices[0], choices[1] = (2003, 2023, truth[1]), (2003, 2023, truth[2])
    outline = Outline(tuple(choices), tuple((1.0,) * len(c) for c in choices), frozenset())
    assert fill.descend(fill.first(outline), outline, 8, 1000) == truth
