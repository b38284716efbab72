"""What the tokenizer says of words: which may stand in a sentence, and how common they are."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from lmleak import attack, load_batches, observe, select
from lmleak.attacks._vocabulary import frequency, vocabulary


def test_frequent_words_are_numbered_first(minilm):
    common = frequency(minilm)
    code = minilm.processor.convert_tokens_to_ids
    assert common[code("the")] > common[code("harbor")] > common[code("talisman")] > 0
    assert common[code(".")] > common[code("x")] > common[code("ð")]
    assert common[code(",")] == common[code(".")] >= common[code("the")] > common[code("a")]
    assert common[code("##s")] == common[code("x")]
    assert common[code("##.")] < 1.01 * common[minilm.processor.cls_token_id]  # no text has it
    assert common[minilm.processor.cls_token_id] == common.min()


def test_the_vocabulary_is_every_usable_token_once_the_commonest_first(minilm):
    words = vocabulary(minilm)
    texts = minilm.processor.convert_ids_to_tokens(words.tolist())
    assert len(set(texts)) == len(texts)
    left = set(minilm.processor.get_vocab()) - set(texts)
    assert left == {t for t in minilm.processor.get_vocab() if t.startswith("[unused")} | {
        *minilm.processor.all_special_tokens
    }
    weights = frequency(minilm)[words]
    assert bool((weights[1:] <= weights[:-1]).all())


def test_rows_that_the_tokenizer_does_not_know_are_rare_words(tiny_bert):
    victim = replace(tiny_bert, module=deepcopy(tiny_bert.module))
    victim.module.resize_token_embeddings(len(victim.processor) + 7)
    common = frequency(victim)
    assert common.shape == (len(victim.processor) + 7,)
    assert bool((common > 0).all())
    assert float(common[-1]) == float(common.min())
    assert set(range(len(victim.processor), len(common))) <= set(vocabulary(victim).tolist())


def test_a_sentence_of_common_words_is_read_from_an_attention_output(minilm, tmp_path):
    """3,049 candidates; not within 8,000 where all words are alike at the start."""
    path = tmp_path / "said.tsv"
    path.write_text("s\t1\t*\ti'll work on it if i can.\n")
    batch = load_batches(minilm, "cola", path=str(path), limit=1)[0]
    seen = observe(minilm, batch, select(minilm, components="attn_output", layers=1, parameters="weight"))
    found = attack(seen, minilm, "subspace", budget=4000)
    assert found.tokens == batch.reference.tokens
    assert found.status == "ok"
    assert found.confidence[0] > 0.9
