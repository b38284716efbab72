"""Every family: its names exist in a real instance, and its closed form of layer 0's input is the model's own."""

from __future__ import annotations

import re

import pytest
import torch

from lmleak.data._batches import batches
from lmleak.data._examples import Examples
from lmleak.data.sample import Config as SampleConfig
from lmleak.errors import ModelError
from lmleak.models import family, load_model, outline

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 120},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": SMALL | {"num_key_value_heads": 1},
}
QUERY = {
    "bert": "bert.encoder.layer.0.attention.self.query",
    "roberta": "roberta.encoder.layer.0.attention.self.query",
    "distilbert": "distilbert.transformer.layer.0.attention.q_lin",
    "gpt2": "transformer.h.0.attn.c_attn",
    "llama": "model.layers.0.self_attn.q_proj",
}
#: component -> weights a block (or a model) must show, per family; what the architecture lacks is absent.
EXPECTED = {
    "attn_query": 1,
    "attn_key": 1,
    "attn_value": 1,
    "attn_output": 1,
    "ffn_in": 1,
    "ffn_out": 1,
}
CASES = [(kind, task) for kind in SIZES for task in family(kind).TASKS]


def tiny(kind, task="sequence-classification", **fields):
    return load_model(kind, weights="random", tokenizer="bytes", task=task, config=SIZES[kind], device="cpu", **fields)


def matches(module, kind, component):
    """Module names of a component, by the rule the gradients room follows."""
    known = family(kind)
    found = []
    for pattern in known.COMPONENTS[component]:
        where = pattern.split("#")[0]
        hits = [
            name
            for name, _ in module.named_modules()
            if re.fullmatch(where, name) or re.fullmatch(known.BLOCK + re.escape("." + where), name)
        ]
        found.append((pattern, hits))
    return found


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_every_component_names_modules_of_the_real_thing(kind, task):
    module = outline(kind, config=SIZES[kind], task=task).module
    for component in family(kind).COMPONENTS:
        hits = [name for _, names in matches(module, kind, component) for name in names]
        # BERT's pooler and DistilBERT's stand-in exist in classifiers only.
        if component == "pooler" and task != "sequence-classification":
            continue
        assert hits, component
        if component in EXPECTED:
            per_block = 2 if (kind, component) == ("llama", "ffn_in") else 1
            assert len(hits) == per_block * 2, component
            assert all(isinstance(module.get_submodule(name).weight, torch.nn.Parameter) for name in hits)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_every_parameter_belongs_to_a_component(kind, task):
    module = outline(kind, config=SIZES[kind], task=task).module
    owned = {
        name for component in family(kind).COMPONENTS for _, names in matches(module, kind, component) for name in names
    }
    orphans = [
        name
        for name, _ in module.named_parameters()
        if not any(name.startswith(f"{module_name}.") for module_name in owned)
    ]
    assert orphans == []


@pytest.mark.parametrize("kind", SIZES)
def test_block_pattern_finds_each_block_once(kind):
    module = outline(kind, config=SIZES[kind]).module
    found = [re.fullmatch(family(kind).BLOCK, name) for name, _ in module.named_modules()]
    assert [int(hit[1]) for hit in found if hit] == [0, 1]


@pytest.mark.parametrize("kind", SIZES)
def test_block_pattern_fits_the_model_without_a_head(kind):
    module = outline(kind, config=SIZES[kind]).module.base_model
    found = [re.fullmatch(family(kind).BLOCK, name) for name, _ in module.named_modules()]
    assert [int(hit[1]) for hit in found if hit] == [0, 1]


@pytest.mark.parametrize("kind", SIZES)
def test_input_layer_is_what_the_first_query_reads(kind, sentences):
    victim = tiny(kind, dtype="float64")
    with torch.no_grad():  # a fresh norm is the identity and fresh biases are 0: make every term count
        for name, parameter in victim.module.named_parameters():
            if parameter.dim() == 1:
                shift = torch.linspace(-0.5, 0.5, len(parameter), dtype=parameter.dtype)
                parameter.copy_(1.2 + shift if name.endswith("weight") else shift)
    batch = batches(victim, Examples(tuple(sentences), (0, 1, 0, 1)), SampleConfig(batch_size=4), seed=0)[0]
    seen = []
    hook = victim.module.get_submodule(QUERY[kind]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        victim.module(**batch.inputs)
    hook.remove()
    real = batch.inputs["attention_mask"].bool()
    places = torch.arange(real.shape[1]).expand_as(real)[real]
    rows = victim.family.input_layer(victim.module).rows(batch.inputs["input_ids"][real], places, dtype=torch.float64)
    assert rows.shape == (int(real.sum()), 16)
    torch.testing.assert_close(rows, seen[0][real], rtol=0, atol=1e-6)
    assert not rows.requires_grad


def test_input_layer_of_real_weights(minilm):
    ids = torch.tensor([[101, 7592, 2088, 102]])
    seen = []
    query = minilm.module.get_submodule(QUERY["bert"])
    hook = query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        minilm.module(input_ids=ids)
    hook.remove()
    rows = minilm.family.input_layer(minilm.module).rows(ids[0], torch.arange(4))
    torch.testing.assert_close(rows, seen[0][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SIZES)
def test_explicit_positions_change_nothing(kind, sentences):
    victim = tiny(kind, dtype="float64")
    batch = batches(victim, Examples(tuple(sentences), (0, 1, 0, 1)), SampleConfig(batch_size=4), seed=0)[0]
    with torch.no_grad():
        given = victim.module(**batch.inputs).logits
        default = victim.module(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"])
    torch.testing.assert_close(given, default.logits)


def test_generic_derives_blocks_embedding_and_head():
    config = {"model_type": "gpt_neox", **SMALL}
    victim = load_model("generic", weights="random", tokenizer="bytes", task="causal-lm", config=config, device="cpu")
    names = [name for name, _ in victim.module.named_modules()]
    assert [name for name in names if re.fullmatch(victim.family.BLOCK, name)] == [
        "gpt_neox.layers.0",
        "gpt_neox.layers.1",
    ]
    assert victim.family.COMPONENTS == {"embedding": (r"gpt_neox\.embed_in",), "head": ("lm_head",)}
    assert victim.family.CAUSAL is True
    with pytest.raises(ModelError, match="gpt_neox"):
        victim.family.input_layer(victim.module)


def test_generic_finds_a_classifier_and_is_not_shared_between_models():
    first = outline("generic", config={"model_type": "electra", **SMALL})
    second = outline("generic", config={"model_type": "bert", **SMALL})
    assert first.family.COMPONENTS["head"] == (r"classifier\.out_proj",)
    assert first.family.CAUSAL is False
    assert first.family.BLOCK != second.family.BLOCK
    assert family("generic").BLOCK is None


def test_outline_has_shapes_and_no_memory():
    before = torch.get_rng_state()
    victim = outline("gpt2")
    assert torch.equal(before, torch.get_rng_state())
    assert {parameter.device.type for parameter in victim.module.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in victim.module.transformer.parameters()) == 124_439_808
