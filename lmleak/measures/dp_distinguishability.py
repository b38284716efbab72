"""How far one token, or one sentence, moves a noised gradient, in units of its noise: d' (after 2302.07225).

Two inputs x and x' are told apart by the best test with d' = |g_c(x) - g_c(x')| / (sigma C): g_c is the clipped
gradient over the observed modules, sigma C the noise's standard deviation, and the test errs with Phi(-d' / 2). No
attack is run. Of 30,000 equally likely tokens that are all d' apart, the best attack names the right one in 19 % of
cases at d' 4.5, 55 % at 6 and 79 % at 7 (`_bound.equidistant_success`); at 0.5 it is as good as guessing.

Hayes, Mahloujifar & Balle (2023, arXiv 2302.07225) bound reconstruction by such tests; the clip scope is the defense's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import LmleakError
from lmleak.records import Measurement

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Selection, Victim

EXAMPLE = {"substitutes": 4, "sentences": 2}
UNITS = {
    "token_nearest": "d' (noise standard deviations): a token against its nearest substitute, median over tokens",
    "token_weakest": "d': the token that is hidden best, against its nearest substitute",
    "token_typical": "d': a token against its median substitute, median over tokens",
    "sentence_nearest": "d': a sentence against the nearest of other sentences, median over the batch",
    "sentence_typical": "d': a sentence against the median other sentence, median over the batch",
    "presence": "d': a sentence there against not there, median over the batch; at most 1 / noise_multiplier",
}


class Config(BaseModel):
    """How many alternatives.

    *Measured* on MiniLM, 2 tokens, against the 700 nearest and 500 random tokens: the least distinguishable substitute
    of all was each time the one with the very nearest embedding, though only 4 and 16 of the least distinguishable 100
    were among the 100 nearest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    substitutes: int = Field(
        100, ge=1, description="tokens with the nearest word embeddings that each is exchanged for"
    )
    sentences: int = Field(8, ge=1, description="sentences of the built-in sample that each is exchanged for")


def measure(
    config: Config,
    victim: Victim,
    batch: Batch,
    selection: Selection,
    defense: Mapping[str, Any],
    generator: torch.Generator,
) -> Measurement:
    """d' by observed module; `details["tokens"]`: d' of every token to its nearest substitute, over all observed.

    No rows where the defense is no Gaussian mechanism, has no noise (everything is told apart then), or where the
    model's gradients have no factors.
    """
    from lmleak.data import load_batches
    from lmleak.measures import _changes, _release

    mechanism, reason = _release.noised(defense)
    if mechanism is None:
        return Measurement({}, reason)
    try:
        scope = _changes.scope_of(victim, selection.entries)
    except LmleakError as error:
        return Measurement({}, str(error))
    import torch

    known, names = _changes.remembered(batch), tuple(entry.name for entry in scope)
    by_token = ("tokens", config.substitutes, names)
    if by_token not in known:
        known[by_token] = _changes.token_changes(victim, batch, config.substitutes, scope)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    by_sentence = ("sentences", config.sentences, seed, names)
    if by_sentence not in known:
        limit = config.sentences + len(batch.labels)  # some may be the batch's own
        others = load_batches(victim, "sample", seed=seed, limit=limit)
        known[by_sentence] = _changes.sentence_changes(victim, batch, others, config.sentences, scope)
    release = _release.Release.of(mechanism, victim, batch, selection.entries)
    tokens = [release.moved(change) for change in known[by_token]]
    sentences = [release.moved(change) for change in known[by_sentence]]
    there = [release.presence(change) for change in known[by_sentence]]
    rows = {
        name: {
            "token_nearest": _median(float(d[name].min()) for d in tokens),
            "token_weakest": min((float(d[name].min()) for d in tokens), default=None),
            "token_typical": _median(float(d[name].median()) for d in tokens),
            "sentence_nearest": _median(float(d[name].min()) for d in sentences),
            "sentence_typical": _median(float(d[name].median()) for d in sentences),
            "presence": _median(d[name] for d in there),
        }
        for name in _release.modules(selection.entries)
    }
    own: list[list[float]] = [[] for _ in batch.labels]
    for change, d in zip(known[by_token], tokens, strict=True):
        own[change.sample].append(float(d[_release.ALL].min()))
    return Measurement(rows, details={"tokens": own})


def _median(values: Any) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
