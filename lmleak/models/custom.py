"""Any PyTorch image classifier that an installed package builds, named as `package.module:callable`.

A recipe can so name code that is there, never bring code: what is named must be a `torch.nn.Module` class, or a
function annotated to return one; nothing else is called. In Python, `__main__:make` names a function of the notebook.
The module takes pixels [b, c, y, x] and returns logits [b, classes], or an object that has them as `logits`.
"""

from __future__ import annotations

import importlib
import re
import sys
import typing
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from lmleak.errors import ModelError
from lmleak.models import _images

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "adapt", "build", "load"]

MODEL_TYPES = ()
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = None  #: known only once a model is there, see `adapt`
COMPONENTS: dict[str, tuple[str, ...]] = {}


class Config(_images.Common):
    """Which callable, with what arguments, and what pictures its module reads."""

    build: str = Field(description="package.module:callable", pattern=r"^[\w.]+:[\w.]+$")
    config: dict[str, Any] = Field(default_factory=dict, description="arguments of the callable")
    weights: str = Field("random", description="a checkpoint file, a folder with one, or `random`: as built")
    channels: int = Field(3, ge=1)
    image_size: int = Field(32, ge=1, description="pixels a side")
    blocks: str | None = Field(
        None, description="regex of the blocks' names, its groups the indices; default: the longest list of modules"
    )
    components: dict[str, list[str]] = Field(
        default_factory=dict, description="name -> module names inside a block, or regexes; default: by type of module"
    )

    @field_validator("blocks")
    @classmethod
    def _counts(cls, value: str | None) -> str | None:
        try:
            if value is not None and not re.compile(value).groups:
                raise ValueError(r"needs a group for the index, as in layer\.(\d+)")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`.

    Raises:
        ModelError: the callable cannot be had or fails, its module does not read such pictures, or the weights of a
            checkpoint do not fit.
    """
    import torch

    from lmleak.models import _checkpoint, _loading

    with _loading._own_generator(seed):
        module = build(config)
    given = [config.build, config.config]
    name = _images.drawn("custom", given, seed)
    if config.weights != "random":
        name = _checkpoint.fill(module, config.weights)
    form = _images.image_format(config, config.channels, (config.image_size,) * 2, None, None)
    victim = _images.finished(config, module.eval(), form, sys.modules[__name__], "custom", name)
    pixels = next(module.parameters()).new_zeros(2, form.channels, form.height, form.width)
    try:
        with torch.no_grad():
            logits = module.eval()(pixel_values=pixels).logits
        shape = tuple(logits.shape)
    except Exception as error:
        raise ModelError(f"model.build: '{config.build}' fails on {tuple(pixels.shape)} pixels: {error}") from error
    finally:
        module.train(config.mode == "train")
    if shape != (2, config.num_labels):
        raise ModelError(
            f"model.num_labels: '{config.build}' gives {shape} for 2 pictures, not (2, {config.num_labels})"
        )
    return victim


def build(config: Config) -> Any:
    """Calls the callable; its module then takes `pixel_values` and returns `logits`, under the names it had.

    Raises:
        ModelError: no such package or callable, one that is not known to return a module, or one that fails.
    """
    make = _callable(config.build)
    try:
        module = make(**config.config)
    except Exception as error:
        raise ModelError(f"model.config: {config.build}({config.config}): {error}") from error
    kind = type(module)

    def forward(self: Any, pixel_values: Any) -> Any:
        found = kind.forward(self, pixel_values)
        return found if hasattr(found, "logits") else SimpleNamespace(logits=found)

    # A wrapping module would put its own name before every parameter, and gradients captured elsewhere have none.
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return module


def adapt(module: Any, config: Config) -> ModuleType:
    """This file's names, filled in for one model: as the recipe says, else by the types of its modules.

    Raises:
        ModelError: the recipe's `blocks` match no module, or something that is not numbered.
    """
    import torch.nn as nn

    names = {name: part for name, part in module.named_modules() if name}
    linear = [name for name, part in names.items() if isinstance(part, nn.Linear)]
    types: dict[str, Any] = {
        "conv": nn.modules.conv._ConvNd,
        "norm": (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm),
        "embedding": nn.Embedding,
    }
    found = {kind: [name for name, part in names.items() if isinstance(part, of)] for kind, of in types.items()}
    found |= {"head": linear[-1:], "linear": linear[:-1]}
    components = {kind: tuple(map(re.escape, each)) for kind, each in found.items() if each}
    components |= {kind: tuple(each) for kind, each in config.components.items()}
    lists = [
        (sum(any(True for _ in part.parameters()) for part in each), -name.count("."), name)
        for name, each in names.items()
        if isinstance(each, nn.ModuleList | nn.Sequential)
    ]
    block = config.blocks or (rf"{re.escape(max(lists)[2])}\.(\d+)" if lists else None)
    matches = [(name, re.fullmatch(block, name)) for name in names] if block else []
    if config.blocks and not any(match for _, match in matches):
        raise ModelError(f"model.blocks: '{block}' matches no module; the first are: {', '.join(list(names)[:8])}")
    for name, match in matches:
        if match and not all(str(group).isdecimal() for group in match.groups()):
            raise ModelError(f"model.blocks: '{block}' matches {name} with {match.groups()}, which are not all numbers")
    family = ModuleType(__name__, __doc__)
    family.__dict__.update(vars(sys.modules[__name__]), BLOCK=block, COMPONENTS=components)
    return family


def _callable(name: str) -> Any:
    import torch.nn as nn

    package, _, inside = name.partition(":")
    try:
        made: Any = importlib.import_module(package)
        for part in inside.split("."):
            made = getattr(made, part)
    except Exception as error:
        raise ModelError(f"model.build: '{name}' cannot be had: {error}") from error
    try:
        returned = made if isinstance(made, type) else typing.get_type_hints(made).get("return")
    except Exception:  # an annotation that names what is not there
        returned = None
    if not (isinstance(returned, type) and issubclass(returned, nn.Module)):
        raise ModelError(
            f"model.build: '{name}' is neither a torch.nn.Module class nor a function annotated to return one "
            "(def make(...) -> torch.nn.Module)"
        )
    return made
