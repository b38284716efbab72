"""PRECODE: a variational bottleneck in the model makes its gradients random (Scheliga et al., 2021, arXiv 2108.04725).

`[mu | s] = Linear(h)`, a code drawn from N(mu, softplus(s)^2) in training and in evaluation, `Linear(code)` in place of
h; the loss gets `kl_weight` times the code's divergence from N(0, 1) in bits. The model itself changes, and everybody
knows how; only the draws are the client's own. New modules are called after what they stand before
(`linear_bottleneck.encode`, `.decode`), can be selected like any other, and count among the model's parameters.
What it does not hide: gradients of what lies before the bottleneck alone (a selection), the code itself (the decoder's
gradient is one outer product with it), and whatever a first linear layer with a bias shows. No guarantee follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients
    from lmleak.records import Victim

REDUCTION = "mean"
IDENTITY: dict[str, Any] = {}  #: what is released is the changed model's clean gradient
EXAMPLE: dict[str, Any] = {"size": 4}  #: fields at which the defense does its work


class Config(BaseModel):
    """Where, and how wide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: str | list[str] | None = Field(
        None, description="modules as in `select.target_modules`; by default the last linear layer"
    )
    size: int = Field(256, ge=1, description="values of the code")
    kl_weight: float = Field(1e-3, ge=0, description="of the divergence in the loss")


def install(config: Config, victim: Victim, seed: int) -> Victim:
    """The same model with a bottleneck before the named modules, and its own copy of all weights.

    Args:
        config: where.
        victim: left as it was found.
        seed: of the bottleneck's weights, and of the draws wherever a client has none of its own.

    Raises:
        SelectionError: the pattern names no module, or one whose inputs are not rows of known width.
    """
    import copy
    from dataclasses import replace

    import torch

    from lmleak.defenses._bottleneck import Bottleneck, Through
    from lmleak.models._loading import _own_generator
    from lmleak.seeds import derive

    module = copy.deepcopy(victim.module)
    for place, (name, width) in enumerate(_places(config, replace(victim, module=module)).items()):
        owner = module.get_submodule(name)
        weight = next(owner.parameters())
        with _own_generator(derive(seed, "precode", place)), torch.device(weight.device):
            bottleneck = Bottleneck(width, config.size, config.kl_weight).to(weight.dtype)
        bottleneck.train(owner.training)
        bottleneck.noise_seed = derive(seed, "precode noise", place)
        parent, own_name = _parent(module, name)
        setattr(parent, own_name, bottleneck)
        owner.register_forward_pre_hook(Through(bottleneck))
    return replace(victim, module=module, weights=f"{victim.weights} with PRECODE ({config.size})")


def installed(victim: Victim) -> bool:
    """Whether the model has a bottleneck."""
    from lmleak.defenses._bottleneck import Bottleneck

    return any(isinstance(part, Bottleneck) for part in victim.module.modules())


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The batch's mean gradient, of whatever model the client has: see `install`.

    Returns:
        Entry name -> tensor of the entry's shape.
    """
    return {name: tensor.clone() for name, tensor in client.mean().items()}


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee."""
    return None


def _places(config: Config, victim: Victim) -> dict[str, int]:
    """Module name -> width of its inputs."""
    import torch

    from lmleak.errors import SelectionError
    from lmleak.gradients._patterns import matcher, nearest
    from lmleak.gradients._tree import Tree

    tree = Tree(victim.module, victim.family)
    if config.before is None:
        linear = [name for name, part in tree.modules.items() if isinstance(part, torch.nn.Linear)]
        found = linear[-1:]
        if not found:
            raise SelectionError("precode: the model has no linear layer; name a module in defense.before")
    else:
        entry = not isinstance(config.before, str)
        found = []
        for word in config.before if isinstance(config.before, list) else [config.before]:
            hits = [name for name in tree.modules if name and matcher(tree, word, entry)(name)]
            if not hits:
                raise SelectionError(f"defense.before: '{word}' matches no module{nearest(tree, word, entry)}")
            found += [name for name in hits if name not in found]
    widths = {}
    for name in found:
        part = tree.modules[name]
        width = getattr(part, "in_features", None) or getattr(part, "nx", None)
        if width is None:
            raise SelectionError(
                f"defense.before: {name} is a {type(part).__name__}; a bottleneck stands before linear layers only"
            )
        widths[name] = int(width)
    return widths


def _parent(module: Any, name: str) -> tuple[Any, str]:
    """Where a bottleneck before `name` is kept, and its name there: lists of modules are for their own alone."""
    import torch

    path = name.split(".")
    at = len(path) - 1
    while at and isinstance(module.get_submodule(".".join(path[:at])), torch.nn.ModuleList | torch.nn.Sequential):
        at -= 1
    return module.get_submodule(".".join(path[:at])), "_".join([*path[at:], "bottleneck"])
