"""RoBERTa: BERT's shape with positions counted from behind the padding index (Liu et al., 2019, arXiv 1907.11692)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lmleak.models._config import Config

if TYPE_CHECKING:
    from lmleak.models._input import InputLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "first_position", "input_layer", "load"]

MODEL_TYPES = ("roberta", "xlm-roberta")
TASKS = ("sequence-classification", "masked-lm")
TOKENIZER = "RobertaTokenizer"  #: reads a folder that holds bare vocabulary files
CAUSAL = False
BLOCK = r"(?:roberta\.)?encoder\.layer\.(\d+)"
COMPONENTS = {
    "embedding": (r"(?:roberta\.)?embeddings\.(?:word|position|token_type)_embeddings",),
    "attn_query": ("attention.self.query",),
    "attn_key": ("attention.self.key",),
    "attn_value": ("attention.self.value",),
    "attn_qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn_output": ("attention.output.dense",),
    "ffn_in": ("intermediate.dense",),
    "ffn_out": ("output.dense",),
    "norm": ("attention.output.LayerNorm", "output.LayerNorm", r"(?:roberta\.)?embeddings\.LayerNorm"),
    "head": ("classifier", "lm_head"),
}


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._loading import load as load_any

    return load_any(config, seed, sys.modules[__name__], "roberta")


def first_position(module: Any) -> int:
    """Position id of the first token; padding gets the one before it."""
    return int(module.base_model.embeddings.padding_idx) + 1


def input_layer(module: Any) -> InputLayer:
    """What layer 0 reads: LayerNorm(word + position + type 0); row 0 of `position` is the first token's."""
    from lmleak.models._input import InputLayer

    table = module.base_model.embeddings
    positions = table.position_embeddings.weight.detach()[first_position(module) :]
    return InputLayer(
        word=table.word_embeddings.weight.detach(),
        position=positions + table.token_type_embeddings.weight.detach()[0],
        norm="layer",
        weight=table.LayerNorm.weight.detach(),
        bias=table.LayerNorm.bias.detach(),
        eps=table.LayerNorm.eps,
    )
