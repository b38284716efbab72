"""Any other Hugging Face text model: blocks, embedding and head as far as its module tree shows them."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lmleak.models._config import Config

if TYPE_CHECKING:
    from lmleak.models._input import InputLayer
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "adapt", "input_layer", "load"]

MODEL_TYPES = ()
TASKS = ("sequence-classification", "causal-lm", "masked-lm")
TOKENIZER = None
CAUSAL = False
BLOCK = None  #: known only once a model is there, see `adapt`
COMPONENTS: dict[str, tuple[str, ...]] = {}


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`. `weights: random` needs `config: {model_type: ...}`."""
    from lmleak.models._loading import load as load_any

    return load_any(config, seed, sys.modules[__name__], "generic")


def adapt(module: Any, config: Config) -> ModuleType:
    """This file's names, filled in for one model: the blocks are the longest ModuleList, the outermost on a tie.

    Returns:
        a module with `BLOCK`, `COMPONENTS`, `CAUSAL` and `input_layer`, as every family has.
    """
    import torch
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    names = {submodule: name for name, submodule in module.named_modules()}
    lists = [
        (len(part), -name.count("."), name) for part, name in names.items() if isinstance(part, torch.nn.ModuleList)
    ]
    components: dict[str, tuple[str, ...]] = {}
    embedding = module.get_input_embeddings()
    if embedding in names:
        components["embedding"] = (re.escape(names[embedding]),)
    head = _head(module)
    if head in names:
        components["head"] = (re.escape(names[head]),)
    # BERT-like types also have a causal class; those that have no masked one read from left to right.
    kind = module.config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    block = rf"{re.escape(max(lists)[2])}\.(\d+)" if lists else None
    family = ModuleType(__name__, __doc__)
    family.__dict__.update(vars(sys.modules[__name__]), BLOCK=block, COMPONENTS=components, CAUSAL=causal)
    return family


def _head(module: Any) -> Any:
    import torch

    output = module.get_output_embeddings()
    if output is not None:
        return output
    body = {id(part) for part in module.base_model.modules()}
    outside = [part for part in module.modules() if isinstance(part, torch.nn.Linear) and id(part) not in body]
    return outside[-1] if outside else None


def input_layer(module: Any) -> InputLayer:
    """Not known for an architecture without a file of its own.

    Raises:
        ModelError: always.
    """
    from lmleak.errors import ModelError

    raise ModelError(
        f"kind generic does not know what layer 0 of a '{module.config.model_type}' model reads; "
        "a file in lmleak/models with `input_layer` teaches it"
    )
