"""GPT-2: a causal decoder that packs query, key and value into one c_attn (Radford et al., 2019, OpenAI report)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lmleak.models._config import Config

if TYPE_CHECKING:
    from lmleak.models._input import InputLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "input_layer", "load"]

MODEL_TYPES = ("gpt2",)
TASKS = ("sequence-classification", "causal-lm")
TOKENIZER = "GPT2Tokenizer"  #: reads a folder that holds bare vocabulary files
CAUSAL = True
BLOCK = r"(?:transformer\.)?h\.(\d+)"
COMPONENTS = {
    "embedding": (r"(?:transformer\.)?w[tp]e",),
    "attn_query": ("attn.c_attn#0/3",),
    "attn_key": ("attn.c_attn#1/3",),
    "attn_value": ("attn.c_attn#2/3",),
    "attn_qkv": ("attn.c_attn",),
    "attn_output": ("attn.c_proj",),
    "ffn_in": ("mlp.c_fc",),
    "ffn_out": ("mlp.c_proj",),
    "norm": ("ln_1", "ln_2", r"(?:transformer\.)?ln_f"),
    "head": ("score", "lm_head"),
}


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._loading import load as load_any

    return load_any(config, seed, sys.modules[__name__], "gpt2")


def input_layer(module: Any) -> InputLayer:
    """What layer 0 reads: LayerNorm(word + position)."""
    from lmleak.models._input import InputLayer

    body, norm = module.base_model, module.base_model.h[0].ln_1
    return InputLayer(
        word=body.wte.weight.detach(),
        position=body.wpe.weight.detach(),
        norm="layer",
        weight=norm.weight.detach(),
        bias=norm.bias.detach(),
        eps=norm.eps,
    )
