"""A language model's surprise at a text: what tells a sentence from its scrambled words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lmleak.models import load_model
from lmleak.records import Victim

Prior = Callable[[Sequence[str]], Tensor]  #: n texts -> [n] mean negative log-likelihood a token, in nats
Task = Literal["causal-lm", "masked-lm"]
CHUNK = 64  #: rows scored at once
# Every token is masked once, with every MASKS-th other: passes a text. One pass a token (Salazar et al. 2020,
# 1910.14659) asks the same with more context, at 3 to 4 times the cost for a sentence of 13 tokens.
MASKS = 4


def load_prior(weights: str, victim: Victim, task: Task = "causal-lm") -> Prior:
    """Loads a language model with its own tokenizer; texts go from one tokenizer to the other as strings.

    Args:
        weights: hub id, folder or package:NAME/PATH.
        victim: on its device the prior runs.
        task: `masked-lm` for a pseudo-likelihood: the mean of -log p(token | the text, a quarter of its tokens masked).

    Raises:
        ModelError: the weights cannot be had.
    """
    device = next(victim.module.parameters()).device
    model = load_model("generic", weights=weights, task=task, device=str(device))
    rows = _masked if task == "masked-lm" else _causal

    @torch.no_grad()
    def surprise(texts: Sequence[str]) -> Tensor:
        # The same text comes up again and again among reorderings of one sentence; sorted, beginnings come together.
        place = {text: i for i, text in enumerate(sorted(set(texts)))}
        inputs, labels, owners = rows(model.processor, list(place))
        total, count = torch.zeros(len(place), device=device), torch.zeros(len(place), device=device)
        for at in range(0, len(inputs), CHUNK):
            part = slice(at, at + CHUNK)
            losses, index = _losses(model, inputs[part], labels[part], task == "causal-lm")
            owner = torch.tensor(owners[part], device=device)[index]
            total.index_add_(0, owner, losses)
            count.index_add_(0, owner, torch.ones_like(losses))
        mean = total / count.clamp_min(1)
        return mean[torch.tensor([place[text] for text in texts], device=device)]

    return surprise


def _losses(model: Victim, inputs: list[list[int]], labels: list[list[int]], causal: bool) -> tuple[Tensor, Tensor]:
    """-log p of every label that is asked for, and its row's index.

    Most of a small model's cost is its head (50,257 words of 256 numbers: four fifths), so it sees the rows that have
    a label, and rows after the same beginning once: 200 reorderings of 12 words, half of all rows.
    """
    device, width, pad = next(model.module.parameters()).device, max(map(len, inputs)), model.processor.pad_token_id
    filled = lambda rows, value: torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)  # noqa: E731
    asked = [(i, at) for i, row in enumerate(labels) for at, label in enumerate(row) if label != -100]
    keys = [tuple(inputs[i][: at + 1]) if causal else (i, at) for i, at in asked]
    first = dict(zip(reversed(keys), reversed(asked), strict=True))
    number = {key: n for n, key in enumerate(first)}
    seen = torch.tensor([i * width + at for i, at in first.values()], dtype=torch.long, device=device)
    head = model.module.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[seen], *given[1:]))
    try:
        ids, mask = filled(inputs, pad or 0), filled([[1] * len(row) for row in inputs], 0)
        logits = model.module(input_ids=ids, attention_mask=mask).logits
    finally:
        hook.remove()
    index = [(number[key], labels[i][at], i) for key, (i, at) in zip(keys, asked, strict=True)]
    rows, wanted, owners = torch.tensor(index, dtype=torch.long, device=device).view(-1, 3).T
    return (logits.logsumexp(-1)[rows] - logits[rows, wanted]).float(), owners


Rows = tuple[list[list[int]], list[list[int]], list[int]]  #: inputs, labels under their logits, which text's they are


def _causal(tokenizer, texts: Sequence[str]) -> Rows:
    """A row a text: the beginning, then its tokens; the label under each logit is the next token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [[start, *row] for row in tokens], [[*row, -100] for row in tokens], list(range(len(texts)))


def _masked(tokenizer, texts: Sequence[str]) -> Rows:
    """MASKS rows a text (fewer for a short one), in each of them every MASKS-th token masked; labels stand there."""
    inputs: list[list[int]] = []
    labels: list[list[int]] = []
    owners: list[int] = []
    special = set(tokenizer.all_special_ids)
    for i, text in enumerate(texts):
        row = tokenizer(text)["input_ids"]
        places = [place for place, token in enumerate(row) if token not in special]
        for first in range(max(1, min(MASKS, len(places)))):
            hidden = set(places[first::MASKS])
            inputs.append([tokenizer.mask_token_id if place in hidden else t for place, t in enumerate(row)])
            labels.append([t if place in hidden else -100 for place, t in enumerate(row)])
            owners.append(i)
    return inputs, labels, owners
