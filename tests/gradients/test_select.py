"""The selection dialect, written down as a table: every row is a sentence about what a pattern means."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from lmleak import registry
from lmleak.errors import SelectionError
from lmleak.gradients import modules_table, select

LAYERS = 4
ATTENTION = ("query", "key", "value")


def _bert(cls=BertForSequenceClassification):
    return cls(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=12,
            vocab_size=20,
            max_position_embeddings=6,
        )
    )


def _gpt2(cls=GPT2LMHeadModel):
    sizes = {"n_embd": 8, "n_layer": LAYERS, "n_head": 2, "vocab_size": 20, "n_positions": 6}
    return cls(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


# On the meta device: selection reads names and shapes, never values.
with torch.device("meta"):
    MODELS = {
        "bert": (_bert(), registry.load("models", "bert")),
        "bert-mlm": (_bert(BertForMaskedLM), registry.load("models", "bert")),
        "gpt2": (_gpt2(), registry.load("models", "gpt2")),
        "gpt2-cls": (_gpt2(GPT2ForSequenceClassification), registry.load("models", "gpt2")),
    }


def names(model: str, **spec) -> list[str]:
    return [entry.name for entry in select(MODELS[model], **spec).entries]


def block(layer: int, *suffixes: str) -> list[str]:
    prefix = f"bert.encoder.layer.{layer}."
    return [f"{prefix}{suffix}.{leaf}" for suffix in suffixes for leaf in ("weight", "bias")]


def qkv(layer: int, *parts: str) -> list[str]:
    return [f"transformer.h.{layer}.attn.c_attn.{leaf}[attn_{part}]" for leaf in ("weight", "bias") for part in parts]


# sentence, model, what is written, what is selected
MEANS = [
    (
        "an exact name selects that module's weight and bias",
        "bert",
        {"target_modules": ["bert.pooler.dense"]},
        ["bert.pooler.dense.weight", "bert.pooler.dense.bias"],
    ),
    (
        "a dotted suffix selects every module that ends in it",
        "bert",
        {"target_modules": ["self.query"]},
        [name for layer in range(LAYERS) for name in block(layer, "attention.self.query")],
    ),
    (
        "a suffix ends at dots: `dense` is not the end of `condense`, and output.dense is two modules of a block",
        "bert",
        {"target_modules": ["output.dense"], "layers": 0},
        block(0, "attention.output.dense", "output.dense"),
    ),
    (
        "component ffn_out is not fooled by attention.output.dense",
        "bert",
        {"components": ["ffn_out"], "layers": 0},
        block(0, "output.dense"),
    ),
    (
        "a string is a regular expression for the whole dotted name",
        "bert",
        {"target_modules": r"bert\.encoder\.layer\.[01]\.attention\.self\.(query|key)", "parameters": "weight"},
        [f"bert.encoder.layer.{layer}.attention.self.{part}.weight" for layer in (0, 1) for part in ("query", "key")],
    ),
    (
        "a list entry with * is a glob, and * crosses dots",
        "bert",
        {"target_modules": ["*.query"], "layers": -1},
        block(LAYERS - 1, "attention.self.query"),
    ),
    (
        "a string that starts with * can only be a glob",
        "bert",
        {"target_modules": "*.query", "layers": -1},
        block(LAYERS - 1, "attention.self.query"),
    ),
    (
        "? in a glob is one character",
        "bert",
        {"target_modules": ["bert.encoder.layer.?.attention.self.key"], "layers": 2},
        block(2, "attention.self.key"),
    ),
    (
        "layers keep what lies in those blocks, ranges and negatives included",
        "bert",
        {"target_modules": ["query"], "layers": [0, "2-3", -1], "parameters": "bias"},
        [f"bert.encoder.layer.{layer}.attention.self.query.bias" for layer in (0, 2, 3)],
    ),
    (
        "layers alone select whole blocks",
        "gpt2",
        {"layers": 1, "parameters": "bias"},
        [f"transformer.h.1.{m}.bias" for m in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")],
    ),
    (
        "what is listed twice is selected once",
        "bert",
        {"target_modules": ["pooler.dense", "bert.pooler.dense", "*.pooler.dense"]},
        ["bert.pooler.dense.weight", "bert.pooler.dense.bias"],
    ),
    (
        "attn_query of a packed c_attn is its first third",
        "gpt2",
        {"components": ["attn_query"], "layers": 2},
        qkv(2, "query"),
    ),
    (
        "the three thirds are three entries, as on BERT",
        "gpt2",
        {"components": ["attn_value", "attn_query", "attn_key"], "layers": 2},
        qkv(2, *ATTENTION),
    ),
    (
        "a slice is left out where the whole is selected too",
        "gpt2",
        {"components": ["attn_query", "attn_qkv"], "layers": 2},
        ["transformer.h.2.attn.c_attn.weight", "transformer.h.2.attn.c_attn.bias"],
    ),
    (
        "attn_qkv of BERT is three modules",
        "bert",
        {"components": "attn_qkv", "layers": 0},
        block(0, *(f"attention.self.{part}" for part in ATTENTION)),
    ),
    (
        "exclusion takes out a module",
        "bert",
        {"target_modules": r".*\.self\..*", "layers": 0, "exclude_modules": ["query"]},
        block(0, "attention.self.key", "attention.self.value"),
    ),
    (
        "exclusion takes out everything below a module",
        "bert",
        {"components": ["all"], "exclude_modules": ["bert.encoder", "embeddings"]},
        ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"],
    ),
    (
        "exclusion may be a regular expression",
        "gpt2",
        {"components": ["attn_qkv"], "parameters": "bias", "exclude_modules": r"transformer\.h\.[012]\..*"},
        ["transformer.h.3.attn.c_attn.bias"],
    ),
    (
        "the embedding of a tied model is selected under its own name",
        "gpt2",
        {"target_modules": ["wte"]},
        ["transformer.wte.weight"],
    ),
    (
        "naming both ends of a tie selects the parameter once",
        "gpt2",
        {"target_modules": ["lm_head", "wte"]},
        ["transformer.wte.weight"],
    ),
    (
        "GPT-2's classification head is not tied",
        "gpt2-cls",
        {"components": ["head"]},
        ["score.weight"],
    ),
]


@pytest.mark.parametrize(("model", "spec", "expected"), [row[1:] for row in MEANS], ids=[row[0] for row in MEANS])
def test_means(model, spec, expected):
    assert names(model, **spec) == expected


# sentence, model, what is written, what the error must say
REFUSES = [
    ("an unmatched entry gets its nearest", "bert", {"target_modules": ["self.querry"]}, ["self.querry", "self.query"]),
    ("one unmatched entry among good ones", "bert", {"target_modules": ["query", "kee"]}, ["'kee'", "'key'"]),
    ("a suffix written as a string", "bert", {"target_modules": "query"}, ["regular expression", "['query']"]),
    ("a piece written as a string", "bert", {"target_modules": "quer"}, ["'.*quer.*'"]),
    ("a regular expression written in a list", "bert", {"target_modules": ["(query|key)"]}, ["write it as a string"]),
    ("a broken regular expression", "bert", {"target_modules": "(query"}, ["(query", "not a regular expression"]),
    ("a glob that is not the whole name", "gpt2", {"target_modules": ["h.*.c_attn"]}, ["'*.h.*.c_attn'"]),
    ("a component written as a module", "bert", {"target_modules": ["attn_query"]}, ["components: ['attn_query']"]),
    ("a module written as a component", "gpt2", {"components": ["c_proj"]}, ["target_modules: ['c_proj']"]),
    ("a parameter's name", "gpt2", {"target_modules": ["wte.weight"]}, ["'wte'", "parameters: weight"]),
    ("a module without parameters", "bert", {"target_modules": ["layer.0.attention.self"]}, ["no parameters", "query"]),
    ("a dropout", "bert", {"target_modules": ["dropout"]}, ["Dropout", "no parameters"]),
    ("a misspelt component", "bert", {"components": ["atn_query"]}, ["atn_query", "'attn_query'"]),
    ("a component the model lacks", "gpt2", {"components": ["pooler"]}, ["gpt2", "no 'pooler'", "attn_query"]),
    ("a component outside the layers", "bert", {"components": ["pooler"], "layers": 0}, ["'pooler'", "outside"]),
    ("a layer out of range", "bert", {"components": ["attn_query"], "layers": 7}, ["7", f"{LAYERS} layers", "0 to 3"]),
    ("a negative layer out of range", "bert", {"layers": -5}, ["-5", "out of range"]),
    ("a layer that nothing is in", "bert", {"target_modules": r".*layer\.0.*", "layers": [0, 1]}, ["layer 1"]),
    ("layers that contradict a name", "bert", {"target_modules": ["layer.0.output.dense"], "layers": 1}, ["layers 0"]),
    ("a tied module", "gpt2", {"target_modules": ["lm_head"]}, ["lm_head.weight", "transformer.wte.weight", "tied"]),
    ("a tied module among others", "gpt2", {"target_modules": ["lm_head", "wpe"]}, ["tied", "'transformer.wte'"]),
    ("a component that is all tied", "gpt2", {"components": ["head"]}, ["tied", "component 'embedding'"]),
    ("a decoder tied to the embedding", "bert-mlm", {"target_modules": ["decoder"]}, ["word_embeddings", "tied"]),
    ("no bias to select", "gpt2", {"target_modules": ["wte"], "parameters": "bias"}, ["none of it is a bias"]),
    ("an unknown parameter kind", "gpt2", {"parameters": "weights"}, ["'weights'", "weight or bias"]),
    ("an exclusion that matches nothing", "bert", {"exclude_modules": ["querry"]}, ["exclude_modules", "'query'"]),
    ("an idle exclusion", "bert", {"components": "head", "exclude_modules": ["query"]}, ["takes nothing out"]),
    ("an exclusion of a tied module", "gpt2", {"exclude_modules": ["lm_head"]}, ["lm_head.weight is tied to"]),
    ("nothing left", "bert", {"components": "head", "exclude_modules": ["classifier"]}, ["nothing is left"]),
    ("both forms at once", "bert", {"target_modules": ["query"], "components": ["attn_query"]}, ["not both"]),
    ("an empty list", "bert", {"target_modules": []}, ["target_modules"]),
    ("an empty list of layers", "bert", {"layers": []}, ["layers"]),
    ("a word as a layer", "bert", {"layers": "first"}, ["'first'", "3-5"]),
    ("a truth value as a layer", "bert", {"layers": True}, ["True"]),
    ("a range that runs backwards", "bert", {"layers": "3-1"}, ["'1-3'"]),
]


@pytest.mark.parametrize(("model", "spec", "says"), [row[1:] for row in REFUSES], ids=[row[0] for row in REFUSES])
def test_refuses(model, spec, says):
    with pytest.raises(SelectionError) as caught:
        select(MODELS[model], **spec)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_everything_is_the_whole_model_once(model):
    module, _ = MODELS[model]
    selection = select(MODELS[model])
    assert selection.share == 1
    assert [entry.name for entry in selection.entries] == [name for name, _ in module.named_parameters()]
    assert selection == select(MODELS[model], components=["all"]) == select(MODELS[model], target_modules="all")


def test_all_linear_takes_every_linear_and_leaves_out_the_tied_one():
    module, _ = MODELS["gpt2"]
    linear = [name for name, m in module.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert "lm_head" in linear
    found = {entry.module for entry in select(MODELS["gpt2"], target_modules="all-linear").entries}
    assert found == set(linear) - {"lm_head"}


def test_slices_know_their_columns_and_cover_the_parameter():
    selection = select(MODELS["gpt2"], components=["attn_query", "attn_key", "attn_value"], layers=1)
    weight = [entry for entry in selection.entries if entry.parameter.endswith("weight")]
    assert [entry.part for entry in weight] == [(1, 0, 8), (1, 8, 16), (1, 16, 24)]  # Conv1D stores [in, out]
    assert [entry.shape for entry in weight] == [(8, 8)] * 3
    bias = [entry for entry in selection.entries if entry.parameter.endswith("bias")]
    assert [entry.part for entry in bias] == [(0, 0, 8), (0, 8, 16), (0, 16, 24)]
    assert selection.numel == select(MODELS["gpt2"], components=["attn_qkv"], layers=1).numel


def test_a_fused_linear_is_cut_along_its_outputs():
    module = torch.nn.Sequential(torch.nn.Linear(4, 9))
    family = SimpleNamespace(__name__="toy", BLOCK=None, COMPONENTS={"attn_key": ("0#1/3",)})
    (weight, bias) = select((module, family), components="attn_key").entries
    assert (weight.part, weight.shape) == ((0, 3, 6), (3, 4))
    assert (bias.part, bias.shape) == ((0, 3, 6), (3,))


def test_a_fused_linear_that_does_not_divide_is_refused():
    module = torch.nn.Sequential(torch.nn.Linear(4, 10))
    family = SimpleNamespace(__name__="toy", BLOCK=None, COMPONENTS={"attn_key": ("0#1/3",)})
    with pytest.raises(SelectionError, match="3 equal parts"):
        select((module, family), components="attn_key")


def test_layers_need_blocks():
    family = SimpleNamespace(__name__="toy", BLOCK=None, COMPONENTS={})
    with pytest.raises(SelectionError, match="finds no blocks"):
        select((torch.nn.Sequential(torch.nn.Linear(2, 2)), family), layers=0)


def test_entries_know_layer_and_narrowest_component():
    entries = {entry.name: entry for entry in select(MODELS["bert"]).entries}
    query = entries["bert.encoder.layer.2.attention.self.query.weight"]
    assert (query.layer, query.component) == (2, "attn_query")
    assert entries["classifier.bias"].component == "head"
    assert entries["classifier.bias"].layer is None
    packed = select(MODELS["gpt2"], target_modules=["c_attn"], layers=0).entries[0]
    assert packed.component == "attn_qkv"


def test_frozen_parameters_have_no_gradient_and_are_left_out():
    module = _bert()
    module.bert.encoder.layer[0].requires_grad_(False)
    model = (module, registry.load("models", "bert"))
    assert {entry.layer for entry in select(model, components="attn_query").entries} == {1, 2, 3}
    with pytest.raises(SelectionError, match="frozen"):
        select(model, components="attn_query", layers=0)
    # A model frozen as a whole was not fine-tuned in part: its holder switched gradients off.
    assert select((module.requires_grad_(False), model[1])).share == 1


def test_lora_selects_what_it_trains():
    peft = pytest.importorskip("peft")
    module = peft.get_peft_model(_bert(), peft.LoraConfig(target_modules=["query"], r=2))
    model = (module, registry.load("models", "bert"))
    expected = ["lora_A.default.weight", "lora_B.default.weight"]
    for spec in ({"components": "attn_query"}, {"target_modules": ["attention.self.query"]}):
        entries = select(model, **spec, layers=1).entries
        assert [entry.name.partition(".query.")[2] for entry in entries] == expected
        assert {(entry.layer, entry.component) for entry in entries} == {(1, "attn_query")}


def test_lora_on_a_packed_layer_slices_b():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    module = peft.get_peft_model(_gpt2(), config)
    (entry,) = select((module, registry.load("models", "gpt2")), components="attn_key", layers=0).entries
    assert entry.parameter.endswith("c_attn.lora_B.default.weight")
    assert (entry.shape, entry.part) == ((8, 2), (0, 8, 16))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-LAYERS, LAYERS - 1), min_size=1, max_size=4), st.booleans())
def test_layer_spellings_agree(layers, as_text):
    wanted = sorted({layer % LAYERS for layer in layers})
    spec = ",".join(map(str, layers)) if as_text else layers
    entries = select(MODELS["bert"], components="attn_key", layers=spec, parameters="weight").entries
    assert [entry.layer for entry in entries] == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(-LAYERS, LAYERS - 1), st.integers(-LAYERS, LAYERS - 1))
def test_ranges_hold_both_ends(first, last):
    low, high = first % LAYERS, last % LAYERS
    if low > high:
        with pytest.raises(SelectionError, match="backwards"):
            select(MODELS["gpt2"], layers=f"{first}-{last}")
    else:
        entries = select(MODELS["gpt2"], layers=f"{first}-{last}").entries
        assert {entry.layer for entry in entries} == set(range(low, high + 1))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_suffix_selects_the_modules_that_end_in_it(data):
    module, _ = MODELS["bert"]
    holders = [name for name, m in module.named_modules() if list(m.parameters(recurse=False))]
    name = data.draw(st.sampled_from(holders))
    suffix = ".".join(name.split(".")[data.draw(st.integers(0, name.count("."))) :])
    found = {entry.module for entry in select(MODELS["bert"], target_modules=[suffix]).entries}
    assert found == {holder for holder in holders if f".{holder}".endswith(f".{suffix}")}


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abqery.*?_([\\10-", max_size=12), st.booleans())
def test_any_text_selects_or_is_refused(text, as_list):
    # No other error may come out, and nothing is ever selected in silence.
    with contextlib.suppress(SelectionError):
        assert select(MODELS["bert"], target_modules=[text] if as_list else text).entries


def test_table_adds_up_and_names_the_tie():
    rows = modules_table(MODELS["gpt2"])
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    head = rows[-1]
    assert (head["name"], head["tied_to"], head["parameters"]) == ("lm_head", "transformer.wte.weight", 0)
    packed = next(row for row in rows if row["name"] == "transformer.h.0.attn.c_attn")
    assert packed["type"] == "Conv1D"
    assert (packed["shape"], packed["parameters"], packed["layer"]) == ((8, 24), 8 * 24 + 24, 0)
    assert packed["component"] == "attn_qkv"


def test_table_takes_a_suffix_a_glob_or_a_regular_expression():
    for pattern in ("c_attn", "*.c_attn", r".*c_attn"):
        assert [row["layer"] for row in modules_table(MODELS["gpt2"], pattern)] == list(range(LAYERS))
    assert len(modules_table(MODELS["gpt2"], "c_attn", layers="1-2")) == 2
    with pytest.raises(SelectionError, match="c_attn"):
        modules_table(MODELS["gpt2"], "c_atn")


def test_table_shows_slices():
    (row,) = modules_table(MODELS["gpt2"], layers=0, components=["attn_key"])
    assert row["name"] == "transformer.h.0.attn.c_attn[attn_key]"
    assert (row["shape"], row["parameters"], row["component"]) == ((8, 8), 72, "attn_key")
