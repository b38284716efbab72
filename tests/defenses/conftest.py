"""A tiny client: a two-block BERT in float64 and three sentences of different lengths."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lmleak import registry
from lmleak.gradients import select
from lmleak.gradients.observe import ClientGradients
from lmleak.records import Batch, Reference, Victim


@pytest.fixture(scope="session")
def victim() -> Victim:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = BertForSequenceClassification(
            BertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                vocab_size=40,
                max_position_embeddings=8,
            )
        )
    return Victim(
        module=module.double().eval(),
        processor=None,
        family=registry.load("models", "bert"),
        kind="bert",
        task="sequence-classification",
        weights="random",
    )


@pytest.fixture(scope="session")
def batch() -> Batch:
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [3]])).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "position_ids": torch.arange(7).expand(3, 7)}
    return Batch(inputs, torch.tensor([0, 1, 1]), Reference(labels=(0, 1, 1)))


@pytest.fixture
def client(victim, batch) -> ClientGradients:
    return ClientGradients(victim, batch, select(victim, components=["attn_query", "ffn_in"]).entries)
