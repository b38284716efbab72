"""What an attention output's gradient shows head by head: the values, free of the attention that mixed them.

The module reads the heads' contexts side by side, A_h V_h for head h: attention weights times the values of all
positions. Whatever mixes the rows of a matrix leaves its row space: the columns that belong to one head span that
head's values. A value depends on its own position's input only, so the contexts, alike in deep layers, need no longer
be told apart. MiniLM, layers 0 to 4, 9 to 15 tokens: true values lie in their head's space to 1e-6 to 2e-3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmleak.attacks._energy import Energy
from lmleak.attacks._rowspace import GAP, matrix
from lmleak.models._input import InputLayer
from lmleak.records import Entry, Observation, Victim

UNCOVERED = 0.3  #: weight of the values that no position explains: their strong directions repeat from head to head


@dataclass(frozen=True)
class Heads:
    """Values that one attention output's gradient shows."""

    value: nn.Module  #: the layer's value projection
    places: Tensor  #: [h] the heads whose spectrum has an edge; the others' weakest direction is lost in rounding
    metric: Tensor  #: [h, d_head, d_head], takes values to where a unit step costs a unit step of the layer's input
    basis: Tensor  #: [h, r, d_head] float32, orthonormal, in that metric

    def outside(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of values [k, n, d] outside their head's space [k, h, n], and unit values [k, h, n, d_head]."""
        x = values.unflatten(-1, (-1, self.metric.shape[-1])).transpose(-2, -3)[..., self.places, :, :] @ self.metric
        x = torch.nn.functional.normalize(x, dim=-1)
        return (1 - (x @ self.basis.mT).pow(2).sum(-1)).clamp_min(0), x

    def energy(self, values: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
        """Means over the heads of `Energy`'s two terms: energy [k], residuals [k, n]."""
        outside, x = self.outside(values)
        p = x @ self.basis.mT
        eye = torch.eye(x.shape[2], device=x.device)
        if isinstance(ridge, Tensor):
            ridge = ridge.reshape(-1, 1, 1, 1)
        covered = (torch.linalg.solve(x @ x.mT + ridge * eye, p) * p).sum((2, 3)).mean(1)
        return outside.mean(1).sum(1) + UNCOVERED * (p.shape[-1] - covered), outside.mean(1)

    def read(self, layer: InputLayer, length: int) -> list[int]:
        """Layer 0: the token of every position whose values lie nearest to the heads' spaces."""
        words = torch.arange(len(layer.word), device=layer.word.device)
        found = []
        for place in range(length):
            worst = []
            for part in words.split(4096):
                rows = layer.rows(part, torch.tensor(place, device=part.device))
                worst.append(self.outside(self.value(rows.to(self.basis))[None])[0][0].mean(0))
            found.append(int(torch.cat(worst).argmin()))
        return found


def heads(victim: Victim, observation: Observation, entry: Entry, tokens: int) -> Heads | None:
    """Reads one attention output, or None where its heads show nothing.

    Args:
        tokens: inputs that carry gradient; as many directions a head, which must leave an eighth of its dimensions. 30
            of 32 say next to nothing: layer 0, 30 tokens, not found in 30,000 sentences, and in 6,000 without.
    """
    if entry.component != "attn_output":
        return None
    own, other = (victim.family.COMPONENTS[name][0] for name in ("attn_output", "attn_value"))
    value = victim.module.get_submodule(re.sub(re.escape(own) + "$", other, entry.module))
    assert isinstance(value, nn.Linear)
    count = victim.module.config.num_attention_heads
    width = value.out_features // count
    if 8 * tokens > 7 * width:
        return None
    weight = value.weight.detach().double().unflatten(0, (count, width))
    power, turn = torch.linalg.eigh(weight @ weight.mT)
    metric = turn @ torch.diag_embed(power.clamp_min(1e-12 * power.max()) ** -0.5) @ turn.mT
    gradient = matrix(victim.module, entry, observation.gradients[entry.name]).double()
    blocks = gradient.unflatten(1, (count, width)).transpose(0, 1)  # [h, d_out, d_head]
    _, values, right = torch.linalg.svd(blocks, full_matrices=False)
    places = (values[:, tokens - 1] >= GAP * values[:, tokens]).nonzero().flatten()
    if not len(places):
        return None
    rows = right[places, :tokens] @ metric[places]
    return Heads(value, places, metric[places].float(), torch.linalg.qr(rows.mT).Q.mT.float())


class HeadEnergy:
    """`Energy` and what heads show. To be used while `energy` is attached, which stays the judge of what is found.

    A relaxation needs both: MiniLM, 25 tokens, attention output of layer 3, three of its 23 words are among the ends
    with the heads alone (25 tokens all but fill their 32 dimensions), 9 without them, 14 with both; 19 tokens at layer
    4 are found in 5,500 candidates for 24,000, and sentences of 8 to 16 tokens together in fewer.
    """

    def __init__(self, energy: Energy, found: list[Heads]):
        self.inner, self.found = energy, found
        self.table, self.tally = energy.table, energy.tally

    def __call__(self, embeds: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        """Energy [k] and its residual part by position [k, n], as `Energy`."""
        values: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            values[module] = output

        hooks = [one.value.register_forward_hook(keep) for one in self.found]
        try:
            total, residuals = self.inner(embeds, ridge)
        finally:
            for hook in hooks:
                hook.remove()
        for one in self.found:
            more, outside = one.energy(values[one.value], ridge)
            total, residuals = total + more, residuals + outside
        return total, residuals
