"""ViT and DeiT: a transformer over patches, norm before attention (Dosovitskiy et al., 2020, arXiv 2010.11929)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lmleak.models._images import Common

if TYPE_CHECKING:
    from lmleak.models._patches import PatchLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "load", "patch_layer"]

MODEL_TYPES = ("vit", "deit")
ARCHITECTURES = {"deit": "DeiTForImageClassification"}  #: transformers knows two, and asks which
TASKS = ("image-classification",)
CAUSAL = False
# transformers renamed the modules within version 5: both spellings are known, one of each pair is there.
BLOCK = r"(?:(?:vit|deit)\.)?(?:encoder\.layer|layers)\.(\d+)"
_TOP = r"(?:(?:vit|deit)\.)?"
_QUERY = ("attention.q_proj", "attention.attention.query")
_KEY = ("attention.k_proj", "attention.attention.key")
_VALUE = ("attention.v_proj", "attention.attention.value")
COMPONENTS = {
    "patch_embedding": (_TOP + r"embeddings\.patch_embeddings\.projection",),
    "position_embedding": (_TOP + r"embeddings@position_embeddings",),
    "embedding": (_TOP + "embeddings",),
    "attn_query": _QUERY,
    "attn_key": _KEY,
    "attn_value": _VALUE,
    "attn_qkv": (*_QUERY, *_KEY, *_VALUE),
    "attn_output": ("attention.o_proj", "attention.output.dense"),
    "ffn_in": ("mlp.fc1", "intermediate.dense"),
    "ffn_out": ("mlp.fc2", "output.dense"),
    "norm": ("layernorm_before", "layernorm_after", _TOP + "layernorm"),
    "head": (r"classifier", r"(?:cls|distillation)_classifier"),
}


class Config(Common):
    """Which weights, and how pixels are normalised."""

    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the Hugging Face config, e.g. hidden_size; for `weights: random`"
    )
    attn_implementation: Literal["eager", "sdpa"] = Field(
        "eager", description="only eager has the double backward that gradient matching needs"
    )


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models._images import load as load_any

    return load_any(config, seed, sys.modules[__name__], "vit")


def patch_layer(module: Any) -> PatchLayer:
    """What block 0's query, key and value read: LayerNorm(patch projection + position), behind the special rows."""
    import torch

    from lmleak.models._patches import PatchLayer

    table = module.base_model.embeddings
    projection = table.patch_embeddings.projection
    special = [getattr(table, name).detach()[0] for name in ("cls_token", "distillation_token") if hasattr(table, name)]
    first = torch.cat(special)
    position = table.position_embeddings.detach()[0]
    body = module.base_model
    norm = (body.layers if hasattr(body, "layers") else body.encoder.layer)[0].layernorm_before
    rows, columns = projection.kernel_size
    return PatchLayer(
        projection=projection.weight.detach().flatten(1),
        offset=position[len(first) :] + projection.bias.detach(),
        first=first + position[: len(first)],
        weight=norm.weight.detach(),
        bias=norm.bias.detach(),
        eps=norm.eps,
        patch=(projection.in_channels, rows, columns),
    )
