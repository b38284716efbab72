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
    first_attention: Literal["standard", "direct"] = Field(
        "standard",
        description="direct: block 0's attention reads the embedding itself, no norm before it and no skip around it",
    )


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from dataclasses import replace

    from lmleak.models._images import load as load_any

    victim = load_any(config, seed, sys.modules[__name__], "vit")
    if config.first_attention == "standard":
        return victim
    _direct(_blocks(victim.module)[0])
    return replace(victim, weights=f"{victim.weights}, block 0 without norm and skip")


def _blocks(module: Any) -> Any:
    body = module.base_model
    return body.layers if hasattr(body, "layers") else body.encoder.layer


def _direct(block: Any) -> None:
    """The first encoder of APRIL's closed form (Lu et al. 2021, arXiv 2112.14087)."""
    import torch

    def without_skip(_: Any, args: tuple, out: Any) -> Any:
        # The block adds what attention read; autograd sees the two cancel exactly.
        return (out[0] - args[0], *out[1:]) if isinstance(out, tuple) else out - args[0]

    block.layernorm_before = torch.nn.Identity()
    block.attention.register_forward_hook(without_skip)


def patch_layer(module: Any) -> PatchLayer:
    """What block 0's query, key and value read: LayerNorm(patch projection + position), behind the special rows."""
    import torch

    from lmleak.models._patches import PatchLayer

    table = module.base_model.embeddings
    projection = table.patch_embeddings.projection
    special = [getattr(table, name).detach()[0] for name in ("cls_token", "distillation_token") if hasattr(table, name)]
    first = torch.cat(special)
    position = table.position_embeddings.detach()[0]
    norm = _blocks(module)[0].layernorm_before
    direct = isinstance(norm, torch.nn.Identity)
    rows, columns = projection.kernel_size
    return PatchLayer(
        projection=projection.weight.detach().flatten(1),
        offset=position[len(first) :] + projection.bias.detach(),
        first=first + position[: len(first)],
        weight=None if direct else norm.weight.detach(),
        bias=None if direct else norm.bias.detach(),
        eps=0.0 if direct else norm.eps,
        patch=(projection.in_channels, rows, columns),
    )
