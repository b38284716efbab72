"""Victims: one file per architecture family, named as in recipes."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from lmleak import registry

if TYPE_CHECKING:
    from lmleak.records import Victim


def family(name: str) -> ModuleType:
    """The module that knows a family's names: `BLOCK`, `COMPONENTS`, `CAUSAL`, `input_layer`.

    Raises:
        LmleakError: no such family; the message names the nearest one.
    """
    return registry.load("models", name)


def load_model(kind: str = "bert", *, seed: int = 0, **fields: Any) -> Victim:
    """Loads a model and its tokenizer as the client holds them.

    Args:
        kind: file of `lmleak.models`: bert, roberta, distilbert, gpt2, llama, generic; vit, resnet, hf_resnet,
            convnet, mlp, custom.
        seed: draws heads that the weights do not bring, and `random` weights. The global generators are not touched.
        fields: the recipe's `model` block: weights, task, num_labels, config, tokenizer, mode, dtype, device, ...

    Returns:
        the victim, its module in `mode`, all parameters requiring gradients, none having one.

    Raises:
        ModelError: weights, tokenizer or task cannot be had, or do not fit together.
        MissingExtra: `weights: package:NAME/PATH` of a package that is not installed.
    """
    from lmleak.errors import ModelError
    from lmleak.models._fields import validated

    module = family(kind)
    return module.load(validated(module.Config, fields, "model", ModelError), seed)


def outline(kind: str = "bert", **fields: Any) -> Victim:
    """A model's names and shapes without its weights or tokenizer (a module on the meta device).

    Args:
        kind: as in `load_model`.
        fields: as in `load_model`; `weights` defaults to `random`, that is the architecture's published default sizes.

    Raises:
        ModelError, MissingExtra: as in `load_model`.
    """
    from lmleak.errors import ModelError
    from lmleak.models import _images, _loading
    from lmleak.models._fields import validated

    module = family(kind)
    config = validated(module.Config, {"weights": "random"} | fields, "model", ModelError)
    return (_images if hasattr(module, "build") else _loading).outline(config, module, kind)
