"""`span` reads layer 0 exactly, its fast screen equals the slow twin, and it says so where it cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak import attack, load_batches, load_model, observe, select
from lmleak.attacks.span import screen
from lmleak.metrics import score
from lmleak.models._input import InputLayer
from lmleak.records import Knowledge

READERS = ["attn_query", "attn_key", "attn_value"]


def seen(victim, batch, components="attn_query", layers=0, defense=None):
    return observe(victim, batch, select(victim, components=components, layers=layers), defense)


def exact(victim, batch, components) -> bool:
    found = attack(seen(victim, batch, components), victim, "span")
    assert found.status == "ok", found.reason
    return score(found, batch.reference, metrics=("exact_match",))["exact_match"] == 1.0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    v=st.integers(1, 20),
    p=st.integers(0, 6),
    d=st.integers(2, 12),
    norm=st.sampled_from(["layer", "layer without bias", "rms"]),
    anchored=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-3]),
)
def test_the_screen_equals_forming_every_input(v, p, d, norm, anchored, eps):
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + d))  # noqa: E731
    layer = InputLayer(draw(v, d), draw(p, d) if p else None, norm.split()[0], draw(d), None, eps)
    if norm == "layer":
        layer = dataclasses.replace(layer, bias=draw(d).flip(0))
    outside, origin = draw(3, d), draw(d) if anchored else torch.zeros(d)
    tokens, positions = torch.arange(v).flip(0), torch.arange(max(p, 1))
    fast = screen(layer, tokens, positions, outside, outside @ origin)
    rows = layer.rows(tokens[None], positions[:, None], dtype=torch.float64).expand(len(positions), v, d)
    slow = ((rows - origin.double()) @ outside.double().T).square().sum(-1)
    assert fast.shape == slow.shape
    assert float((fast.double() - slow).abs().max()) <= 1e-4 * float(slow.max())


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2"])
def test_the_closed_form_is_what_layer_0_reads(name, request):
    victim = request.getfixturevalue(name)
    batch = load_batches(victim, limit=1)[0]
    module = victim.module.get_submodule(seen(victim, batch).entries[0].module)
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    try:
        victim.module(**batch.inputs)
    finally:
        handle.remove()
    ids = batch.inputs["input_ids"][0]
    rows = victim.family.input_layer(victim.module).rows(ids, torch.arange(len(ids)))
    torch.testing.assert_close(rows, inputs[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", READERS)
def test_one_module_of_a_pretrained_model_gives_the_sentence(minilm, component):
    batches = load_batches(minilm, limit=4)
    assert [exact(minilm, batch, component) for batch in batches] == [True] * 4


def test_twenty_cola_sentences(minilm, shared):
    path = shared / "data/text/cola/in_domain_dev.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    texts = [line.split("\t")[-1] for line in path.read_text(encoding="utf-8").splitlines()[:20]]
    for place, text in enumerate(texts):
        ids = torch.tensor([minilm.processor(text)["input_ids"]])
        like = load_batches(minilm, limit=1)[0]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(ids.shape[1])[None],
        }
        plain = tuple(t for t in ids[0].tolist() if t not in minilm.processor.all_special_ids)
        reference = dataclasses.replace(like.reference, tokens=(plain,), texts=(minilm.processor.decode(plain),))
        assert exact(minilm, dataclasses.replace(like, inputs=inputs, reference=reference), READERS[place % 3]), text


@pytest.mark.parametrize(("component", "short"), [("attn_query", 0), ("attn_value", 0), ("attn_key", 1)])
def test_the_rank_is_the_number_of_tokens_and_a_keys_is_one_less(minilm, component, short):
    batch = load_batches(minilm, limit=1, max_tokens=9)[0]
    found = attack(seen(minilm, batch, component), minilm, "span")
    assert found.details["rank"] == batch.inputs["input_ids"].shape[1] - short
    assert found.tokens == batch.reference.tokens
    assert found.confidence[0] > 0.9


def test_a_batch_of_two_gives_the_tokens_of_every_position(minilm):
    batch = load_batches(minilm, limit=2, batch_size=2)[0]
    found = attack(seen(minilm, batch), minilm, "span")
    assert found.status == "ok"
    assert "arbitrary" in found.details["assignment"]
    assert len(found.tokens) == 2
    for place in range(min(map(len, batch.reference.tokens))):
        assert {row[place] for row in found.tokens} == {row[place] for row in batch.reference.tokens}
    assert set().union(*found.tokens) == set().union(*batch.reference.tokens)


# In a causal language model the last token predicts nothing and no later query reads it: layer 0 has no trace of it.
# The first query sees only itself, so its softmax is constant.
@pytest.mark.parametrize(("component", "first"), [("attn_query", 1), ("attn_value", 0), ("attn_qkv", 0)])
@pytest.mark.parametrize("length", [6, 20])
def test_gpt2_reads_all_that_its_slice_holds(tiny_gpt2, component, first, length):
    batch = load_batches(tiny_gpt2, limit=1, max_length=length)[0]
    found = attack(seen(tiny_gpt2, batch, component), tiny_gpt2, "span")
    assert found.status == "ok", found.reason
    assert found.tokens[0] == batch.reference.tokens[0][first:-1]
    assert found.details.get("unread", []) == list(range(first))


def test_a_key_without_a_known_first_token_is_not_applicable(tiny_gpt2):
    batch = load_batches(tiny_gpt2, limit=1, max_length=20)[0]
    found = attack(seen(tiny_gpt2, batch, "attn_key"), tiny_gpt2, "span")
    assert (found.status, found.tokens) == ("not_applicable", ())
    assert "anchor" in found.reason


def test_rotary_positions_leave_a_bag():
    config = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    victim = load_model("llama", weights="random", task="causal-lm", tokenizer="bytes", config=config, device="cpu")
    batch = load_batches(victim, limit=1, max_length=16)[0]
    found = attack(seen(victim, batch, "attn_value"), victim, "span")
    assert found.status == "ok"
    assert "unknown" in found.details["order"]
    assert set(found.tokens[0]) == set(batch.reference.tokens[0][:-1])


@pytest.mark.parametrize("component", READERS)
@pytest.mark.parametrize("std", [1e-3, 1.0])
def test_noise_is_no_signal(tiny_bert, component, std):
    batch = load_batches(tiny_bert, limit=1)[0]
    found = attack(seen(tiny_bert, batch, component, defense={"kind": "gaussian_noise", "std": std}), tiny_bert, "span")
    assert (found.status, found.tokens) == ("no_signal", ())
    assert found.reason


def test_a_zero_gradient_is_no_signal(tiny_bert):
    observation = seen(tiny_bert, load_batches(tiny_bert, limit=1)[0])
    zero = {name: torch.zeros_like(tensor) for name, tensor in observation.gradients.items()}
    found = attack(dataclasses.replace(observation, gradients=zero), tiny_bert, "span")
    assert (found.status, found.reason) == ("no_signal", "the observed gradient is zero")


def test_more_tokens_than_dimensions_are_no_answer(tiny_bert):
    batch = load_batches(tiny_bert, limit=8, batch_size=8)[0]  # width 32
    assert attack(seen(tiny_bert, batch), tiny_bert, "span").status == "no_signal"


@pytest.mark.parametrize(("components", "layers"), [("attn_query", 1), ("ffn_in", 0), ("norm", 0)])
def test_other_modules_are_not_applicable(tiny_bert, components, layers):
    observation = seen(tiny_bert, load_batches(tiny_bert, limit=1)[0], components, layers)
    found = attack(observation, tiny_bert, "span")
    assert (found.status, found.tokens) == ("not_applicable", ())


def test_dropout_in_the_client_is_not_applicable(tiny_bert):
    victim = dataclasses.replace(tiny_bert, mode="train")
    found = attack(seen(victim, load_batches(victim, limit=1)[0]), victim, "span")
    assert found.status == "not_applicable"
    assert "dropout" in found.reason


def test_a_key_without_granted_special_tokens_has_no_anchor(tiny_bert):
    observation = seen(tiny_bert, load_batches(tiny_bert, limit=1, max_tokens=12)[0], "attn_key")
    assert attack(observation, tiny_bert, "span", knowledge=Knowledge(special_tokens=False)).status == "not_applicable"
