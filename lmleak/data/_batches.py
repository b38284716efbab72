"""Examples -> the client's batches: order, length filter, tokens, labels, and the reference for the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lmleak.data._examples import Examples
from lmleak.errors import DataError
from lmleak.records import Batch, Reference, Victim
from lmleak.seeds import generator

_MASKED_SHARE = 0.15  #: BERT's (arXiv 1810.04805); every chosen token becomes [MASK], so that the rule is one sentence
_CHUNK = 256  #: sentences tokenised at once; a limit of 20 never tokenises all 67,349 of SST-2


def batches(victim: Victim, examples: Examples, config: Any, seed: int) -> list[Batch]:
    """Shuffles, filters, cuts and tokenises.

    Args:
        victim: its tokenizer and its device are used, its weights are not.
        examples: as a data kind returned them.
        config: the kind's Config: batch_size, limit, shuffle, max_length, min_tokens, max_tokens.
        seed: of the order, and of the masks of masked language modelling.

    Raises:
        DataError: no text, labels that the task cannot use, or nothing left to make one batch of.
    """
    if not examples.texts:
        raise DataError(f"data: no text in {_where(examples)}")
    classify = victim.task == "sequence-classification"
    if classify:
        _check_labels(examples, victim.module.config.num_labels)
    order: Sequence[int] = range(len(examples.texts))
    if config.shuffle:
        order = torch.randperm(len(examples.texts), generator=generator(seed, "data")).tolist()
    kept = []
    for index, tokens in _tokenised(victim, examples, config, order):
        if (config.min_tokens or 0) <= len(tokens) <= (config.max_tokens or len(tokens)):
            kept.append((index, tokens))
        if len(kept) == config.limit:
            break
    if len(kept) < config.batch_size:
        raise DataError(
            f"data: {len(kept)} of {len(examples.texts)} sentences of {_where(examples)} are left after min_tokens, "
            f"max_tokens and limit; a batch needs {config.batch_size}"
        )
    # An incomplete last batch is dropped: its gradient would be a different question from all the others'.
    count = len(kept) // config.batch_size
    groups = [kept[start * config.batch_size : (start + 1) * config.batch_size] for start in range(count)]
    return [_batch(victim, examples, group, place, seed) for place, group in enumerate(groups)]


def _tokenised(
    victim: Victim, examples: Examples, config: Any, order: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    longest = _longest(victim)
    if config.max_length:
        longest = min(config.max_length, longest)
    special = victim.processor.num_special_tokens_to_add()
    if longest <= special:
        raise DataError(f"data.max_length: {longest} leaves no room beside {special} special tokens")
    for start in range(0, len(order), _CHUNK):
        chunk = order[start : start + _CHUNK]
        coded = victim.processor([examples.texts[i] for i in chunk], truncation=True, max_length=longest)["input_ids"]
        for index, tokens in zip(chunk, coded, strict=True):
            if len(tokens) > special:  # a text of characters the tokenizer drops leaks nothing and breaks the forward
                yield index, tokens


def _longest(victim: Victim) -> int:
    """Tokens that the model has positions for."""
    limits = [getattr(victim.module.config, "max_position_embeddings", None), victim.processor.model_max_length]
    first = getattr(victim.family, "first_position", None)
    if first and limits[0]:
        limits[0] -= first(victim.module)
    return min(limit for limit in limits if limit)


def _batch(victim: Victim, examples: Examples, group: list[tuple[int, list[int]]], index: int, seed: int) -> Batch:
    tokenizer, device = victim.processor, next(victim.module.parameters()).device
    width = max(len(tokens) for _, tokens in group)
    ids = torch.full((len(group), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (_, tokens) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    first = getattr(victim.family, "first_position", None)
    positions = torch.arange(width).expand(len(group), -1).clone()
    if first:
        # RoBERTa counts from padding_idx + 1 and gives padding padding_idx itself.
        offset = first(victim.module)
        positions = torch.where(mask.bool(), positions + offset, offset - 1)
    special = set(tokenizer.all_special_ids)
    plain = tuple(tuple(token for token in tokens if token not in special) for _, tokens in group)
    reference = Reference(
        tokens=plain,
        texts=tuple(tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in plain),
        labels=tuple(examples.labels[i] for i, _ in group) if victim.task == "sequence-classification" else (),
    )
    if victim.task == "sequence-classification":
        labels = torch.tensor(reference.labels)
    elif victim.task == "causal-lm":
        labels = ids.masked_fill(mask == 0, -100)
    else:
        ids, labels = _masked(ids, mask, special, tokenizer, generator(seed, "mask", index))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    texts = tuple(examples.texts[i] for i, _ in group)
    return Batch(inputs=inputs, labels=labels.to(device), reference=reference, index=index, texts=texts)


def _masked(
    ids: torch.Tensor, mask: torch.Tensor, special: set[int], tokenizer: Any, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces 15 % of each sentence's own tokens (at least one) by [MASK]; only those carry loss."""
    if tokenizer.mask_token_id is None:
        raise DataError("data: masked-lm needs a tokenizer with a mask token, and this one has none")
    eligible = mask.bool() & ~torch.isin(ids, torch.tensor(sorted(special)))
    chosen = torch.zeros_like(eligible)
    for row, places in enumerate(eligible):
        own = places.nonzero().flatten()
        if len(own):
            count = max(1, round(_MASKED_SHARE * len(own)))
            chosen[row, own[torch.randperm(len(own), generator=draw)[:count]]] = True
    return ids.masked_fill(chosen, tokenizer.mask_token_id), ids.masked_fill(~chosen, -100)


def _check_labels(examples: Examples, classes: int) -> None:
    if not examples.labels:
        raise DataError(f"data.label_column: no labels in {_where(examples)}, and sequence-classification needs them")
    for row, label in enumerate(examples.labels, start=1):
        if not 0 <= label < classes:
            hint = "this split has no labels" if label == -1 else f"set model.num_labels above {label}"
            raise DataError(
                f"data: label {label} in row {row} of {_where(examples)} is outside 0..{classes - 1}"
                f" (num_labels: {classes}); {hint if label >= -1 else 'labels count from 0'}"
            )


def _where(examples: Examples) -> str:
    source = examples.source
    return "'" + str(source.get("path") or source.get("id") or source.get("kind") or "the data") + "'"
