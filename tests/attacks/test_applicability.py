"""What each module shows, and every reason why one shows nothing, on a pretrained encoder and small decoders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmleak import load_batches, load_model, observe, select
from lmleak.attacks._applicability import Reading, read, read_all, readers

SHORT = {"limit": 1, "max_tokens": 9}
LONG = {"limit": 1, "min_tokens": 15, "max_tokens": 16}


def seen(victim, component, layer=None, data=SHORT, defense=None, **changes) -> tuple[Reading, tuple[str, ...], int]:
    """The reading of one weight, the attacks that read it, and the true number of tokens."""
    batch = load_batches(victim, "sample", **data)[0]
    layers = None if layer is None else [layer]
    chosen = select(victim, components=[component], layers=layers, parameters="weight")
    observation = replace(observe(victim, batch, chosen, defense=defense), **changes)
    one = read_all(victim, observation)[0]
    return one, readers(one, victim, observation), int(batch.inputs["attention_mask"].sum())


@pytest.fixture(scope="module")
def classifier():
    """GPT-2 as a classifier: its loss reads the last token only."""
    config = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return load_model("gpt2", weights="random", tokenizer="bytes", config=config, num_labels=2, device="cpu")


@pytest.mark.parametrize(
    ("component", "layer", "rank", "rows", "attacks"),
    [
        ("attn_query", 0, 0, "inputs", ("span", "subspace")),
        ("attn_key", 0, -1, "differences", ("span", "subspace")),
        ("attn_key", 4, -1, "differences", ("subspace",)),
        ("attn_value", 4, 0, "inputs", ("subspace",)),
        ("attn_output", 2, 0, "inputs", ("subspace",)),
        ("ffn_in", 3, 0, "inputs", ("subspace",)),
        ("ffn_out", 4, 0, "inputs", ("subspace",)),
        ("attn_value", 5, 0, "inputs", ("subspace",)),  # fewer tokens than heads: all are seen
        ("attn_key", 5, -1, "differences", ("subspace",)),
    ],
)
def test_an_encoders_module_speaks_for_every_token(minilm, component, layer, rank, rows, attacks) -> None:
    one, kinds, tokens = seen(minilm, component, layer)
    assert (one.rank, one.tokens, one.rows, one.status, one.reason) == (tokens + rank, tokens, rows, "ok", None)
    assert kinds == attacks
    assert len(one.spectrum) > one.rank


@pytest.mark.parametrize("component", ["attn_query", "attn_output", "ffn_in", "ffn_out"])
def test_a_classifiers_last_layer_has_one_row(minilm, component) -> None:
    one, kinds, _ = seen(minilm, component, 5)
    assert (one.rank, one.tokens, one.status, kinds) == (1, None, "not_applicable", ())
    assert "only the pooled position can carry loss (rank 1)" in one.reason


@pytest.mark.parametrize("component", ["attn_key", "attn_value"])
def test_its_last_key_and_value_have_one_direction_a_head(minilm, component) -> None:
    one, kinds, tokens = seen(minilm, component, 5, LONG)
    assert tokens > 12 == one.rank
    assert (one.status, kinds) == ("not_applicable", ())
    assert "at most 12 directions" in one.reason


@pytest.mark.parametrize(
    ("component", "layer", "missing", "shows"),
    [
        ("attn_qkv", 1, 1, "every token but the last"),
        ("ffn_out", 2, 1, "every token but the last"),
        ("attn_query", 1, 2, "every token but the first and the last"),
        ("attn_key", 1, 2, "every token but the last, as differences"),
    ],
)
def test_a_language_models_last_token_is_in_no_row(tiny_gpt2, component, layer, missing, shows) -> None:
    one, kinds, tokens = seen(tiny_gpt2, component, layer, {"limit": 1, "max_tokens": 30})
    assert (one.rank, one.tokens, one.shows, kinds) == (tokens - missing, tokens, shows, ("prefix",))


def test_a_causal_classifiers_packed_last_layer_has_two_directions_a_head_and_its_query(classifier) -> None:
    one, kinds, tokens = seen(classifier, "attn_qkv", 1, {"limit": 1, "max_tokens": 40})
    assert tokens > 9 == one.rank
    assert (one.status, kinds) == ("not_applicable", ())
    assert "at most 9 directions" in one.reason
    assert seen(classifier, "ffn_in", 0, {"limit": 1, "max_tokens": 40})[1] == ("prefix",)


def test_as_many_tokens_as_dimensions_leave_no_edge(tiny_bert) -> None:
    data = {"kind": "sample", "batch_size": 4, "limit": 4}
    batch = load_batches(tiny_bert, **data)[0]
    observation = observe(tiny_bert, batch, select(tiny_bert, components=["ffn_in"], layers=[1], parameters="weight"))
    one = read(tiny_bert, observation, observation.entries)
    assert (one.rank, one.status) == (0, "no_signal")
    assert "as many tokens as dimensions (32)" in one.reason


def test_noise_rounding_and_zero_are_told_apart(minilm) -> None:
    noisy, kinds, _ = seen(minilm, "ffn_in", 2, defense={"kind": "gaussian_noise", "std": 1e-4})
    assert (noisy.rank, noisy.status, kinds) == (0, "no_signal", ())
    assert "what gaussian_noise left fills it" in noisy.reason
    batch = load_batches(minilm, "sample", **SHORT)[0]
    plain = observe(minilm, batch, select(minilm, components=["ffn_in"], layers=[2], parameters="weight"))
    (name, gradient), *_ = plain.gradients.items()
    rounded = read(minilm, replace(plain, gradients={name: gradient.bfloat16()}), plain.entries)
    assert rounded.status == "no_signal"
    assert "rounding to bfloat16 fills it" in rounded.reason
    nothing = read(minilm, replace(plain, gradients={name: 0 * gradient}), plain.entries)
    assert (nothing.status, nothing.reason) == ("no_signal", "the observed gradient is zero")


def test_dropout_in_the_client_hides_the_inputs(minilm) -> None:
    one, kinds, _ = seen(minilm, "attn_query", 0, mode="train")
    assert (one.status, kinds) == ("not_applicable", ())
    assert "dropout is on" in one.reason


def test_what_is_no_linear_module_of_a_block(minilm) -> None:
    words, kinds, tokens = seen(minilm, "embedding")
    assert (words.rows, words.tokens, kinds) == ("table", tokens, ("embedding_rows",))
    head, kinds, _ = seen(minilm, "pooler")
    assert (head.status, kinds) == ("not_applicable", ())
    assert "behind the blocks" in head.reason
    batch = load_batches(minilm, "sample", **SHORT)[0]
    observation = observe(minilm, batch, select(minilm, components=["attn_query"], layers=[0], parameters="bias"))
    assert "sum of the output gradients" in read_all(minilm, observation)[0].reason


def test_a_batch_counts_the_rows_of_all_its_sentences(minilm) -> None:
    one, _, tokens = seen(minilm, "attn_key", 1, {"limit": 2, "batch_size": 2, "max_tokens": 12})
    assert (one.rank, one.tokens) == (tokens - 2, tokens)
