"""A language model's surprise at a text: what tells a sentence from its scrambled words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmleak.models import load_model
from lmleak.records import Victim

Prior = Callable[[Sequence[str]], Tensor]  #: n texts -> [n] mean negative log-likelihood a token, in nats
CHUNK = 64  #: texts scored at once


def load_prior(weights: str, victim: Victim) -> Prior:
    """Loads a causal language model with its own tokenizer; texts go from one tokenizer to the other as strings.

    Raises:
        ModelError: the weights cannot be had.
    """
    device = next(victim.module.parameters()).device
    model = load_model("generic", weights=weights, task="causal-lm", device=str(device))
    tokenizer = model.processor
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def surprise(texts: Sequence[str]) -> Tensor:
        rows = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        out = []
        for at in range(0, len(rows), CHUNK):
            part = rows[at : at + CHUNK]
            width = max(2, *map(len, part))
            ids = torch.full((len(part), width), start, device=device)
            labels = torch.full_like(ids, -100)
            for i, row in enumerate(part):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, 1 : len(row)] = ids[i, 1 : len(row)]
            with torch.no_grad():
                # Right padding is invisible to a causal model's earlier positions: no mask is needed.
                logits = model.module(input_ids=ids, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            out.append(losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp_min(1))
        return torch.cat(out)

    return surprise
