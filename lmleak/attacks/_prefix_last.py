"""The last token of a sentence under a causal language model's loss: no input of it is in any gradient, only its label.

The last position predicts nothing, so no module's gradient holds its input. It is the target of the position before
it, whose output gradient at the module is `J^T (W^T p - w_v) / n` for W the head, p the predicted distribution, v the
token, J the derivative of the final hidden state and n the number of predicted tokens: linear in w_v, one product ranks
the vocabulary, and the best are compared in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTLIST = 128  #: tokens whose whole output gradient is compared at a time
CLEAR = 0.02  #: measured: the truth at 2e-7 to 2e-6, the nearest wrong token at 0.18 or more; only ends the search


def last_token(
    module: PreTrainedModel,
    name: str,
    part: tuple[int, int] | None,
    tokens: Sequence[int],
    delta: Tensor,
    predicted: int,
    batches: int = 16,
) -> tuple[int, float, float]:
    """The token behind `tokens` that the loss at their last position was computed with.

    Args:
        module: the victim, parameters frozen.
        name: dotted name of the linear module.
        part: columns of its output that are observed.
        tokens: the sentence without its last token.
        delta: [d_out] output gradient at the last of `tokens`.
        predicted: tokens of the batch that carry loss, which its mean divides by.
        batches: of SHORTLIST tokens, at most, whose whole output gradient is compared.

    Returns:
        token, its mismatch |difference| / |observed|, and the runner-up's.
    """
    head, target = module.get_output_embeddings(), module.get_submodule(name)
    device, dtype = head.weight.device, head.weight.dtype
    ids = torch.tensor([list(tokens)], device=device)
    start, stop = part or (0, len(delta))

    def shift(owner: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        added = torch.zeros_like(out)
        added[0, -1, start:stop] = probe
        return out + added

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        probe = torch.zeros(stop - start, device=device, dtype=dtype, requires_grad=True)
        handle = target.register_forward_hook(shift)
        try:
            final = module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        finally:
            handle.remove()
        with torch.no_grad():
            chance = head(final).float().softmax(-1).to(dtype)
        weight = torch.zeros_like(final, requires_grad=True)
        (pulled,) = torch.autograd.grad(final, probe, weight, create_graph=True)  # J^T weight
        mean = torch.autograd.grad(final, probe, chance @ head.weight.detach(), retain_graph=True)[0]
        wanted = mean - predicted * delta.to(mean)
        (pushed,) = torch.autograd.grad(pulled, weight, wanted, retain_graph=True)  # J wanted
        rows = head.weight.detach()
        ranked = (rows @ pushed / rows.norm(dim=1).clamp_min(1e-30)).argsort(descending=True)[: batches * SHORTLIST]
        parts = []
        for short in ranked.split(SHORTLIST):
            each = torch.autograd.grad(final, probe, rows[short], is_grads_batched=True, retain_graph=True)[0]
            parts.append((each - wanted).double().norm(dim=1) / wanted.double().norm().clamp_min(1e-300))
            if float(parts[-1].min()) < CLEAR:
                break
    mismatch, short = torch.cat(parts).detach(), ranked
    order = mismatch.argsort()
    return int(short[order[0]]), float(mismatch[order[0]]), float(mismatch[order[1]])
