"""DistilBERT: BERT with half the layers, no token types and no pooler (Sanh et al., 2019, arXiv 1910.01108)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lmleak.models._config import Config

if TYPE_CHECKING:
    from lmleak.models._input import InputLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "input_layer", "load"]

MODEL_TYPES = ("distilbert",)
TASKS = ("sequence-classification", "masked-lm")
TOKENIZER = "DistilBertTokenizer"  #: reads a folder that holds bare vocabulary files
CAUSAL = False
BLOCK = r"(?:distilbert\.)?transformer\.layer\.(\d+)"
COMPONENTS = {
    "embedding": (r"(?:distilbert\.)?embeddings\.(?:word|position)_embeddings",),
    "attn_query": ("attention.q_lin",),
    "attn_key": ("attention.k_lin",),
    "attn_value": ("attention.v_lin",),
    "attn_qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attn_output": ("attention.out_lin",),
    "ffn_in": ("ffn.lin1",),
    "ffn_out": ("ffn.lin2",),
    "norm": ("sa_layer_norm", "output_layer_norm", r"(?:distilbert\.)?embeddings\.LayerNorm"),
    "pooler": ("pre_classifier",),
    "head": ("classifier", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
}


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._loading import load as load_any

    return load_any(config, seed, sys.modules[__name__], "distilbert")


def input_layer(module: Any) -> InputLayer:
    """What layer 0 reads: LayerNorm(word + position)."""
    from lmleak.models._input import InputLayer

    table = module.base_model.embeddings
    return InputLayer(
        word=table.word_embeddings.weight.detach(),
        position=table.position_embeddings.weight.detach(),
        norm="layer",
        weight=table.LayerNorm.weight.detach(),
        bias=table.LayerNorm.bias.detach(),
        eps=table.LayerNorm.eps,
    )
