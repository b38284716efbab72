"""BERT: a bidirectional encoder with learned positions (Devlin et al., 2018, arXiv 1810.04805)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lmleak.models._config import Config

if TYPE_CHECKING:
    from lmleak.models._input import InputLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "input_layer", "load"]

MODEL_TYPES = ("bert",)
TASKS = ("sequence-classification", "masked-lm")
TOKENIZER = "BertTokenizer"  #: reads a folder that holds bare vocabulary files
CAUSAL = False
BLOCK = r"(?:bert\.)?encoder\.layer\.(\d+)"
COMPONENTS = {
    "embedding": (r"(?:bert\.)?embeddings\.(?:word|position|token_type)_embeddings",),
    "attn_query": ("attention.self.query",),
    "attn_key": ("attention.self.key",),
    "attn_value": ("attention.self.value",),
    "attn_qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn_output": ("attention.output.dense",),
    "ffn_in": ("intermediate.dense",),
    "ffn_out": ("output.dense",),
    "norm": ("attention.output.LayerNorm", "output.LayerNorm", r"(?:bert\.)?embeddings\.LayerNorm"),
    "pooler": (r"(?:bert\.)?pooler\.dense",),
    "head": ("classifier", r"cls\.predictions"),
}


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._loading import load as load_any

    return load_any(config, seed, sys.modules[__name__], "bert")


def input_layer(module: Any) -> InputLayer:
    """What layer 0 reads: LayerNorm(word + position + type 0)."""
    from lmleak.models._input import InputLayer

    table = module.base_model.embeddings
    return InputLayer(
        word=table.word_embeddings.weight.detach(),
        position=table.position_embeddings.weight.detach() + table.token_type_embeddings.weight.detach()[0],
        norm="layer",
        weight=table.LayerNorm.weight.detach(),
        bias=table.LayerNorm.bias.detach(),
        eps=table.LayerNorm.eps,
    )
