"""LLaMA-shaped decoders: rotary positions, RMS norm, gated FFN (Touvron et al., 2023, arXiv 2302.13971)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lmleak.models._config import Config

if TYPE_CHECKING:
    from lmleak.models._input import InputLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "input_layer", "load"]

MODEL_TYPES = ("llama", "mistral", "qwen2")
TASKS = ("sequence-classification", "causal-lm")
TOKENIZER = None  #: reads a folder that holds bare vocabulary files
CAUSAL = True
BLOCK = r"(?:model\.)?layers\.(\d+)"
COMPONENTS = {
    "embedding": (r"(?:model\.)?embed_tokens",),
    "attn_query": ("self_attn.q_proj",),
    "attn_key": ("self_attn.k_proj",),
    "attn_value": ("self_attn.v_proj",),
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": ("self_attn.o_proj",),
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_out": ("mlp.down_proj",),
    "norm": ("input_layernorm", "post_attention_layernorm", r"(?:model\.)?norm"),
    "head": ("score", "lm_head"),
}


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._loading import load as load_any

    return load_any(config, seed, sys.modules[__name__], "llama")


def input_layer(module: Any) -> InputLayer:
    """What layer 0 reads: RMSNorm(word). Positions enter inside the attention, so these rows carry none."""
    from lmleak.models._input import InputLayer

    body, norm = module.base_model, module.base_model.layers[0].input_layernorm
    return InputLayer(
        word=body.embed_tokens.weight.detach(),
        position=None,
        norm="rms",
        weight=norm.weight.detach(),
        bias=None,
        eps=norm.variance_epsilon,
    )
