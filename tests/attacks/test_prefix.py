"""prefix: exact tokens of decoders from one module; its shared-prefix forward and last token against slow twins."""

from __future__ import annotations

import copy
import dataclasses
import gc

import pytest
import torch

from lmleak.attacks import attack
from lmleak.attacks._objective import frozen
from lmleak.attacks._prefix_forward import Prefix, Reader
from lmleak.attacks._prefix_meet import Meeting
from lmleak.attacks._rowspace import matrix, row_space
from lmleak.attacks.prefix import _order
from lmleak.data import load_batches
from lmleak.gradients import observe, select
from lmleak.models import load_model

LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def tiny_llama():
    return load_model("llama", weights="random", task="causal-lm", tokenizer="bytes", config=LLAMA, device="cpu")


@pytest.fixture(scope="module")
def classifier():
    config = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return load_model("gpt2", weights="random", tokenizer="bytes", config=config, device="cpu")


def _batch(victim, tmp_path, texts):
    path = tmp_path / "texts.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))
    return load_batches(
        victim, "local", path=str(path), text_column="text", label_column="label", batch_size=len(texts), shuffle=False
    )[0]


def _run(victim, batch, component, layer, **fields):
    observation = observe(victim, batch, select(victim, components=[component], layers=[layer], parameters="weight"))
    return attack(observation, victim, "prefix", **fields)


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama"])
def test_shared_prefix_forward_reads_what_the_plain_forward_reads(request, kind):
    victim = request.getfixturevalue(kind)
    name = select(victim, components=["ffn_in"], layers=[2], parameters="weight").entries[0].module
    reader, caught = Reader(victim.module, name), []
    texts = [[5, 9, 40, 7], [80, 81, 82, 83]]
    with frozen(victim.module), torch.no_grad():
        prefixes = []
        for ids in texts:
            prefix = Prefix()
            for token in ids:
                prefix = reader.extend(prefix, token)
            prefixes.append(prefix)
        last = torch.arange(133).expand(2, -1)  # more than one row of the sequence axis, and not a multiple of it
        fast = reader.read(prefixes, last)
        handle = victim.module.get_submodule(name).register_forward_pre_hook(lambda m, args: caught.append(args[0]))
        try:
            for ids in texts:
                whole = torch.tensor([[*ids, token] for token in last[0].tolist()])
                victim.module(input_ids=whole, use_cache=False)
        finally:
            handle.remove()
    slow = torch.stack([x[:, -1] for x in caught])
    assert torch.allclose(fast, slow, atol=2e-5 * slow.abs().max())


@pytest.mark.parametrize("component", ["attn_value", "attn_qkv", "attn_output", "ffn_in", "ffn_out"])
def test_one_module_of_a_language_model_gives_every_token(tiny_gpt2, tmp_path, component):
    batch = _batch(tiny_gpt2, tmp_path, ["Rain on Oslo."])
    result = _run(tiny_gpt2, batch, component, 1)
    assert (result.status, result.tokens) == ("ok", batch.reference.tokens)
    assert result.confidence[0] > 0.9


@pytest.mark.parametrize("component", ["attn_value", "ffn_in"])
def test_sentences_of_different_length_are_told_apart(classifier, tmp_path, component):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo.", "Nobody.", "She sold it twice"])
    result = _run(classifier, batch, component, 1)
    assert result.status == "ok"
    assert sorted(result.tokens) == sorted(batch.reference.tokens)


@pytest.mark.parametrize("component", ["attn_key", "attn_output", "ffn_in"])
def test_rotary_positions(tiny_llama, tmp_path, component):
    batch = _batch(tiny_llama, tmp_path, ["Rain on Oslo."])
    result = _run(tiny_llama, batch, component, 2)
    assert (result.status, result.tokens) == ("ok", batch.reference.tokens)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("component", ["attn_query", "attn_key"])
def test_query_and_key_do_not_hold_the_first_token_and_still_give_it(classifier, tmp_path, component, layer):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo."])
    result = _run(classifier, batch, component, layer)
    assert (result.status, result.tokens) == ("ok", batch.reference.tokens)


def test_last_block_of_a_classifier_is_not_applicable(classifier, tmp_path):
    result = _run(classifier, _batch(classifier, tmp_path, ["Rain on Oslo."]), "ffn_in", 2)
    assert result.status == "not_applicable"
    assert "pooled token" in result.reason


def test_budget_ends_the_search_honestly(classifier, tmp_path):
    result = _run(classifier, _batch(classifier, tmp_path, ["Rain on Oslo."]), "ffn_in", 1, max_candidates=600)
    assert result.status == "budget_exhausted"
    assert set(result.confidence) <= {0.0}


def test_another_models_gradient_gives_no_sentence(classifier, tmp_path):
    other = copy.deepcopy(classifier.module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    batch = _batch(classifier, tmp_path, ["Rain on Oslo."])
    stranger = copy.copy(classifier)
    object.__setattr__(stranger, "module", other)
    observation = observe(stranger, batch, select(stranger, components=["ffn_in"], layers=[1], parameters="weight"))
    result = attack(observation, classifier, "prefix")
    assert result.status == "no_signal"


@pytest.mark.parametrize("component", ["attn_query", "attn_key", "attn_qkv"])
@pytest.mark.parametrize("victim", ["classifier", "tiny_gpt2"])
def test_layer_0_tells_whose_each_token_is(request, tmp_path, victim, component):
    victim = request.getfixturevalue(victim)
    batch = _batch(victim, tmp_path, ["Oslo", "They", "Run!"])
    result = _run(victim, batch, component, 0)
    assert result.status == "ok", result.reason
    assert sorted(result.tokens) == sorted(batch.reference.tokens)


@pytest.mark.parametrize("component", ["attn_query", "attn_qkv"])
def test_layer_0_leaves_out_the_word_that_only_the_norm_puts_there(tiny_gpt2, tmp_path, component):
    """`a` at places 1 and 3 and `b` at 1: the space holds `b` at 3 as well."""
    batch = _batch(tiny_gpt2, tmp_path, ["xayak", "zbqu"])
    result = _run(tiny_gpt2, batch, component, 0)
    assert result.details["features"] == result.details["rank"] + 1
    assert result.status == "ok", result.reason
    assert sorted(result.tokens) == sorted(batch.reference.tokens)


def test_layer_0_says_when_repeated_words_hide_whose_they_are(classifier, tmp_path):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo.", "She sold it", "Run!"])
    result = _run(classifier, batch, "attn_query", 0)
    assert (result.status, result.tokens) == ("no_signal", ())
    assert "words repeat" in result.reason


def test_layer_0_value_of_several_sentences_is_not_applicable(classifier, tmp_path):
    result = _run(classifier, _batch(classifier, tmp_path, ["Rain on Oslo.", "Nobody."]), "attn_value", 0)
    assert result.status == "not_applicable"
    assert "which sentence" in result.reason


@pytest.mark.parametrize("pool", [{"components": ["attn_value"], "layers": [0]}, {"components": ["embedding"]}])
def test_token_sets_of_the_input_side_replace_the_vocabulary(classifier, tmp_path, pool):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo.", "She sold it"])
    deep = select(classifier, components=["ffn_in"], layers=[1], parameters="weight")
    first = select(classifier, parameters="weight", **pool)
    alone = observe(classifier, batch, deep)
    both = observe(classifier, batch, dataclasses.replace(deep, entries=(*first.entries, *deep.entries)))
    slow, fast = attack(alone, classifier, "prefix"), attack(both, classifier, "prefix")
    assert sorted(slow.tokens) == sorted(fast.tokens) == sorted(batch.reference.tokens)
    assert 4 * fast.details["candidates"] < slow.details["candidates"]


@pytest.mark.parametrize("component", ["attn_value", "attn_query", "ffn_in"])
def test_left_padding(classifier, tmp_path, component):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo.", "She sold it"])
    ids, mask = batch.inputs["input_ids"].clone(), batch.inputs["attention_mask"].clone()
    gap = int((mask[1] == 0).sum())
    ids[1], mask[1] = ids[1].roll(gap), mask[1].roll(gap)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    turned = dataclasses.replace(batch, inputs={"input_ids": ids, "attention_mask": mask, "position_ids": places})
    result = _run(classifier, turned, component, 1)
    assert result.status == "ok", result.reason
    assert sorted(result.tokens) == sorted(batch.reference.tokens)


def test_a_gradient_with_its_columns_shuffled_gives_no_sentence(classifier, tmp_path):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo."])
    observation = observe(classifier, batch, select(classifier, components=["ffn_in"], layers=[1], parameters="weight"))
    (name, gradient), *_ = observation.gradients.items()
    shuffled = gradient[torch.randperm(len(gradient), generator=torch.Generator().manual_seed(0))]  # Conv1D: [d_in, d]
    result = attack(dataclasses.replace(observation, gradients={name: shuffled}), classifier, "prefix")
    assert result.status == "no_signal"


@pytest.mark.parametrize("component", ["attn_query", "attn_key"])
def test_first_pairs_are_met_in_the_middle(classifier, tmp_path, component):
    batch = _batch(classifier, tmp_path, ["Rain on Oslo."])
    selection = select(classifier, components=[component], layers=[1], parameters="weight")
    (entry,) = selection.entries
    gradient = observe(classifier, batch, selection).gradients[entry.name]
    space = row_space([matrix(classifier.module, entry, gradient)])
    reader, found, tested = Reader(classifier.module, entry.module), [], 0
    kind = "differences" if component == "attn_key" else "but_first"
    v = len(classifier.module.get_input_embeddings().weight)

    def test(pairs):
        nonlocal tested
        x = reader.pairs(pairs)
        residual = space.residual(x[:, 1] - x[:, 0] if kind == "differences" else x[:, 1])
        found.extend(pairs[residual < 1e-3].tolist())
        tested += len(pairs)
        return x[:, 1], residual

    with frozen(classifier.module), torch.no_grad():
        meeting = Meeting(reader, space, kind, torch.arange(v), torch.Generator().manual_seed(0))
        while not found and meeting.next(test):
            pass
    assert batch.reference.tokens[0][:2] in map(tuple, found)
    assert tested < v**2 / 10


def test_a_priors_words_are_tried_first(classifier, tmp_path):
    text = tmp_path / "prior.txt"
    text.write_text("Oslo Rain. " * 50)
    batch = _batch(classifier, tmp_path, ["Rain on Oslo."])
    likely = _order(classifier, str(text))[:10].tolist()
    assert set(likely) == set(classifier.processor("Oslo Rain. ")["input_ids"])
    result = _run(classifier, batch, "ffn_in", 1, prior=str(text))
    assert (result.status, result.tokens) == ("ok", batch.reference.tokens)


def test_what_the_search_kept_is_freed_without_the_collector(tiny_gpt2, tmp_path):
    batch = _batch(tiny_gpt2, tmp_path, ["abcde", "fghij"])
    alive = lambda: sum(type(one) is Prefix for one in gc.get_objects())  # noqa: E731
    gc.collect()
    gc.disable()
    try:
        before = alive()
        assert _run(tiny_gpt2, batch, "attn_value", 1).status == "ok"
        assert alive() == before  # keys and values of every prefix: gigabytes on GPT-2 small
    finally:
        gc.enable()
