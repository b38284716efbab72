"""One recipe asks one question of every family: components mean the same everywhere."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lmleak import registry
from lmleak.gradients import modules_table, select

SIZES = {
    "bert": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12},
    "roberta": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12},
    "distilbert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12},
    "llama": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12},
}
INSIDE = ("attn_query", "attn_key", "attn_value", "attn_output", "ffn_in", "ffn_out", "norm")


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    config = AutoConfig.for_model(request.param, vocab_size=20, pad_token_id=0, **SIZES[request.param])
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(config)
    return module, registry.load("models", request.param)


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_value", "attn_output"])
def test_a_projection_is_one_square_matrix_a_layer(model, component):
    entries = select(model, components=[component], parameters="weight").entries
    assert [(entry.shape, entry.layer, entry.component) for entry in entries] == [
        ((8, 8), 0, component),
        ((8, 8), 1, component),
    ]


def test_the_feed_forward_goes_out_and_back(model):
    for component in ("ffn_in", "ffn_out"):
        entries = select(model, components=[component], layers=1, parameters="weight").entries
        assert entries
        assert all(sorted(entry.shape) == [8, 12] for entry in entries)


def test_parts_of_a_block_are_disjoint_and_make_the_block(model):
    block = select(model, components=["layer"], layers=0)
    parts = [select(model, components=[name], layers=0) for name in INSIDE]
    assert sum(part.numel for part in parts) == block.numel
    assert select(model, components=INSIDE, layers=0).numel == block.numel


def test_query_key_value_are_qkv(model):
    together = select(model, components=["attn_query", "attn_key", "attn_value"])
    assert together.numel == select(model, components=["attn_qkv"]).numel


def test_every_component_of_the_family_selects_something(model):
    _, family = model
    for component in family.COMPONENTS:
        assert select(model, components=[component]).numel > 0


def test_every_module_with_parameters_is_in_the_table_with_its_component(model):
    module, _ = model
    rows = {row["name"]: row for row in modules_table(model)}
    assert set(rows) == {name for name, m in module.named_modules() if list(m.parameters(recurse=False))}
    assert all(row["component"] for row in rows.values() if row["layer"] is not None)
