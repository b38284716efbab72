"""What exchanging one token, or one sentence, does to a sample's gradient: from factors, by the hundred, no attack.

The distances of clipped gradients follow from three numbers a parameter and candidate: |g|^2, |g'|^2 and |g - g'|^2.
They depend on neither noise, clipping nor selection, so a batch's are computed once and serve every setting of a study.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.errors import LmleakError
from lmleak.gradients import factors
from lmleak.gradients.losses import model_losses
from lmleak.gradients.observe import client_mode, whole_model
from lmleak.records import Batch, Entry, Victim

#: Rows (candidates x tokens) of one pass: MiniLM's factors of 256 rows are 120 MB, and larger passes are no faster.
_ROWS = 256


@dataclass(frozen=True)
class Change:
    """A sample as it is, and as it would be with one token or the whole sentence exchanged; k candidates."""

    sample: int  #: row of the batch
    place: int | None  #: which of the sentence's own tokens, special ones not counted; None: the whole sentence
    own: Mapping[str, float]  #: entry name -> |g|^2
    other: Mapping[str, Tensor]  #: entry name -> |g'|^2, [k]
    apart: Mapping[str, Tensor]  #: entry name -> |g - g'|^2, [k]


Sample = tuple[dict[str, Tensor], Tensor]  #: inputs [1, t] without padding, and labels
Uses = dict[str, tuple[factors.Factor, ...]]


def token_changes(victim: Victim, batch: Batch, count: int, entries: Sequence[Entry]) -> tuple[Change, ...]:
    """Every token of every sentence against `count` substitutes: those with the nearest word embeddings.

    Raises:
        LmleakError: the model has a layer without factored gradients, or dropout is on.
    """
    made = []
    for row in range(len(batch.labels)):
        inputs, labels = sample(batch, row)
        for place, position in enumerate(own_positions(victim, inputs, labels)):
            token = token_at(victim, inputs, labels, position)
            substitutes = nearest_tokens(victim, token, count)
            others = [exchanged(victim, inputs, labels, position, int(v)) for v in substitutes]
            made.append(Change(row, place, *_compared(victim, (inputs, labels), others, entries)))
    return tuple(made)


def sentence_changes(
    victim: Victim, batch: Batch, others: Sequence[Batch], count: int, entries: Sequence[Entry]
) -> tuple[Change, ...]:
    """Every sentence against `count` other sentences, batches of one each, under its own label.

    Raises:
        LmleakError: as for `token_changes`.
    """
    made = []
    for row in range(len(batch.labels)):
        inputs, labels = sample(batch, row)
        strangers = [
            (dict(other.inputs), labels if victim.task == "sequence-classification" else other.labels)
            for other in others
            if other.reference.tokens[0] != batch.reference.tokens[row]
        ]
        made.append(Change(row, None, *_compared(victim, (inputs, labels), strangers[:count], entries)))
    return tuple(made)


def sample(batch: Batch, row: int) -> Sample:
    """One sample of a batch alone, without its padding."""
    keep = batch.inputs["attention_mask"][row].bool()
    inputs = {name: tensor[row : row + 1][:, keep] for name, tensor in batch.inputs.items()}
    labels = batch.labels[row : row + 1]
    return inputs, labels if labels.dim() == 1 else labels[:, keep]


def own_positions(victim: Victim, inputs: Mapping[str, Tensor], labels: Tensor) -> list[int]:
    """Where the sentence's own tokens stand: special tokens left out, masked ones counted."""
    special = torch.tensor(sorted(victim.processor.all_special_ids), device=inputs["input_ids"].device)
    own = ~torch.isin(inputs["input_ids"][0], special)
    if victim.task == "masked-lm":
        own |= labels[0] != -100
    return own.nonzero().flatten().tolist()


def token_at(victim: Victim, inputs: Mapping[str, Tensor], labels: Tensor, position: int) -> int:
    """The token at a position; where it is masked, the one that was."""
    masked = victim.task == "masked-lm" and int(labels[0, position]) != -100
    return int((labels if masked else inputs["input_ids"])[0, position])


def exchanged(victim: Victim, inputs: Mapping[str, Tensor], labels: Tensor, position: int, token: int) -> Sample:
    """The sample with another token at one position, in the labels too where they are tokens."""
    ids, targets = inputs["input_ids"].clone(), labels.clone()
    if victim.task == "masked-lm" and int(labels[0, position]) != -100:
        targets[0, position] = token
    else:
        ids[0, position] = token
        if victim.task == "causal-lm":
            targets[0, position] = token
    return {**inputs, "input_ids": ids}, targets


def nearest_tokens(victim: Victim, token: int, count: int) -> Tensor:
    """The `count` tokens with the nearest word embeddings, nearest first; no special tokens."""
    words = victim.module.get_input_embeddings().weight.detach()
    distances = torch.cdist(words[token][None].float(), words.float())[0]
    distances[[token, *victim.processor.all_special_ids]] = torch.inf
    # A padded vocabulary has rows that no text uses.
    distances[len(victim.processor) :] = torch.inf
    return distances.topk(min(count, int(distances.isfinite().sum())), largest=False).indices


def _compared(
    victim: Victim, own: Sample, others: Sequence[Sample], entries: Sequence[Entry]
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """|g|^2, |g'|^2 and |g - g'|^2 of every entry."""
    base = {name: tuple(_wide(use) for use in uses) for name, uses in _factors(victim, [own], entries).items()}
    norms = {name: factors.squared_norms(uses) for name, uses in base.items()}
    other: dict[str, list[Tensor]] = {name: [] for name in base}
    apart: dict[str, list[Tensor]] = {name: [] for name in base}
    for part in _parts(others):
        for name, found in _factors(victim, part, entries).items():
            uses = tuple(_wide(use) for use in found)
            squares = factors.squared_norms(uses)
            cross = sum(_repeated(mine, len(part)).dot(use) for mine in base[name] for use in uses)
            other[name].append(squares)
            apart[name].append((norms[name] + squares - 2 * cross).clamp_min(0))
    # Kept in float32, 1 MB a sentence of MiniLM: what is close to cancelling has been subtracted by now.
    joined = [{name: torch.cat(parts).float() for name, parts in table.items()} for table in (other, apart)]
    return {name: float(norm) for name, norm in norms.items()}, joined[0], joined[1]


def _parts(others: Sequence[Sample]) -> Iterable[Sequence[Sample]]:
    """Candidates of one length together, few enough for one pass."""
    start = 0
    while start < len(others):
        width = others[start][0]["input_ids"].shape[1]
        stop = start + 1
        while (
            stop < len(others)
            and others[stop][0]["input_ids"].shape[1] == width
            and (stop - start + 1) * width <= max(_ROWS, width)
        ):
            stop += 1
        yield others[start:stop]
        start = stop


def _factors(victim: Victim, part: Sequence[Sample], entries: Sequence[Entry]) -> Uses:
    inputs = {name: torch.cat([one[0][name] for one in part]) for name in part[0][0]}
    labels = torch.cat([one[1] for one in part])
    with client_mode(victim) as module, factors.capture(module, entries) as tape:
        return tape.factors(model_losses(module, inputs, labels, victim.task, "sum"))


def _wide(use: factors.Factor) -> factors.Factor:
    # A word moves a matrix's gradient by as little as 0.1 %: |g - g'|^2 from float32 products would be rounding.
    left = use.left.detach()
    return factors.Factor(left if use.one_hot else left.double(), use.right.detach().double(), use.shape)


def _repeated(use: factors.Factor, count: int) -> factors.Factor:
    return factors.Factor(
        use.left.expand(count, *use.left.shape[1:]), use.right.expand(count, *use.right.shape[1:]), use.shape
    )


#: What was computed for a batch that is still alive: a sweep comes back to it for every setting.
_known: dict[int, tuple[weakref.ref[Batch], dict[tuple, tuple[Change, ...]]]] = {}


def scope_of(victim: Victim, entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Whole model and selection: what the changes are computed for, whatever the clip scope.

    Raises:
        LmleakError: a layer without factored gradients, or dropout on in the client.
    """
    if victim.mode == "train":
        raise LmleakError("dropout is on in the client: its gradient is random beyond the stated noise")
    scope = tuple({e.name: e for e in (*whole_model(victim.module), *entries)}.values())
    lacking = factors.unfactored(victim.module, scope)
    if lacking:
        raise LmleakError(f"no factored gradients for {lacking[0].module or lacking[0].name}")
    return scope


def remembered(batch: Batch) -> dict[tuple, tuple[Change, ...]]:
    """Changes of this very batch, to be looked up and added to; forgotten when the batch is."""
    place = id(batch)
    found = _known.get(place)
    if found is None or found[0]() is not batch:
        found = weakref.ref(batch, lambda _: _known.pop(place, None)), {}
        _known[place] = found
    return found[1]
