"""The prior is more surprised by scrambled words than by a sentence, whatever stands beside it in the batch."""

from __future__ import annotations

import pytest
import torch

from lmleak.attacks._prior import load_prior
from lmleak.errors import ModelError

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


def test_an_empty_text_has_a_finite_score(prior):
    assert torch.isfinite(prior(["", "word"])).all()


def test_missing_weights_are_named(minilm):
    with pytest.raises(ModelError, match="nowhere"):
        load_prior("./nowhere", minilm)
