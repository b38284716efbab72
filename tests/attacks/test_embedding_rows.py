"""`embedding_rows`: words always, their order where positions are observed too, and no guess from tied tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lmleak import attack, load_batches, observe, select
from lmleak.records import Batch, Reference

WORDS, PLACES = "bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"


def batch_of(victim, *rows) -> Batch:
    ids = torch.tensor(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand(ids.shape).clone(),
    }
    special = set(victim.processor.all_special_ids)
    plain = tuple(tuple(t for t in row if t not in special) for row in rows)
    return Batch(inputs, torch.zeros(len(rows), dtype=torch.long), Reference(tokens=plain))


def run(victim, batch, modules, defense=None):
    return attack(observe(victim, batch, select(victim, target_modules=modules), defense), victim, "embedding_rows")


def test_both_tables_give_the_order(tiny_bert):
    for batch in load_batches(tiny_bert, limit=3):
        found = run(tiny_bert, batch, [WORDS, PLACES])
        assert found.status == "ok"
        assert found.tokens == batch.reference.tokens


def test_a_repeated_word_stands_at_all_its_places(tiny_bert):
    batch = batch_of(tiny_bert, [101, 2000, 3000, 2000, 4000, 2000, 102])
    assert run(tiny_bert, batch, [WORDS, PLACES]).tokens == ((2000, 3000, 2000, 4000, 2000),)


def test_the_word_table_alone_gives_the_words_and_says_that_the_order_is_unknown(tiny_bert):
    batch = batch_of(tiny_bert, [101, 2000, 3000, 2000, 4000, 102])
    found = run(tiny_bert, batch, [WORDS])
    assert sorted(found.tokens[0]) == [2000, 3000, 4000]
    assert "unknown" in found.details["order"]
    assert found.confidence[0] <= 0.5


def test_a_batch_is_one_bag(tiny_bert):
    batch = batch_of(tiny_bert, [101, 2000, 3000, 102], [101, 4000, 5000, 102])
    found = run(tiny_bert, batch, [WORDS, PLACES])
    assert [sorted(row) for row in found.tokens] == [[2000, 3000, 4000, 5000]] * 2
    assert "unknown" in found.details["order"]


def test_noise_is_no_signal(tiny_bert):
    batch = load_batches(tiny_bert, limit=1)[0]
    found = run(tiny_bert, batch, [WORDS, PLACES], {"kind": "gaussian_noise", "std": 1.0})
    assert (found.status, found.tokens) == ("no_signal", ())


@pytest.mark.parametrize("length", [8, 20, 40])
def test_a_tied_table_gives_the_words_or_no_answer(tiny_gpt2, length):
    # The output layer's part of a tied table's gradient reaches every word of the vocabulary.
    batch = load_batches(tiny_gpt2, limit=1, max_length=length)[0]
    found = run(tiny_gpt2, batch, ["wte"])
    if found.status == "ok":
        assert set(found.tokens[0]) == set(batch.reference.tokens[0])
    else:
        assert (found.status, found.tokens) == ("no_signal", ())
        assert "tied" in found.reason


def test_the_table_is_needed(tiny_bert):
    found = run(tiny_bert, load_batches(tiny_bert, limit=1)[0], [PLACES])
    assert (found.status, found.reason) == ("not_applicable", "needs the gradient of the token embedding")


def test_a_zero_gradient(tiny_bert):
    seen = observe(tiny_bert, load_batches(tiny_bert, limit=1)[0], select(tiny_bert, target_modules=[WORDS]))
    zero = {name: torch.zeros_like(tensor) for name, tensor in seen.gradients.items()}
    assert attack(dataclasses.replace(seen, gradients=zero), tiny_bert, "embedding_rows").status == "no_signal"
