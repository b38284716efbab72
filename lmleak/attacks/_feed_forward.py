"""What a feed-forward part does before its second matrix: a norm, the first matrix, an activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lmleak.records import Victim

ACTIVATIONS = ("hidden_act", "activation_function", "activation")  #: names that configurations give it


def before(
    victim: Victim, first: nn.Module, run: Callable[[], Tensor]
) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """The norm whose very output the first matrix reads, and the activation of what it gives.

    None where the part is of another kind: gated, say, or with its norm behind it.

    Args:
        victim: the model.
        first: the first matrix' module.
        run: runs the model until the second matrix and gives what that would read.
    """
    config = victim.module.config
    named = next((getattr(config, name) for name in ACTIVATIONS if hasattr(config, name)), None)
    act = ACT2FN[named] if isinstance(named, str) else named
    norms: dict[int, nn.Module] = {}
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda module, args, out: norms.__setitem__(out.data_ptr(), module))
        for m in victim.module.modules()
        if "norm" in type(m).__name__.lower()
    ]
    hooks.append(first.register_forward_hook(lambda module, args, out: seen.update(h=args[0], a=out)))
    try:
        with torch.no_grad():
            x = run()
    finally:
        for hook in hooks:
            hook.remove()
    norm = norms.get(seen["h"].data_ptr()) if "h" in seen else None
    if norm is None or act is None or not torch.allclose(act(seen["a"]), x, atol=1e-5):
        return None
    return norm, act
